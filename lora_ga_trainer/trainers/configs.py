"""TRL's configurations with the `ga_*` options."""

from dataclasses import dataclass

from trl import DPOConfig, RewardConfig, SFTConfig

from ..arguments import LoRAGAArguments


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
    """TRL's `DPOConfig` and the `ga_*` fields of `LoRAGAArguments`.

    Raises:
        ValueError: a `ga_*` value is out of its range, or whatever `DPOConfig` raises.
    """
