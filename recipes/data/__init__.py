"""Training data: prompts, row selection, and stand-ins for use without a hub."""
