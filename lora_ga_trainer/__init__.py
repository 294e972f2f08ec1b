"""LoRA-GA (arXiv 2407.05000) in the HuggingFace ecosystem: `LoRAGASFTTrainer` in place of TRL's `SFTTrainer`."""

from ._version import __version__
from .arguments import LoRAGAArguments, LoRAGASFTConfig
from .initialization import initialize_lora_ga
from .report import InitReport
from .trainer import LoRAGASFTTrainer

__all__ = ["InitReport", "LoRAGAArguments", "LoRAGASFTConfig", "LoRAGASFTTrainer", "__version__", "initialize_lora_ga"]
