"""The checkpoints in a run's folder. It imports nothing slow, so that `lora-ga` reports wrong usage quickly."""

from pathlib import Path

PREFIX = "checkpoint-"
"""As transformers names them."""


def step_of(directory: Path) -> int | None:
    """N of a `checkpoint-N`."""
    number = directory.name.removeprefix(PREFIX)
    return int(number) if directory.name.startswith(PREFIX) and number.isdigit() else None


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The folders `checkpoint-N` of a run, by N ascending."""
    found = {step_of(path): path for path in run.glob(f"{PREFIX}*") if path.is_dir()}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}
