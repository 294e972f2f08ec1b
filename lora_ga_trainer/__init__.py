"""LoRA-GA (arXiv 2407.05000) in the HuggingFace ecosystem: `LoRAGASFTTrainer` in place of TRL's `SFTTrainer`."""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .arguments import LoRAGAArguments, LoRAGASeq2SeqConfig, LoRAGATrainingArguments
    from .initialization.initialize import initialize_lora_ga, restart_lora_ga
    from .report import InitReport
    from .trainers.configs import LoRAGADPOConfig, LoRAGAGRPOConfig, LoRAGARewardConfig, LoRAGASFTConfig
    from .trainers.dpo import LoRAGADPOTrainer
    from .trainers.grpo import LoRAGAGRPOTrainer
    from .trainers.mixin import LoRAGAMixin
    from .trainers.reward import LoRAGARewardTrainer
    from .trainers.seq2seq import LoRAGASeq2SeqTrainer
    from .trainers.sft import LoRAGASFTTrainer

__all__ = [
    "InitReport",
    "LoRAGAArguments",
    "LoRAGADPOConfig",
    "LoRAGADPOTrainer",
    "LoRAGAGRPOConfig",
    "LoRAGAGRPOTrainer",
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
    "LoRAGADPOConfig": "trainers.configs",
    "LoRAGADPOTrainer": "trainers.dpo",
    "LoRAGAGRPOConfig": "trainers.configs",
    "LoRAGAGRPOTrainer": "trainers.grpo",
    "LoRAGAMixin": "trainers.mixin",
    "LoRAGARewardConfig": "trainers.configs",
    "LoRAGARewardTrainer": "trainers.reward",
    "LoRAGASFTConfig": "trainers.configs",
    "LoRAGASFTTrainer": "trainers.sft",
    "LoRAGASeq2SeqConfig": "arguments",
    "LoRAGASeq2SeqTrainer": "trainers.seq2seq",
    "LoRAGATrainingArguments": "arguments",
    "initialize_lora_ga": "initialization.initialize",
    "restart_lora_ga": "initialization.initialize",
}
"""Where each public name is defined. They are imported on first use: `lora-ga --help` need not wait for torch, and only the
trainers that extend TRL's need TRL."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
