"""TRL's configurations with the `ga_*` options.

η_f, the rate for full fine-tuning that the size of the factors is matched to, depends on what is trained: preferences and
rewards take a smaller one than supervised fine-tuning. For DPO and GRPO it is TRL's own default for all weights.
"""

from dataclasses import dataclass, field

from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

from ..arguments import FULL_LEARNING_RATE, LoRAGAArguments


@dataclass
class LoRAGASFTConfig(LoRAGAArguments, SFTConfig):
    """TRL's `SFTConfig` and the `ga_*` fields of `LoRAGAArguments`; all of them work in YAML and on the command line.

    Raises:
        ValueError: a `ga_*` value is out of its range, or whatever `SFTConfig` raises.
    """


@dataclass
class LoRAGARewardConfig(LoRAGAArguments, RewardConfig):
    """TRL's `RewardConfig` and the `ga_*` fields of `LoRAGAArguments`.

    Raises:
        ValueError: a `ga_*` value is out of its range, or whatever `RewardConfig` raises.
    """


@dataclass
class LoRAGADPOConfig(LoRAGAArguments, DPOConfig):
    """TRL's `DPOConfig` and the `ga_*` fields of `LoRAGAArguments`, with `ga_full_learning_rate` 1e-6.

    Raises:
        ValueError: a `ga_*` value is out of its range, or whatever `DPOConfig` raises.
    """

    ga_full_learning_rate: float = field(default=1e-6, metadata=FULL_LEARNING_RATE)


@dataclass
class LoRAGAGRPOConfig(LoRAGAArguments, GRPOConfig):
    """TRL's `GRPOConfig` and the `ga_*` fields of `LoRAGAArguments`, with `ga_full_learning_rate` 1e-6.

    Raises:
        ValueError: a `ga_*` value is out of its range, or whatever `GRPOConfig` raises.
    """

    ga_full_learning_rate: float = field(default=1e-6, metadata=FULL_LEARNING_RATE)
