"""`LoRAGASFTTrainer`: decoder-only models."""

from typing import Any

from trl import SFTTrainer
from trl.models import enable_selective_activation_checkpointing

from .arguments import LoRAGASFTConfig
from .trl_trainer import LoRAGATRLMixin


class LoRAGASFTTrainer(LoRAGATRLMixin, SFTTrainer):
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

    config_class = LoRAGASFTConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if (self.args.gradient_checkpointing_kwargs or {}).get("selective"):
            # TRL 1.16 sets it up on the PEFT model, but transformers 5.23 asks the model inside, which knows nothing of it
            enable_selective_activation_checkpointing(self.model.get_base_model())
