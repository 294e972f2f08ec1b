"""`LoRAGADPOTrainer`: direct preference optimization."""

from typing import Any

from trl import DPOTrainer

from ..arguments import LoRAGADPOConfig
from .trl import LoRAGATRLMixin


class LoRAGADPOTrainer(LoRAGATRLMixin, DPOTrainer):
    """TRL's `DPOTrainer` with the LoRA-GA initialization (arXiv 2407.05000); takes the same arguments.

    Without a `ref_model` the reference is the model with its adapter off: here the base model to the bit, at every step, since
    LoRA-GA leaves its weights alone. The policy starts there too, so the first loss is log 2. `args` may be a
    `LoRAGADPOConfig`, or a `DPOConfig` or `TrainingArguments`. All else is as with `LoRAGASFTTrainer`.

    Raises:
        ValueError: as `LoRAGASFTTrainer`.
    """

    config_class = LoRAGADPOConfig

    def __init__(self, *args: Any, **kwargs: Any):
        self.is_ready = False
        super().__init__(*args, **kwargs)
        # TRL copies the adapter of a `PeftModel` as the reference. This one is new and adds zero: the base model is the same,
        # without a second adapter in memory and in every checkpoint.
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def get_ready(self) -> None:
        if not self.is_ready:
            super().get_ready()
            self.is_ready = True

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self.is_ready:  # by TRL's `__init__`, with the training set first
            self.get_ready()
            dataset = self.train_dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)
