"""`LoRAGASFTTrainer`: decoder-only models."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from trl import SFTTrainer

from .arguments import LoRAGASFTConfig, check_lora_config, paper_lora_config, with_ga_options
from .trainer import LoRAGAMixin
from .training_data import check_examples, check_not_empty


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
            the adapter has been initialized or trained already, the dataset is empty or its columns are not those that TRL
            reads, or the model is an encoder-decoder; from `train`, what `initialize_lora_ga` raises.
    """

    def __init__(self, *args, **kwargs):
        call = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs)
        arguments = call.arguments
        arguments["args"] = with_ga_options(LoRAGASFTConfig, arguments.get("args"), arguments["model"])
        if not isinstance(arguments["model"], PeftModel):
            if arguments.get("peft_config") is None:
                arguments["peft_config"] = paper_lora_config()
            check_lora_config(arguments["peft_config"])
        if arguments.get("formatting_func") is None:
            check_examples(arguments.get("train_dataset"), arguments["args"])
        super().__init__(*call.args[1:], **call.kwargs)
        if self.model.config.is_encoder_decoder:
            raise ValueError(
                f"The model is an encoder-decoder ({self.model.config.model_type}), but `LoRAGASFTTrainer` is for decoder-only "
                "models. Use `LoRAGASeq2SeqTrainer`."
            )
        check_not_empty(
            self.train_dataset,
            "has no example with a completion token left after preparation (are the prompts longer than `max_length`?)",
        )
        self.attach_lora_ga()

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
