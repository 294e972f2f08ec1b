"""The settings of a LoRA-GA run, and what its initialization found."""

import copy
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig

from ..arguments import LoRAGAArguments
from ..distributed.launches import Launch
from ..report import InitReport

LORA_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "bias", "lora_bias", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
"""What a `LoraConfig` says about what trains and how; a checkpoint made with others cannot be resumed. Which layers it targets
shows in the names of the tensors."""


@dataclass
class LoRAGAState:
    """The settings and the result of a run: enough to know whether a checkpoint belongs to it. `lora_ga.json` holds it."""

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
    """What each restart found. Each adds 2·r to the saved rank."""
    earlier_ranks: dict[str, int] = field(default_factory=dict)
    """By weight, the rank of the trained adapter that this stage starts from. Empty if it starts from a fresh one."""

    @classmethod
    def before_init(
        cls,
        lora_config: LoraConfig,
        adapter_name: str,
        config: LoRAGAArguments,
        has_embeddings: bool,
        earlier_ranks: dict[str, int],
    ) -> "LoRAGAState":
        # a set, as PEFT makes of some lists, would not survive JSON; and PEFT adds a classifier's head to `modules_to_save` of
        # the same `LoraConfig` once for every model made from it
        values = {name: copy.copy(getattr(lora_config, name)) for name in LORA_FIELDS}
        lora = {name: sorted(set(value)) if isinstance(value, (set, list)) else value for name, value in values.items()}
        options = {option.name: getattr(config, option.name) for option in fields(LoRAGAArguments)}
        options["ga_scale"] = config.scale
        return cls(adapter_name, lora, options, has_embeddings, report=None, earlier_ranks=earlier_ranks)
