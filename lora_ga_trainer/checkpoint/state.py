"""`lora_ga.json`: the settings and the results of a LoRA-GA run, next to its adapter's files."""

import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import mode
from typing import Any

import peft
import torch
import transformers

from .._version import __version__
from ..adapter.state import LoRAGAState
from ..arguments import LoRAGAArguments
from ..distributed.launches import Launch
from ..report import ExpertCounts, InitReport

STATE_FILE = "lora_ga.json"
WITHOUT_EFFECT = ("ga_batch_size",)
"""Options that do not affect the result, so they may differ on resuming."""


def write_state(directory: Path, state: LoRAGAState) -> None:
    """Write `lora_ga.json` next to the adapter's files."""
    modules = [torch, transformers, peft, *filter(None, [sys.modules.get("trl")])]  # where it trains
    versions = {module.__name__: module.__version__ for module in modules}
    document = asdict(state) | {"versions": {"lora_ga_trainer": __version__} | versions}
    (directory / STATE_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_state(directory: Path) -> LoRAGAState:
    """The state that `write_state` wrote.

    Raises:
        ValueError: the file is missing, or LoRA-GA did not write it.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{directory} has no {STATE_FILE}, so it is not a checkpoint of a LoRA-GA run and its two halves cannot be "
            "separated. Resume from a `checkpoint-N` that a LoRA-GA trainer wrote."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document.pop("versions")
        launch = document["launch"] and Launch(**document["launch"])
        reports = {
            "report": _report(document["report"]),
            "restarts": [_report(report) for report in document.get("restarts", [])],
        }
        return LoRAGAState(**document | reports | {"launch": launch})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Resume from another checkpoint, or copy the file again from its source."
        ) from error


def _report(document: dict[str, Any]) -> InitReport:
    report = InitReport(**document)
    counts = {name: ExpertCounts(*counts) for name, counts in report.experts.items()}
    return replace(report, experts=counts)


def check_same_run(state: LoRAGAState, directory: Path) -> LoRAGAState:
    """The state saved in `directory`, if it was made with the LoRA and `ga_*` settings of `state`.

    Raises:
        ValueError: naming the first setting that differs, with both values.
    """
    saved = read_state(directory)
    without_effect = () if state.options["ga_sketch_passes"] % 1 else WITHOUT_EFFECT  # a look is at whole batches
    # options added since the checkpoint was written acted as their defaults do
    defaults = {"lora": {}, "options": {option.name: option.default for option in fields(LoRAGAArguments)}}
    if saved.earlier_ranks != state.earlier_ranks:
        ranks = [
            f"continues a trained adapter of rank {mode(each.earlier_ranks.values())}"
            if each.earlier_ranks
            else "started from a fresh adapter"
            for each in (state, saved)
        ]
        raise ValueError(
            f"This run {ranks[0]}, but that of the checkpoint {directory} {ranks[1]}. Load what it started from before "
            "resuming, or start a new run in another `output_dir`."
        )
    for group in ("lora", "options"):
        ours, theirs = getattr(state, group), defaults[group] | getattr(saved, group)
        for name in theirs:
            if name not in without_effect and ours.get(name) != theirs[name]:
                raise ValueError(
                    f"`{name}` is {ours.get(name)!r}, but the checkpoint {directory} was made with {theirs[name]!r}. "
                    "Resume with the settings of the checkpoint, or start a new run in another `output_dir`."
                )
    return saved
