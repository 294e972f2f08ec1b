"""Benchmarks of the paper, on a model in memory or on files: `python -m lora_ga_trainer.evaluation --help`."""
