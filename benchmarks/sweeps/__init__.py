"""Sweeps over methods and learning rates: their YAML files, the runs in them, and what these say."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
