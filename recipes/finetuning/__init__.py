"""The run shared by all recipes: `run.run`."""
