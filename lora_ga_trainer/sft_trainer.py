"""`LoRAGASFTTrainer`: decoder-only models."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import Tensor, nn
from trl import SFTTrainer
from trl.models import enable_selective_activation_checkpointing

from .arguments import LoRAGASFTConfig, check_lora_config, paper_lora_config, with_ga_options
from .launches import check_offloading
from .trainer import LoRAGAMixin, check_not_empty


class LoRAGASFTTrainer(LoRAGAMixin, SFTTrainer):
    """TRL's `SFTTrainer` with the LoRA-GA initialization (arXiv 2407.05000); takes the same arguments.

    `args` may be a `LoRAGASFTConfig`, or an `SFTConfig` or `TrainingArguments`, which get the default `ga_*` options.
    `peft_config` must be a `LoraConfig`; without one the paper's is used (r 8, α 16, rsLoRA, all linear layers). The
    model may also be a `PeftModel` with an untrained LoRA adapter.

    The initialization runs when `train()` begins, on the model that trains, and is skipped when resuming. The base
    weights are never written. `save_model` and every checkpoint hold an ordinary LoRA adapter of rank 2r that stock PEFT
    loads on the untouched base model.

    Raises:
        ValueError: the `LoraConfig` asks for another initialization or adapter kind, a rank is too large for a layer,
            the adapter has been initialized or trained already, or the dataset is empty; from `train`, what
            `initialize_lora_ga` raises.
    """

    def __init__(self, *args, **kwargs):
        call = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs)
        arguments = call.arguments
        arguments["args"] = with_ga_options(LoRAGASFTConfig, arguments.get("args"), arguments["model"])
        if not isinstance(arguments["model"], PeftModel):
            if arguments.get("peft_config") is None:
                arguments["peft_config"] = paper_lora_config()
            check_lora_config(arguments["peft_config"])
        check_not_empty(arguments.get("train_dataset"), "has no example")
        if arguments["args"].activation_offloading:
            check_offloading("`activation_offloading=True`")
        selective = (arguments["args"].gradient_checkpointing_kwargs or {}).get("selective")
        super().__init__(*call.args[1:], **call.kwargs)
        check_not_empty(
            self.train_dataset,
            "has no example with a completion token left after preparation (are the prompts longer than `max_length`?)",
        )
        if selective:
            # TRL 1.16 sets it up on the PEFT model, but transformers 5.23 asks the model inside, which knows nothing of it
            enable_selective_activation_checkpointing(self.model.get_base_model())
        self.attach_lora_ga()

    def estimation_loss(self, model: nn.Module, batch: dict[str, Tensor], num_items_in_batch: int) -> Tensor:
        with self.maybe_activation_offload_context:  # which TRL enters for training steps only
            return super().estimation_loss(model, batch, num_items_in_batch)

    @contextmanager
    def unchanged_metrics(self) -> Iterator[None]:
        metrics = {
            mode: {name: list(values) for name, values in group.items()} for mode, group in self._metrics.items()
        }
        tokens = self._total_train_tokens
        try:
            yield
        finally:
            for mode, group in self._metrics.items():
                group.clear()
                group.update(metrics[mode])
            self._total_train_tokens = tokens
