"""The scaling of an adapter, s = α/√r with rsLoRA and else α/r, and its plain form, which every reader computes.

PEFT and vLLM read `use_rslora`. Readers of α/r do not, and would be off by a factor of √r without a word. So a file says
`use_rslora=false` and an α with α/r = s, in the patterns too.
"""

import copy
import math
from collections.abc import Iterable
from statistics import mode
from typing import TypeVar

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ..adapter.weight import AdaptedWeight

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module in its files, but not in patterns."""

Number = TypeVar("Number", int, float)


def rank_of(config: LoraConfig, module: str) -> int:
    """The rank of a module, named as in the base model, as PEFT finds it."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)


def scaling_of(config: LoraConfig, module: str) -> float:
    """s of one module, as PEFT computes it: α/√r with rsLoRA, else α/r."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return _scaling(alpha, rank_of(config, module), config.use_rslora)


def _scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def plain_alpha(scale: float, rank: int) -> float:
    """The α for which α/rank in double precision is `scale` to the last bit; whole if a whole one is.

    The rounded product s·r is the α nearest to the exact one, so if any α gives s back, it does: no neighbour could do better.
    For some ranks that are no power of two, the numbers near s·r lie further apart than r times those near s, so that no α may
    meet s: then it is met but for one unit in the last place, far below what float32 tells apart.
    """
    product = scale * rank
    whole = round(product)
    return whole if abs(whole / rank - scale) <= abs(product / rank - scale) else product


def name_in_patterns(module: str) -> str:
    return module.removeprefix(PREFIX).replace(".base_layer", "")


def plain_form(config: LoraConfig, modules: Iterable[str], times: int = 1) -> LoraConfig:
    """`config` for a file of `times` its ranks and the same scalings in plain form.

    Args:
        modules: all that the adapter has, named as in the base model or in PEFT's files.
    """
    names = set(map(name_in_patterns, modules))
    ranks = {name: times * rank_of(config, name) for name in names}
    scalings = {name: scaling_of(config, name) for name in names}
    return with_form(config, times * config.r, ranks, scalings)


def form_of(config: LoraConfig, weights: dict[str, AdaptedWeight], ranks: dict[str, int]) -> LoraConfig:
    """`config` for the `weights` of a model at these `ranks`, both by name, with their scalings in plain form."""
    keys = {name: name_in_patterns(weight.key) for name, weight in weights.items()}
    return with_form(
        config,
        mode(ranks.values()),
        {keys[name]: rank for name, rank in ranks.items()},
        {keys[name]: weight.scaling for name, weight in weights.items()},
    )


def with_form(config: LoraConfig, r: int, ranks: dict[str, int], scalings: dict[str, float]) -> LoraConfig:
    """`config` for a file with these ranks and scalings of its modules, in plain form. `r` is the rank that most have."""
    form = copy.deepcopy(config)
    form.use_rslora = False
    form.r, form.lora_alpha = r, plain_alpha(_scaling(config.lora_alpha, config.r, config.use_rslora), r)
    form.rank_pattern = pattern(ranks, r)
    alphas = {name: plain_alpha(scalings[name], rank) for name, rank in ranks.items()}
    form.alpha_pattern = pattern(alphas, form.lora_alpha)
    return form


def pattern(values: dict[str, Number], default: Number) -> dict[str, Number]:
    """PEFT's pattern for values by module: what differs from the `default`, by a last name that tells, else by the whole name.

    >>> pattern({"layers.0.k_proj": 2, "layers.1.k_proj": 2, "layers.0.v_proj": 4, "layers.1.v_proj": 3}, 4)
    {'k_proj': 2, '^layers.1.v_proj': 3}
    """
    by_last_name: dict[str, set[Number]] = {}
    for name, value in values.items():
        by_last_name.setdefault(name.rpartition(".")[2], set()).add(value)
    found = {}
    for name, value in sorted(values.items()):
        last = name.rpartition(".")[2]
        if value != default:
            found[last if len(by_last_name[last]) == 1 else f"^{name}"] = value
    return found
