"""`lora-ga`: one module per command, each with a `main`. Nothing here imports torch before it is needed."""
