"""The run that all recipes share: `run.run`."""
