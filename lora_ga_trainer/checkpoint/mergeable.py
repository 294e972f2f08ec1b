"""Which adapters can be merged into the base model's files, field by field of PEFT's `LoraConfig`."""

from dataclasses import fields
from typing import Any

from peft import LoraConfig

from ..adapter.lora_config import OTHER_METHODS

COMPUTED = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias", "modules_to_save",
    "target_parameters",
)  # fmt: skip
"""Fields that `merging` handles, directly or through the tensors that they create."""
WITHOUT_EFFECT = (
    # where the adapter is: its tensors' names say so too
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "ensure_weight_tying",
    # how it was trained or initialized, and names
    "lora_dropout", "inference_mode", "velora_config", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "runtime_config",
    # details of refused options
    "megatron_core", "qalora_group_size",
)  # fmt: skip
BESIDE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""The `init_lora_weights` that leave the base weights unchanged."""
REFUSED = OTHER_METHODS | {
    "layer_replication": "the replicated layers share their base weights, and each has an adapter of its own",
    "trainable_token_indices": "only some rows of the embeddings were trained",
}


HARMLESS_ELSEWHERE = ("layer_replication", "trainable_token_indices")
"""Of these, what stands in the way of merging only."""


def check_mergeable(config: dict[str, Any], done: str = "merged file by file", allowed: tuple[str, ...] = ()) -> None:
    """Refuse an `adapter_config.json` that asks for more than W0 + s·lora_B·lora_A.

    An unknown field, as a later PEFT may write, is refused unless it is off or at PEFT's default.

    Args:
        done: what is to be done with the adapter, for the message.
        allowed: fields that do not stand in the way of that.

    Raises:
        ValueError: naming the field, its value and the reason.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"The adapter's type is {config.get('peft_type')!r}, but only LoRA is {done}. Load it with PEFT "
            "and use `merge_and_unload`, or export the adapter alone."
        )
    if config.get("init_lora_weights", True) not in BESIDE_THE_BASE:
        raise ValueError(
            f"The adapter's `init_lora_weights` is {config['init_lora_weights']!r}, which changed the base weights when "
            f"training began, so it cannot be {done}. Export the adapter alone, and load it with PEFT."
        )
    defaults = {option.name: option.default for option in fields(LoraConfig)}
    for name, value in config.items():
        known = (*COMPUTED, *WITHOUT_EFFECT, *allowed, "init_lora_weights")
        if name in known or not value or value == defaults.get(name):
            continue
        reason = REFUSED.get(name, "it is unknown here and may change what the adapter computes")
        raise ValueError(
            f"The adapter's `{name}` is {value!r}: {reason}. So it cannot be {done}. Export the adapter alone, "
            "and load it with PEFT."
        )
