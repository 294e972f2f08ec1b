"""LoRA-GA (arXiv 2407.05000) in the HuggingFace ecosystem: `LoRAGASFTTrainer` in place of TRL's `SFTTrainer`."""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .arguments import (
        LoRAGAArguments,
        LoRAGADPOConfig,
        LoRAGARewardConfig,
        LoRAGASeq2SeqConfig,
        LoRAGASFTConfig,
        LoRAGATrainingArguments,
    )
    from .dpo_trainer import LoRAGADPOTrainer
    from .initialization import initialize_lora_ga, restart_lora_ga
    from .report import InitReport
    from .reward_trainer import LoRAGARewardTrainer
    from .seq2seq_trainer import LoRAGASeq2SeqTrainer
    from .sft_trainer import LoRAGASFTTrainer
    from .trainer import LoRAGAMixin

__all__ = [
    "InitReport",
    "LoRAGAArguments",
    "LoRAGADPOConfig",
    "LoRAGADPOTrainer",
    "LoRAGAMixin",
    "LoRAGARewardConfig",
    "LoRAGARewardTrainer",
    "LoRAGASFTConfig",
    "LoRAGASFTTrainer",
    "LoRAGASeq2SeqConfig",
    "LoRAGASeq2SeqTrainer",
    "LoRAGATrainingArguments",
    "__version__",
    "initialize_lora_ga",
    "restart_lora_ga",
]

_HOMES = {
    "InitReport": "report",
    "LoRAGAArguments": "arguments",
    "LoRAGADPOConfig": "arguments",
    "LoRAGADPOTrainer": "dpo_trainer",
    "LoRAGAMixin": "trainer",
    "LoRAGARewardConfig": "arguments",
    "LoRAGARewardTrainer": "reward_trainer",
    "LoRAGASFTConfig": "arguments",
    "LoRAGASFTTrainer": "sft_trainer",
    "LoRAGASeq2SeqConfig": "arguments",
    "LoRAGASeq2SeqTrainer": "seq2seq_trainer",
    "LoRAGATrainingArguments": "arguments",
    "initialize_lora_ga": "initialization",
    "restart_lora_ga": "initialization",
}
"""Where each public name is. They are imported when first used, so that `lora-ga --help` need not wait for torch."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
