"""The methods that the paper compares, in one table: `--method`.

All train with the same data, order, optimizer and options; the table lists what each changes. Unless the options differ, α is
16, dropout 0, and the targets are all linear layers except the head.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import ceil
from typing import Any, NamedTuple

from peft import AdaLoraConfig, LoraConfig, PeftConfig
from transformers import Seq2SeqTrainer
from trl import ModelConfig, SFTTrainer

from lora_ga_trainer import LoRAGAArguments, LoRAGASeq2SeqTrainer, LoRAGASFTTrainer
from lora_ga_trainer.trainers.seq2seq import TokenMeanSeq2SeqTrainer
from methods.baselines import (
    AdaLoRASeq2SeqTrainer,
    AdaLoRASFTTrainer,
    LoRAPlusSeq2SeqTrainer,
    LoRAPlusSFTTrainer,
    PiSSASeq2SeqTrainer,
    PiSSASFTTrainer,
)


def lora(**changes: Any) -> Callable[..., LoraConfig]:
    """A plain LoRA, s = α/r, with `changes`."""
    return lambda r, **shared: LoraConfig(r=r, **shared, **changes)


def adalora(r: int, **shared: Any) -> AdaLoraConfig:
    """From 1.5·r down to r on average. The steps are filled in by `AllocateRanks`, the regularizer comes from `AdaLoRA`."""
    return AdaLoraConfig(init_r=ceil(1.5 * r), target_r=r, total_step=1, orth_reg_weight=0.0, **shared)


class Trainers(NamedTuple):
    """One for each kind of model."""

    causal: type[SFTTrainer]
    seq2seq: type[Seq2SeqTrainer]


STOCK = Trainers(SFTTrainer, TokenMeanSeq2SeqTrainer)
LORA_GA = Trainers(LoRAGASFTTrainer, LoRAGASeq2SeqTrainer)


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    trainers: Trainers
    adapter: Callable[..., PeftConfig] | None
    """(r, lora_alpha, …) -> the adapter's configuration; None to train all weights."""
    ga: dict[str, str] = field(default_factory=dict)
    """`ga_*` options that define the method."""


METHODS = {
    "lora_ga": Method(LORA_GA, lora(use_rslora=True)),
    "full": Method(STOCK, None),
    "lora": Method(STOCK, lora()),
    "rslora": Method(STOCK, lora(use_rslora=True)),
    "lora_plus": Method(Trainers(LoRAPlusSFTTrainer, LoRAPlusSeq2SeqTrainer), lora()),
    "dora": Method(STOCK, lora(use_dora=True)),
    "pissa": Method(Trainers(PiSSASFTTrainer, PiSSASeq2SeqTrainer), lora(init_lora_weights="pissa")),
    "adalora": Method(Trainers(AdaLoRASFTTrainer, AdaLoRASeq2SeqTrainer), adalora),
    # the paper's ablation: neither of LoRA-GA's two parts, stable output only, gradient only
    "gaussian": Method(LORA_GA, lora(), {"ga_direction": "gaussian", "ga_scale": "gaussian"}),
    "so": Method(LORA_GA, lora(use_rslora=True), {"ga_direction": "gaussian", "ga_scale": "stable"}),
    "ga": Method(LORA_GA, lora(), {"ga_direction": "ArB2r", "ga_scale": "unit"}),
}


@dataclass
class MethodConfig(ModelConfig):
    """TRL's `ModelConfig`, with a method and the paper's adapter. What the method decides is not an option.

    Raises:
        ValueError: there is no such method, or the rank is below 1.
    """

    method: str = field(default="lora_ga", metadata={"help": f"One of {', '.join(METHODS)}."})
    r: int = field(
        default=8, metadata={"help": "The adapter's rank. (torchrun claims `--r` for itself: set it in the YAML.)"}
    )
    lora_alpha: int = field(default=16, metadata={"help": "The adapter's α."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the layers that get an adapter."}
    )
    lora_r: int = field(init=False)
    use_peft: bool = field(init=False)
    use_rslora: bool = field(init=False, default=False)
    use_dora: bool = field(init=False, default=False)
    lora_task_type: str = field(init=False, default="CAUSAL_LM")
    lora_target_parameters: list[str] | None = field(init=False, default=None)

    def __post_init__(self):
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"`method` is {self.method!r}, but must be one of {', '.join(map(repr, METHODS))}.")
        if self.r < 1:
            raise ValueError(f"`r` is {self.r}, but must be at least 1; 8 is the default.")
        self.lora_r = self.r
        self.use_peft = METHODS[self.method].adapter is not None


def adapter_config(model_args: MethodConfig, task_type: str) -> PeftConfig | None:
    """The method's adapter for a model of PEFT's `task_type`; None to train all weights."""
    adapter = METHODS[model_args.method].adapter
    if adapter is None:
        return None
    return adapter(
        r=model_args.r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        modules_to_save=model_args.lora_modules_to_save,
        task_type=task_type,
        revision=None if model_args.model_revision == "main" else model_args.model_revision,
    )


def set_ga_options(training_args: LoRAGAArguments, method: str, given: Iterable[str]) -> None:
    """Give `training_args` the `ga_*` values that define `method`.

    Args:
        given: the names of the options that the user has set.

    Raises:
        ValueError: the user has set one of them to another value.
    """
    for name, value in METHODS[method].ga.items():
        chosen = getattr(training_args, name)
        if name in given and chosen != value:
            raise ValueError(
                f"`{name}` is {chosen!r}, but the method {method!r} is defined by {value!r}. Leave out `{name}`, or use "
                "the method 'lora_ga', which takes any."
            )
        setattr(training_args, name, value)
