"""`LoRAGARewardTrainer`: reward models."""

import copy

from peft import LoraConfig, TaskType
from trl import RewardTrainer

from ..arguments import LoRAGARewardConfig
from .trl import LoRAGATRLMixin


class LoRAGARewardTrainer(LoRAGATRLMixin, RewardTrainer):
    """TRL's `RewardTrainer` with the LoRA-GA initialization (arXiv 2407.05000); takes the same arguments.

    `args` may be a `LoRAGARewardConfig`, or a `RewardConfig` or `TrainingArguments`. The default adapter, and one whose
    `LoraConfig` names no `task_type`, is for a sequence classifier: PEFT then trains and saves the head whole. The gradient is
    that at the head as it comes; a new one is random. All else is as with `LoRAGASFTTrainer`.

    Raises:
        ValueError: a new head would be neither trained nor saved; otherwise as `LoRAGASFTTrainer`.
    """

    config_class = LoRAGARewardConfig
    task_type = TaskType.SEQ_CLS

    def completed(self, peft_config: LoraConfig) -> LoraConfig:
        if peft_config.task_type is not None:
            return peft_config
        with_task = copy.copy(peft_config)
        with_task.task_type = self.task_type
        return with_task
