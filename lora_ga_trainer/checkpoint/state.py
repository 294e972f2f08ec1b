"""`lora_ga.json`: the settings and the result of a LoRA-GA run, beside its adapter's files."""

import copy
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from peft import LoraConfig

from .._version import __version__
from ..arguments import LoRAGAArguments
from ..distributed.launches import Launch
from ..report import InitReport

STATE_FILE = "lora_ga.json"
LORA_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "bias", "lora_bias", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
"""What a `LoraConfig` says about what trains and how; a checkpoint made with others cannot be resumed. Which layers it targets
shows in the names of the tensors."""
WITHOUT_EFFECT = ("ga_batch_size",)
"""Options that change no result, so that they may differ on resuming."""


@dataclass
class LoRAGAState:
    """What `lora_ga.json` holds: enough to know whether a checkpoint belongs to a run. `peft_model.lora_ga` is one."""

    adapter_name: str
    lora: dict[str, Any]
    """The fields of `LORA_FIELDS`, of the adapter that trains."""
    options: dict[str, Any]
    """The `ga_*` options."""
    has_embeddings: bool
    """Whether PEFT saves the embeddings with the adapter, because the vocabulary was resized."""
    report: InitReport | None
    """None until the adapter has been initialized."""
    launch: Launch | None = None
    """How the trainer that saves was launched; None in a loop of one's own."""
    restarts: list[InitReport] = field(default_factory=list)
    """What each restart found. After k of them the saved rank is 2·r·(k + 1)."""

    @classmethod
    def before_init(
        cls, lora_config: LoraConfig, adapter_name: str, config: LoRAGAArguments, has_embeddings: bool
    ) -> "LoRAGAState":
        # a set, as PEFT makes of some lists, would not survive JSON; and PEFT adds a classifier's head to `modules_to_save` of
        # the same `LoraConfig` once for every model made from it
        values = {name: copy.copy(getattr(lora_config, name)) for name in LORA_FIELDS}
        lora = {name: sorted(set(value)) if isinstance(value, (set, list)) else value for name, value in values.items()}
        options = {option.name: getattr(config, option.name) for option in fields(LoRAGAArguments)}
        return cls(adapter_name, lora, options, has_embeddings, report=None)


def write_state(directory: Path, state: LoRAGAState) -> None:
    """Write `lora_ga.json` beside the adapter's files."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)}
    document = asdict(state) | {"versions": {"lora_ga_trainer": __version__} | versions}
    (directory / STATE_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_state(directory: Path) -> LoRAGAState:
    """The state that `write_state` wrote.

    Raises:
        ValueError: the file is missing or is none of ours.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{directory} has no {STATE_FILE}, so it is no checkpoint of a LoRA-GA run and its two halves cannot be told "
            "apart. Resume from a `checkpoint-N` that a LoRA-GA trainer wrote."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document.pop("versions")
        launch = document["launch"] and Launch(**document["launch"])
        reports = {
            "report": InitReport(**document["report"]),
            "restarts": [InitReport(**report) for report in document.get("restarts", [])],
        }
        return LoRAGAState(**document | reports | {"launch": launch})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Resume from another checkpoint, or copy the file again from where it came."
        ) from error


def check_same_run(state: LoRAGAState, directory: Path) -> LoRAGAState:
    """The state saved in `directory`, if it was made with the LoRA and `ga_*` settings of `state`.

    Raises:
        ValueError: naming the first setting that differs, with both values.
    """
    saved = read_state(directory)
    # an option that did not exist yet when the checkpoint was written had the effect of its default
    defaults = {"lora": {}, "options": {option.name: option.default for option in fields(LoRAGAArguments)}}
    for group in ("lora", "options"):
        ours, theirs = getattr(state, group), defaults[group] | getattr(saved, group)
        for name in theirs:
            if name not in WITHOUT_EFFECT and ours.get(name) != theirs[name]:
                raise ValueError(
                    f"`{name}` is {ours.get(name)!r}, but the checkpoint {directory} was made with {theirs[name]!r}. "
                    "Resume with the settings of the checkpoint, or start a new run in another `output_dir`."
                )
    return saved
