"""What TRL's trainers have in common: the adapter that they make from a `peft_config`, and their metrics."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, TaskType
from torch import Tensor, nn
from transformers import TrainingArguments

from .arguments import with_ga_options
from .launches import check_offloading
from .lora_config import check_lora_config, paper_lora_config
from .trainer import LoRAGAMixin
from .training_data import check_not_empty


class LoRAGATRLMixin(LoRAGAMixin):
    """`LoRAGAMixin` for a trainer of TRL, with its arguments; `args` and `peft_config` may be left out."""

    config_class: type[TrainingArguments]
    """TRL's configuration with the `ga_*` options."""
    EMPTY = "has no example left after preparation (are all longer than `max_length`?)"
    maybe_activation_offload_context: Any
    _metrics: dict[str, defaultdict[Any, list[Any]]]
    _total_train_tokens: int

    task_type = TaskType.CAUSAL_LM
    """That of the paper's adapter, which stands in for a `peft_config`."""

    def __init__(self, *args: Any, **kwargs: Any):
        call = inspect.signature(super(LoRAGAMixin, self).__init__).bind(*args, **kwargs)
        arguments = call.arguments
        arguments["args"] = with_ga_options(self.config_class, arguments.get("args"), arguments["model"])
        if not isinstance(arguments["model"], PeftModel):
            if arguments.get("peft_config") is None:
                arguments["peft_config"] = paper_lora_config(self.task_type)
            check_lora_config(arguments["peft_config"])
        self.check_arguments(arguments)
        super().__init__(*call.args, **call.kwargs)

    def check_arguments(self, arguments: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: TRL would stumble over one of the trainer's `arguments`.
        """
        check_not_empty(arguments.get("train_dataset"), "has no example")
        if arguments["args"].activation_offloading:
            check_offloading("`activation_offloading=True`")

    def estimation_loss(self, model: nn.Module, batch: dict[str, Tensor], num_items_in_batch: int) -> Tensor:
        with self.maybe_activation_offload_context:  # which TRL enters for training steps only
            return super().estimation_loss(model, batch, num_items_in_batch)

    @contextmanager
    def unchanged_metrics(self) -> Iterator[None]:
        metrics, tokens = {mode: dict(group) for mode, group in self._metrics.items()}, self._total_train_tokens
        for group in self._metrics.values():
            group.clear()
        # What is thrown away need not be gathered; and `gather` wants equal shapes, while the last batches of the processes
        # may differ in size.
        self.accelerator.gather = lambda tensor: tensor
        try:
            yield
        finally:
            del self.accelerator.gather
            for mode, group in self._metrics.items():
                group.clear()
                group.update(metrics[mode])
            self._total_train_tokens = tokens
