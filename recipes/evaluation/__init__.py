"""The paper's benchmarks: task files for lm-evaluation-harness and their functions, MT-Bench, and `--evaluate` (harness.py)."""
