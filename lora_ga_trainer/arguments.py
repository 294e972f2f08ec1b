"""The `ga_*` options and their checks."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_args

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .factors import Direction, Scale

ESTIMATORS = ("sketch", "exact")
FULL_LEARNING_RATE = {"help": "For the `matched` scale: the learning rate for full fine-tuning."}
LARGEST_SEED = 2**63 - 1
"""torch's generators take 64 bits, and every restart draws with a seed one higher."""


def is_number_above_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


@dataclass
class LoRAGAArguments:
    """The options of the LoRA-GA initialization (arXiv 2407.05000). `LoRAGASFTConfig` adds them to TRL's `SFTConfig`.

    Your own dataclass gets them the same way: `class MyArguments(LoRAGAArguments, TheTrainersArguments)`.

    Parameters:
        ga_num_samples (`int`, *optional*, defaults to `64`):
            How many training examples the gradient is averaged over.
        ga_batch_size (`int`, *optional*):
            Examples per forward and backward while estimating. Defaults to half of the training batch size per device, to
            make room for the sketch. Changes speed and memory only: the gradient is the token-weighted mean, however the
            examples are batched. (With a fraction of a pass it also decides which examples are looked at.)
        ga_estimator (`str`, *optional*, defaults to `"sketch"`):
            `"sketch"` keeps 2·K·(O+I) numbers for an O×I weight, `"exact"` the full O·I gradient in float32. (A layer so
            small that 2·K·(O+I) ≥ O·I is always estimated exactly.)
        ga_sketch_passes (`float`, *optional*, defaults to `2`):
            How often the sketch goes over the same examples. More passes come closer to the exact singular vectors: on real
            gradients, 1 reaches 0.98 of the exact alignment, 2 reach 0.999, 3 reach 0.9999. A fraction is the share of the
            examples, in whole batches, that a look goes over before the first pass: 1.25 is a look at a quarter of them and one
            pass over all.
        ga_sketch_size (`int`, *optional*):
            K, the width of the sketch; at least 2·r. Defaults to 2·r + 32 for each layer's own rank r.
        ga_direction (`str`, *optional*, defaults to `"ArB2r"`):
            Which of the first 2·r singular vectors go to A (V) and to B (U): `"ArB2r"` A the first r and B the next r,
            `"A2rBr"` the reverse, `"ArBr"` A the odd and B the even ones (counted from 0), `"random"` two disjoint
            random sets. `"gaussian"` is the paper's ablation: random vectors instead of singular ones.
        ga_scale (`str`, *optional*):
            The factor c in A0 = c·Vᵀ, B0 = c·U, with s the adapter's scaling. `"matched"`, the default where the learning rate
            is known, from a trainer or from `ga_learning_rate`: such that the first step of AdamW moves each weight as far as
            full fine-tuning at `ga_full_learning_rate` would, whatever the learning rate, r and α. `"stable"`, the paper's, and
            the default elsewhere: O^¼/√γ, to be tuned together with the learning rate. `"unit"` 1, `"gd"` 1/s, `"weight_svd"`
            the mean of √(σ(W)/s) over the first r singular values of the weight, `"gaussian"` √(I/O) for A0 and √(O/I) for B0
            (the paper's ablation).
        ga_full_learning_rate (`float`, *optional*, defaults to `5e-5`, with DPO and GRPO to `1e-6`):
            η_f of the `matched` scale: the learning rate for full fine-tuning. Larger values start from larger factors, which
            move the weights further with each of the first steps.
        ga_learning_rate (`float`, *optional*):
            η of the `matched` scale: the peak learning rate of the adapter. A trainer reads it from its optimizer and its
            schedule. Your own training loop must set it, and so must you if a function of your own (`LambdaLR`) raises the rate
            above the optimizer's.
        ga_gamma (`float`, *optional*, defaults to `16.0`):
            γ of the `stable` scale. Larger values start from smaller factors.
        ga_offset (`bool`, *optional*, defaults to `True`):
            Whether B starts at B0 and s·B0 A0 is subtracted, as in the paper. `False`: B starts at zero, as in LoRA. Nothing is
            subtracted, training costs the same as LoRA's, and the saved adapter has rank r instead of 2·r.
        ga_stage_rank (`int`, *optional*):
            r of a new stage of training that starts from a trained adapter: that one is frozen, and a new pair of rank r starts
            from the gradient at what the model computes with it, so that the saved rank grows by 2·r. Defaults to half of the
            adapter's rank in each layer, rounded up, with which the rank doubles.
        ga_restart_steps (`int`, *optional*):
            Every this many optimizer steps, freeze what was trained so far into the adapter and restart from the gradient
            at the current function (LoRA-GA inside ReLoRA, arXiv 2307.05695). The saved adapter's rank grows by 2·r each
            time. Default: never.
        ga_restart_warmup_steps (`int`, *optional*, defaults to `10`):
            Steps over which the learning rate climbs back to its schedule after a restart; 0 for none.
        ga_seed (`int`, *optional*, defaults to `42`):
            Draws the examples, the sketch's test matrices and the directions `random` and `gaussian`. Independent of `seed`.

    Raises:
        ValueError: a value is out of its range. The message states the value, the rule and the remedy.
    """

    ga_num_samples: int = field(
        default=64, metadata={"help": "How many training examples the LoRA-GA gradient is averaged over."}
    )
    ga_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples per forward and backward while estimating. Default: half the training batch size."},
    )
    ga_estimator: str = field(
        default="sketch",
        metadata={"help": "`sketch` keeps 2·K·(O+I) numbers for an O×I weight, `exact` the full fp32 gradient."},
    )
    ga_sketch_passes: float = field(
        default=2,
        metadata={
            "help": "How often the sketch goes over the same examples. More is closer to exact. 1.25: a look at a quarter of "
            "them, then one pass over all."
        },
    )
    ga_sketch_size: int | None = field(
        default=None, metadata={"help": "K, the width of the sketch, at least 2r. Default: 2r + 32."}
    )
    ga_direction: str = field(
        default="ArB2r",
        metadata={
            "help": "Which singular vectors go to A and B: `ArB2r`, `A2rBr`, `ArBr`, `random`; `gaussian` for none."
        },
    )
    ga_scale: str | None = field(
        default=None,
        metadata={
            "help": "Size of the factors: `matched` to full fine-tuning's first step, `stable` (the paper's), "
            "`unit` 1, `gd` 1/s, `weight_svd` or `gaussian`."
        },
    )
    ga_full_learning_rate: float = field(default=5e-5, metadata=FULL_LEARNING_RATE)
    ga_learning_rate: float | None = field(
        default=None,
        metadata={"help": "For the `matched` scale: the adapter's peak learning rate. Default: the trainer's."},
    )
    ga_gamma: float = field(
        default=16.0, metadata={"help": "gamma of the `stable` scale; larger values start from smaller factors."}
    )
    ga_offset: bool = field(
        default=True,
        metadata={
            "help": "Whether B starts at B0, with s·B0 A0 subtracted, as in the paper; else at zero, as in LoRA."
        },
    )
    ga_stage_rank: int | None = field(
        default=None,
        metadata={"help": "r of a stage that starts from a trained adapter, which is kept. Default: half of its rank."},
    )
    ga_restart_steps: int | None = field(
        default=None,
        metadata={"help": "Restart from a fresh gradient every this many steps. Default: never."},
    )
    ga_restart_warmup_steps: int = field(
        default=10, metadata={"help": "Steps over which the learning rate comes back after a restart."}
    )
    ga_seed: int = field(
        default=42,
        metadata={"help": "Draws the examples, the sketch's test matrices and the directions `random` and `gaussian`."},
    )

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if TrainingArguments in bases and bases.index(TrainingArguments) < bases.index(LoRAGAArguments):
            raise ValueError(
                f"In the bases of {cls.__name__} `LoRAGAArguments` comes after the trainer's configuration, so nothing "
                f"checks its options. Write `class {cls.__name__}(LoRAGAArguments, ...)`."
            )

    def __post_init__(self):
        self._check_integer("ga_num_samples", minimum=1, remedy="64 is the default, 16 a quick start")
        self._check_integer(
            "ga_batch_size", minimum=1, optional=True, remedy="leave it out to use half the training batch size"
        )
        remedy = "2 is the default, 1 the fastest, 1.25 a look at a quarter of the sample before one pass over all"
        self._check_number("ga_sketch_passes", minimum=1, remedy=remedy)
        self._check_integer("ga_sketch_size", minimum=2, optional=True, remedy="leave it out to use 2·r + 32")
        self._check_integer(
            "ga_stage_rank", minimum=1, optional=True, remedy="leave it out for half of the adapter's rank"
        )
        self._check_integer(
            "ga_restart_steps", minimum=1, optional=True, remedy="leave it out to start from the gradient only once"
        )
        self._check_integer("ga_restart_warmup_steps", minimum=0, remedy="10 is the default, 0 none")
        self._check_integer("ga_seed", minimum=0, remedy="42 is the default")
        if self.ga_seed > LARGEST_SEED:
            raise ValueError(f"`ga_seed` is {self.ga_seed}, but must be at most {LARGEST_SEED}. 42 is the default.")
        self._check_choice("ga_estimator", ESTIMATORS)
        self._check_choice("ga_direction", get_args(Direction))
        if self.ga_scale is not None:
            self._check_choice("ga_scale", get_args(Scale))
        if not isinstance(self.ga_offset, bool):
            raise ValueError(
                f"`ga_offset` is {self.ga_offset!r}, but must be True (the paper's form) or False (B from zero)."
            )
        if not self.ga_offset and self.ga_restart_steps is not None:
            raise ValueError(
                f"`ga_restart_steps` is {self.ga_restart_steps}, but `ga_offset` is False: a restart keeps what was trained "
                "beside a pair A0, B0 with its offset. Leave out one of the two."
            )
        self._check_number("ga_full_learning_rate", remedy="5e-5 is the default")
        if self.ga_learning_rate is not None:
            self._check_number("ga_learning_rate", remedy="leave it out to use that of the trainer")
        self._check_number("ga_gamma", remedy="16.0 is the default")
        if isinstance(self, TrainingArguments):
            super().__post_init__()  # type: ignore[misc]  # of the configuration after it in the bases

    @property
    def scale(self) -> Scale:
        """`ga_scale`, or its default."""
        default = "stable" if self.peak_learning_rate is None else "matched"
        return self.ga_scale or default  # type: ignore[return-value]  # checked above

    @property
    def peak_learning_rate(self) -> float | None:
        """`ga_learning_rate`, or the `learning_rate` of the trainer's configuration; None if there is neither."""
        if self.ga_learning_rate is None and isinstance(self, TrainingArguments):
            return self.learning_rate
        return self.ga_learning_rate

    def _check_integer(self, name: str, *, minimum: int, remedy: str, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least {minimum}; {remedy}.")

    def _check_number(self, name: str, *, remedy: str, minimum: float | None = None) -> None:
        value = getattr(self, name)
        if not is_number_above_zero(value) or (minimum is not None and value < minimum):
            rule = "above 0" if minimum is None else f"of at least {minimum}"
            raise ValueError(f"`{name}` is {value!r}, but must be a finite number {rule}; {remedy}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"`{name}` is {value!r}, but must be one of {', '.join(map(repr, choices))}.")


@dataclass
class LoRAGASeq2SeqConfig(LoRAGAArguments, Seq2SeqTrainingArguments):
    """transformers' `Seq2SeqTrainingArguments` and the `ga_*` fields of `LoRAGAArguments`.

    Raises:
        ValueError: a `ga_*` value is out of its range, or whatever `Seq2SeqTrainingArguments` raises.
    """


@dataclass
class LoRAGATrainingArguments(LoRAGAArguments, TrainingArguments):
    """transformers' `TrainingArguments` and the `ga_*` fields of `LoRAGAArguments`, for a `LoRAGAMixin` over a `Trainer`.

    Raises:
        ValueError: a `ga_*` value is out of its range, or whatever `TrainingArguments` raises.
    """


Config = TypeVar("Config", bound=TrainingArguments)


def with_ga_options(config_class: type[Config], args: TrainingArguments | None, model: Any) -> Config:
    """`args` as a `config_class`: unchanged if it is one, else its fields with the default `ga_*` options.

    Raises:
        ValueError: `args` is not a trainer's configuration, or has fields that `config_class` lacks.
    """
    if isinstance(args, config_class):
        return args
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return config_class(f"{name.split('/')[-1] or 'model'}-LoRA-GA")
    if not isinstance(args, TrainingArguments):
        raise ValueError(
            f"`args` is a {type(args).__name__}, but must be a configuration. Pass `{config_class.__name__}(output_dir=...)`."
        )
    # `to_dict` would hide every field that ends in "token", including `eos_token`
    values = {option.name: getattr(args, option.name) for option in fields(args) if option.init}
    unknown = values.keys() - {option.name for option in fields(config_class)}
    if unknown:
        raise ValueError(
            f"`args` is a {type(args).__name__} with the fields {sorted(unknown)}, which `{config_class.__name__}` does not "
            f"have. Derive your configuration from `{config_class.__name__}`."
        )
    return config_class(**values)
