"""Ranks where the gradient wants them: equal parameters, other ranks per layer.

With its first step a LoRA-GA of rank k follows the first 2k singular pairs of the gradient G (paper section 3.2), which hold a
share of (σ₁² + … + σ₂ₖ²) / ‖G‖² of it, one that grows by less and less with k. So the k-th rank of a layer is worth

    (σ²₂ₖ₋₁ + σ²₂ₖ) / ‖G‖²  for O + I parameters

and a budget buys most if it always goes to the layer where the next rank is worth most for each parameter. Shares and not the
gradients' own sizes count, because Adam moves every layer by the same rate, however large its gradient is.
"""

import heapq
from collections.abc import Mapping
from typing import NamedTuple


class Spectrum(NamedTuple):
    """What a layer's gradient is known by."""

    singular_values: list[float]
    """The leading ones, descending."""
    gradient_norm: float
    parameters_per_rank: int
    """O + I"""


def ranks_within(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int]:
    """The rank of each layer, at least 1 and at most half of its known singular values, for a `budget` of parameters.

    Raises:
        ValueError: the budget does not reach for rank 1 in all layers.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = budget - sum(layer.parameters_per_rank for layer in spectra.values())
    if left < 0:
        raise ValueError(
            f"`budget` is {budget:,} parameters, but rank 1 in all {len(spectra)} layers takes {budget - left:,}. Raise it, or "
            "target fewer layers."
        )
    waiting = [(-_worth(layer, 2), name) for name, layer in spectra.items()]
    heapq.heapify(waiting)
    while waiting:
        worth, name = heapq.heappop(waiting)
        layer = spectra[name]
        if worth == 0 or layer.parameters_per_rank > left:
            continue  # a smaller layer may still fit
        ranks[name] += 1
        left -= layer.parameters_per_rank
        heapq.heappush(waiting, (-_worth(layer, ranks[name] + 1), name))
    return ranks


def _worth(layer: Spectrum, rank: int) -> float:
    """Of the step from `rank` − 1 to `rank`, for each parameter; 0 where no singular values are known."""
    pair = layer.singular_values[2 * rank - 2 : 2 * rank]
    if len(pair) < 2 or not layer.gradient_norm:
        return 0.0
    return sum(value**2 for value in pair) / layer.gradient_norm**2 / layer.parameters_per_rank
