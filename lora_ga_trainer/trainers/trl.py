"""Common to TRL's trainers: the adapter made from a `peft_config`, preparing the datasets, and the metrics."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, TaskType
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from ..adapter.lora_config import check_lora_config, check_no_adapter, paper_lora_config
from ..arguments import with_ga_options
from ..distributed.launches import check_offloading
from ..initialization.stages import as_peft_model, carries_adapter
from .data import check_not_empty, check_turns
from .mixin import LoRAGAMixin


class LoRAGATRLMixin(LoRAGAMixin):
    """`LoRAGAMixin` for a TRL trainer, with its arguments; `args` and `peft_config` may be omitted."""

    config_class: type[TrainingArguments]
    """TRL's configuration with the `ga_*` options."""
    EMPTY = "has no example left after preparation (are all longer than `max_length`?)"
    maybe_activation_offload_context: Any
    _metrics: dict[str, defaultdict[Any, list[Any]]]
    _total_train_tokens: int

    task_type = TaskType.CAUSAL_LM
    """The task type of the paper's adapter, the default `peft_config`."""

    def before_init(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        quantization_config: Any,
        peft_config: LoraConfig | None,
        formatting_func: Callable[[dict], str] | None = None,
    ) -> tuple[Any, Any, LoraConfig | None]:
        """The `model` and the complete `args` and `peft_config` for TRL's `__init__`, which then prepares no dataset before
        `get_ready`.

        Raises:
            ValueError: TRL would fail on one of the arguments.
        """
        args = with_ga_options(self.config_class, args, model)
        if peft_config is None and carries_adapter(model):
            model = as_peft_model(model)
        if not isinstance(model, PeftModel):
            self.adapter_is_default = peft_config is None
            peft_config = paper_lora_config(self.task_type) if peft_config is None else peft_config
            check_lora_config(peft_config)
            peft_config = self.completed(peft_config)
            if isinstance(model, nn.Module):
                check_no_adapter(model)
        if quantization_config is not None:  # only newer TRL has it as an argument
            args.model_init_kwargs = (args.model_init_kwargs or {}) | {"quantization_config": quantization_config}
        check_not_empty(train_dataset, "has no example")
        if formatting_func is None:  # it takes rows of any form
            self.check_dataset(train_dataset, args, "training")
            for dataset in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
                self.check_dataset(dataset, args, "evaluation")
        if vars(args).get("activation_offloading"):  # that of GRPO has no such option
            check_offloading("`activation_offloading=True`")
        self.unprepared: list[tuple[Any, tuple[Any, ...]]] = []
        self._prepare_dataset = self.prepare_later  # shadows TRL's method until `get_ready`
        return model, args, peft_config

    def completed(self, peft_config: LoraConfig) -> LoraConfig:
        """`peft_config`, completed with what the trainer knows."""
        return peft_config

    def prepare_later(self, dataset: Any, *how: Any) -> Any:
        """TRL would prepare its datasets first, which may take hours. Here it does so only after all other checks."""
        self.unprepared.append((dataset, how))
        return dataset

    def get_ready(self) -> None:
        super().get_ready()
        del self._prepare_dataset
        prepared = [(how[-1], self._prepare_dataset(dataset, *how)) for dataset, how in self.unprepared]
        self.unprepared.clear()
        if prepared:  # none with `skip_prepare_dataset`, or of images
            (_, self.train_dataset), *held_out = prepared
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = dict(held_out)
            elif held_out:
                ((_, self.eval_dataset),) = held_out
        check_not_empty(self.train_dataset, self.EMPTY)

    def drop_copy_of_new_adapter(self) -> None:
        """TRL copies the adapter of a `PeftModel` as the reference, named "ref". A new one adds zero, so the base model is the
        same reference, without a second adapter in memory and in every checkpoint."""
        if "ref" in self.model.peft_config and self.model.lora_ga.adds_nothing:
            self.model.delete_adapter("ref")

    def check_dataset(self, dataset: Any, args: Any, role: str) -> None:
        """
        Raises:
            ValueError: TRL would fail on the "training" or "evaluation" set.
        """
        check_turns(dataset, role)

    def estimation_loss(self, model: nn.Module, batch: dict[str, Tensor], num_items_in_batch: int) -> Tensor:
        with self.maybe_activation_offload_context:  # TRL enters it only for training steps
            return super().estimation_loss(model, batch, num_items_in_batch)

    @contextmanager
    def unchanged_metrics(self) -> Iterator[None]:
        metrics, tokens = {mode: dict(group) for mode, group in self._metrics.items()}, self._total_train_tokens
        for group in self._metrics.values():
            group.clear()
        # These metrics are discarded, so need not be gathered; and `gather` needs equal shapes, but the processes' last
        # batches may differ in size.
        self.accelerator.gather = lambda tensor: tensor
        try:
            yield
        finally:
            del self.accelerator.gather
            for mode, group in self._metrics.items():
                group.clear()
                group.update(metrics[mode])
            self._total_train_tokens = tokens
