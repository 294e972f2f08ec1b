"""LoRA-GA (arXiv 2407.05000) in the HuggingFace ecosystem: `LoRAGASFTTrainer` in place of TRL's `SFTTrainer`."""

from ._version import __version__
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
