"""`lora-ga`: one module per command, each with a `main`. Modules import torch only when needed."""
