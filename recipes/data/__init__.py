"""What is trained on: prompts, the selection of rows, and what stands in without a hub."""
