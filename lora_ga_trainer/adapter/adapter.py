"""The LoRA-GA adapter of a model: found once, when it is attached, and kept as `peft_model.lora_ga`."""

from dataclasses import dataclass

from peft import LoraConfig, PeftModel

from .delta import OffsetHalf
from .state import LoRAGAState
from .weight import AdaptedWeight


@dataclass(eq=False, slots=True)
class LoRAGAAdapter:
    """What is adapted, with which settings, and what has become of it."""

    model: PeftModel
    weights: dict[str, AdaptedWeight]
    """By module name, in the model's order."""
    state: LoRAGAState

    @property
    def name(self) -> str:
        return self.state.adapter_name

    @property
    def lora_config(self) -> LoraConfig:
        return self.model.peft_config[self.name]

    @property
    def is_initialized(self) -> bool:
        """Whether A0 and B0 have been written. Before that the adapter adds nothing to what it was attached to."""
        return self.state.report is not None

    @property
    def adds_nothing(self) -> bool:
        """Whether the model computes the base function: before the initialization, unless this stage continues an adapter."""
        return not (self.is_initialized or self.state.earlier_ranks)

    @property
    def is_deleted(self) -> bool:
        """Whether `delete_adapter` has removed it from the model, where another may have its name by now."""
        return not all(weight.is_in_delta_form for weight in self.weights.values())

    @property
    def halves(self) -> dict[str, OffsetHalf]:
        """Both halves of every weight, by module name: what a restart freezes. Empty without the offset."""
        return {name: half for weight in self.weights.values() for name, half in weight.offset_halves.items()}
