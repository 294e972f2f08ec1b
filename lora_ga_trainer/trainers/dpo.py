"""`LoRAGADPOTrainer`: direct preference optimization."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from .configs import LoRAGADPOConfig
from .trl import LoRAGATRLMixin


class LoRAGADPOTrainer(LoRAGATRLMixin, DPOTrainer):
    """TRL's `DPOTrainer` with the LoRA-GA initialization (arXiv 2407.05000); takes the same arguments.

    Without a `ref_model`, the reference is where the policy starts, so the first loss is log 2. For a new adapter that is the
    base model, bit for bit, at every step, since LoRA-GA never changes its weights. For a trained one it is the model with that
    adapter, of which TRL keeps a copy named "ref"; to compare with the base model instead, pass it as `ref_model`. `args` may
    be a `LoRAGADPOConfig`, or a `DPOConfig` or `TrainingArguments`. Everything else is as in `LoRAGASFTTrainer`.

    Raises:
        ValueError: as `LoRAGASFTTrainer`.
    """

    config_class = LoRAGADPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: LoraConfig | None = None,
    ):
        model, args, peft_config = self.before_init(
            model, args, train_dataset, eval_dataset, quantization_config, peft_config
        )
        self.is_ready = False
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self.drop_copy_of_new_adapter()

    def get_ready(self) -> None:
        if not self.is_ready:
            super().get_ready()
            self.is_ready = True

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self.is_ready:  # TRL's `__init__` calls it, first with the training set
            self.get_ready()
            dataset = self.train_dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)
