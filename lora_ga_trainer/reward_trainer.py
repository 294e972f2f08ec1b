"""`LoRAGARewardTrainer`: reward models."""

from peft import TaskType
from trl import RewardTrainer

from .arguments import LoRAGARewardConfig
from .trl_trainer import LoRAGATRLMixin


class LoRAGARewardTrainer(LoRAGATRLMixin, RewardTrainer):
    """TRL's `RewardTrainer` with the LoRA-GA initialization (arXiv 2407.05000); takes the same arguments.

    `args` may be a `LoRAGARewardConfig`, or a `RewardConfig` or `TrainingArguments`. The default adapter is the paper's, for a
    sequence classifier: PEFT then trains and saves the head whole. The gradient is that at the head as it comes; a new one
    is random. All else is as with `LoRAGASFTTrainer`.

    Raises:
        ValueError: as `LoRAGASFTTrainer`.
    """

    config_class = LoRAGARewardConfig
    task_type = TaskType.SEQ_CLS
