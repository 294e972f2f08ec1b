"""`LoRAGARewardTrainer`: reward models."""

import copy
from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, TaskType
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from .configs import LoRAGARewardConfig
from .trl import LoRAGATRLMixin


class LoRAGARewardTrainer(LoRAGATRLMixin, RewardTrainer):
    """TRL's `RewardTrainer` with the LoRA-GA initialization (arXiv 2407.05000); takes the same arguments.

    `args` may be a `LoRAGARewardConfig`, or a `RewardConfig` or `TrainingArguments`. The default adapter, and one whose
    `LoraConfig` names no `task_type`, is for a sequence classifier: PEFT then trains and saves the whole head. The gradient is
    taken at the initial head, which is random if it is new. Everything else is as in `LoRAGASFTTrainer`.

    Raises:
        ValueError: a new head would be neither trained nor saved; otherwise as `LoRAGASFTTrainer`.
    """

    config_class = LoRAGARewardConfig
    task_type = TaskType.SEQ_CLS

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: LoraConfig | None = None,
    ):
        model, args, peft_config = self.before_init(
            model, args, train_dataset, eval_dataset, quantization_config, peft_config
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
        )

    def completed(self, peft_config: LoraConfig) -> LoraConfig:
        if peft_config.task_type is not None:
            return peft_config
        with_task = copy.copy(peft_config)
        with_task.task_type = self.task_type
        return with_task
