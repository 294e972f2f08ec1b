"""A run's folder: its checkpoints and its trainer's log."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.run_folder import checkpoints_of, step_of

STATE_FILE, LOG_FILE = "lora_ga.json", "trainer_state.json"


class Curve(NamedTuple):
    """One quantity of the log."""

    steps: list[int]
    values: list[float]
    seconds: list[float] | None
    """Wall time since training began; None if the log has no clock (`ga/seconds`)."""


@dataclass(frozen=True)
class Log:
    """What a trainer logged: the `log_history` of its `trainer_state.json`."""

    entries: list[dict[str, Any]]

    def curve(self, key: str) -> Curve:
        found = [entry for entry in self.entries if key in entry]
        seconds = [entry["ga/seconds"] for entry in found if "ga/seconds" in entry]
        return Curve(
            [entry["step"] for entry in found],
            [entry[key] for entry in found],
            seconds if len(seconds) == len(found) and found else None,
        )

    def last(self, key: str) -> float | None:
        return next((entry[key] for entry in reversed(self.entries) if key in entry), None)


def adapter_folder(directory: Path) -> Path | None:
    """The folder of the LoRA-GA adapter's files: `directory`, or a subfolder if the adapter is not named "default"."""
    folders = (directory, *sorted(path for path in directory.iterdir() if path.is_dir() and step_of(path) is None))
    return next((folder for folder in folders if (folder / STATE_FILE).is_file()), None)


def read_log(path: Path) -> Log:
    """The longest log in `path`: a run's own `trainer_state.json` or that of its last checkpoint; for a checkpoint, its own.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    check_folder(path)
    files = [folder / LOG_FILE for folder in (*checkpoints_of(path).values(), path)]
    logs = [_read_log_file(file) for file in files if file.is_file()]
    if not logs:
        raise ValueError(
            f"{path} has no {LOG_FILE}, neither in itself nor in a `checkpoint-N`, so its losses are unknown. Pass the "
            "`output_dir` of a run that has saved at least one checkpoint, or call `trainer.save_state()`."
        )
    return max(logs, key=lambda log: (max((entry["step"] for entry in log.entries), default=-1), len(log.entries)))


def last_step(path: Path) -> int:
    """The last step that the log in `path` knows; 0 without a log, since a custom training loop keeps none.

    Raises:
        ValueError: the log is damaged.
    """
    file = path / LOG_FILE
    return max((entry["step"] for entry in _read_log_file(file).entries), default=0) if file.is_file() else 0


def check_folder(path: Path) -> None:
    """
    Raises:
        ValueError: there is no such folder.
    """
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}. Pass the `output_dir` of a run, or one of its `checkpoint-N`.")


def _read_log_file(path: Path) -> Log:
    try:
        return Log(json.loads(path.read_text(encoding="utf-8"))["log_history"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Remove it, or copy it again from its source.") from error
