"""Every layer's gradient factored on one process, its A0 and B0 written on all.

Shapes: O out features, I in features, R LoRA rank, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter.adapter import LoRAGAAdapter
from ..adapter.quantized import dequantized_weight
from ..adapter.weight import AdaptedWeight
from ..arguments import LoRAGAArguments
from ..distributed.backends import broadcast, failing_together, full_tensor, is_sharded, owners_by_cost, rank
from ..factors import Factors, LearningRates, leading_singular_values, lora_ga_factors, scale_factors, stacked
from ..gradient.estimation import Accumulator, derived_seed
from ..report import ExpertCounts, LayerReport


def write_all_factors(
    adapter: LoRAGAAdapter,
    accumulators: dict[str, Accumulator],
    config: LoRAGAArguments,
    learning_rates: dict[str, LearningRates],
) -> dict[str, LayerReport]:
    """Factor every gradient once, on one process each, and write the factors on all. Empties `accumulators`.

    Nothing is written before all factors have been found. At a restart what each weight's pair has learned is frozen before.

    Returns:
        what there is to tell of each layer.
    """
    owners = owners_by_cost({name: sum(total.numel() for total in acc.sums()) for name, acc in accumulators.items()})
    mine = {name for name, owner in owners.items() if owner == rank()}
    weights_s = weight_spectra(adapter, mine, config) if config.scale == "weight_svd" else {}
    found: dict[str, FoundFactors] = {}
    with failing_together():
        for name, weight in adapter.weights.items():
            accumulator = accumulators.pop(name)  # so that each gradient is freed in turn
            if name in mine:
                try:
                    found[name] = factor_gradient(
                        weight, accumulator, config, learning_rates.get(name), weights_s.pop(name, None)
                    )
                except torch.linalg.LinAlgError as error:
                    raise ValueError(
                        f"The gradient of {name} cannot be factored ({error}). Estimate on other or more samples."
                    ) from error

    numbers = {}
    for name, weight in adapter.weights.items():
        E, R, O, I, device = weight.experts, weight.rank, weight.out_features, weight.in_features, weight.device
        flat = torch.zeros(E * (R * I + O * R) + 5 + 2 * R, device=device, dtype=torch.float32)
        if name in found:
            factors, *counts = found.pop(name)
            five = torch.tensor(
                [factors.alignment, factors.gradient_norm, factors.scale, *counts], device=device, dtype=torch.float32
            )
            parts = [factors.a_RI.flatten(), factors.b_OR.flatten(), five, factors.singular_values_K]
            torch.cat(parts, out=flat[: sum(map(len, parts))])
        broadcast(flat, source=owners[name])
        a, b, of_report = flat.split([E * R * I, E * O * R, 2 * R + 5])
        if adapter.is_initialized:
            weight.freeze_trained()
        weight.write_factors(a.view(E, R, I), b.view(E, O, R))
        numbers[name] = of_report.clone()  # read below: reading would wait for the device, layer by layer
    reports = {}
    for name, of_report in numbers.items():
        layer_alignment, gradient_norm, scale, idle, thin, *singular_values = of_report.tolist()
        pairs = [value for value in singular_values if value]  # 2R, or as many as there are
        experts = ExpertCounts(adapter.weights[name].experts, int(idle), int(thin))
        reports[name] = LayerReport(layer_alignment, pairs, gradient_norm, scale, experts)
    return reports


class FoundFactors(NamedTuple):
    """Of all experts of one weight."""

    factors: Factors
    idle: int
    """How many have no gradient."""
    thin: int
    """How many others have fewer than 2R singular pairs."""


def weight_spectra(adapter: LoRAGAAdapter, mine: set[str], config: LoRAGAArguments) -> dict[str, Tensor]:
    """The R leading singular values of W, dequantized, for the weights that this process factors; of experts those of all.

    Sharded weights are gathered one after another, so that no two ever stand on a process; all take part. The owner's
    thin products are quick, so that the others hardly wait.

    Raises:
        RuntimeError: on all processes, if one of them ran out of memory or found no singular values.
    """
    found: dict[str, Tensor] = {}
    problem: RuntimeError | None = None
    for name, weight in adapter.weights.items():
        if name not in mine and not any(map(is_sharded, weight.layer.get_base_layer().parameters())):
            continue
        W = full_tensor(dequantized_weight(weight))
        if name in mine and problem is None:
            generator = torch.Generator("cpu").manual_seed(derived_seed(f"{name}/weight", config.ga_seed))
            matrices = W if W.dim() == 3 else [W]
            try:
                found[name] = torch.stack([leading_singular_values(W, weight.rank, generator) for W in matrices])
            except RuntimeError as error:
                problem = error
    with failing_together():
        if problem is not None:
            raise problem
    return found


def factor_gradient(
    weight: AdaptedWeight,
    accumulator: Accumulator,
    config: LoRAGAArguments,
    learning_rates: LearningRates | None = None,
    weight_s: Tensor | None = None,
) -> FoundFactors:
    """A0 (E×R×I) and B0 (E×O×R) of one weight, float32; see `factors` for the formulas.

    `learning_rates`, those of A and B, are for `matched` only; `weight_s`, the leading singular values of W, for `weight_svd`.
    """
    scales = scale_factors(
        config.scale,
        out_features=weight.out_features,
        in_features=weight.in_features,
        rank=weight.rank,
        scaling=weight.scaling,
        offset=config.ga_offset,
        gamma=config.ga_gamma,
        full_learning_rate=config.ga_full_learning_rate,
        learning_rates=learning_rates,
        weight_singular_values=lambda: weight_s,  # type: ignore[arg-type, return-value]  # not None where it is called
    )
    generator = torch.Generator("cpu").manual_seed(derived_seed(f"{weight.name}/direction", config.ga_seed))
    each = [
        lora_ga_factors(
            matrix.triplets(2 * weight.rank),
            weight.rank,
            config.ga_direction,  # type: ignore[arg-type]  # LoRAGAArguments has checked it
            scales,
            generator,
            matrix.rounding,
        )
        for matrix in accumulator.matrices()
    ]
    pairs = [len(factors.singular_values_K) for factors in each]
    idle, thin = pairs.count(0), sum(0 < count < 2 * weight.rank for count in pairs)
    return FoundFactors(stacked(each, weight.rank), idle, thin)
