"""`LoRAGASFTTrainer`: decoder-only models."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from torch import Tensor
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
from trl import SFTConfig, SFTTrainer

from ..compatibility import enable_selective_checkpointing
from .configs import LoRAGASFTConfig
from .data import check_examples
from .trl import LoRAGATRLMixin


class LoRAGASFTTrainer(LoRAGATRLMixin, SFTTrainer):
    """TRL's `SFTTrainer` with the LoRA-GA initialization (arXiv 2407.05000); takes the same arguments.

    `args` may be a `LoRAGASFTConfig`, or an `SFTConfig` or `TrainingArguments`, which get the default `ga_*` options.
    `peft_config` must be a `LoraConfig`; without one the paper's is used (r 8, α 16, rsLoRA, all linear layers). The
    model may also be a `PeftModel` with a LoRA adapter, new or trained.

    The initialization runs when `train()` begins, on the model that trains, and is skipped when resuming. The base
    weights are never written. `save_model` and every checkpoint hold an ordinary LoRA adapter of rank 2r that stock PEFT
    loads on the untouched base model.

    Raises:
        ValueError: the `LoraConfig` asks for another initialization or adapter kind, the adapter has been initialized in this
            process already, a dataset is empty or its columns are not those that TRL reads, or the model is an
            encoder-decoder; from `train`, what `initialize_lora_ga` raises.
    """

    config_class = LoRAGASFTConfig
    EMPTY = "has no example with a completion token left after preparation (are the prompts longer than `max_length`?)"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: LoraConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        model, args, peft_config = self.before_init(
            model, args, train_dataset, eval_dataset, quantization_config, peft_config, formatting_func
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        how: Any = self.args.gradient_checkpointing_kwargs or {}  # a string was parsed
        if self.args.gradient_checkpointing and how.get("selective"):
            enable_selective_checkpointing(self.model)

    def get_ready(self) -> None:
        if self.model.config.is_encoder_decoder:
            raise ValueError(
                f"The model is an encoder-decoder ({self.model.config.model_type}), but `LoRAGASFTTrainer` is for decoder-only "
                "models. Use `LoRAGASeq2SeqTrainer`."
            )
        super().get_ready()

    def check_dataset(self, dataset: Any, args: LoRAGASFTConfig, role: str) -> None:
        check_examples(dataset, args, role)
