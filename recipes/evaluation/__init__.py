"""The paper's benchmarks: task files for lm-evaluation-harness, their functions, MT-Bench, and `--evaluate` (harness.py)."""
