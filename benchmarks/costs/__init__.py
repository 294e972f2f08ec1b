"""What a cost is measured on, and how it is found: of an initialization, of a step, and how they grow."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
