"""The gradient of every adapted weight, summed while the batches stream by."""

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..adapter.adapter import LoRAGAAdapter
from ..adapter.weight import AdaptedParameter, AdaptedWeight
from ..arguments import LoRAGAArguments
from ..distributed.backends import failing_together, rank, sum_over_processes, world_size
from .accumulator import HELD_OUT_COLUMNS, ExactGradient, ExpertGradients, ExpertSketches, GradientSketch
from .objective import Objective
from .probe import gradient_probe

Accumulator = ExactGradient | GradientSketch

logger = logging.getLogger(__name__)

IN_A_MESSAGE = 10
"""The most names of layers in an error; a longer list goes to the log."""
SKETCH_OVERSAMPLING = 32
"""K − 2r. Real gradients have slowly falling spectra: with 32 spare directions 2 passes reach 0.999 of the exact alignment in
the mean over the layers of SmolLM2-135M at r = 8, and the sketch takes under 5 % of the gradients of Llama-2-7B."""
EXPERT_OVERSAMPLING = 8
"""The same for the experts of a mixture, which are many and small: the sketches of Qwen3-30B-A3B at r = 8 take 14 % of its
experts' bytes in 16 bits, where 32 would take a quarter."""
SMALLEST_SHARE = 0.1
"""Of the targets, how many must get a gradient. A model of pictures, sound and text that is trained on text alone leaves idle
two towers and more (the picture tower of PaliGemma has 56 % of its linear layers); where fewer than one target in ten gets a
gradient the loss, the sample or the targets are wrong."""


def sketch_width(weight: AdaptedWeight, config: LoRAGAArguments) -> int:
    """K for one weight: `ga_sketch_size` or 2·r + 32 (2·r + 8 for experts)."""
    oversampling = SKETCH_OVERSAMPLING if weight.experts == 1 else EXPERT_OVERSAMPLING
    return config.ga_sketch_size or 2 * weight.rank + oversampling


def check_sketch_size(name: str, rank: int, config: LoRAGAArguments) -> None:
    """
    Raises:
        ValueError: `ga_sketch_size` is under twice the `rank` of the weight `name`.
    """
    if config.ga_sketch_size is not None and config.ga_sketch_size < 2 * rank:
        raise ValueError(
            f"`ga_sketch_size` is {config.ga_sketch_size}, but must be at least 2·r = {2 * rank} for {name}: LoRA-GA takes 2·r "
            "singular vectors from the sketch. Raise it, or leave it out to use 2·r + 32."
        )


def make_accumulator(weight: AdaptedWeight, config: LoRAGAArguments) -> Accumulator:
    """The accumulator that `config` asks for; the exact gradient also where a sketch would be hardly smaller.

    All sketches of a seed share their Gaussian matrices.
    """
    O, I = weight.out_features, weight.in_features
    is_parameter = isinstance(weight, AdaptedParameter)
    if not is_sketched(weight, config):
        return (
            ExpertGradients(weight.experts, O, I, weight.device) if is_parameter else ExactGradient(O, I, weight.device)
        )
    seed, width = derived_seed("sketch", config.ga_seed), sketch_width(weight, config)
    sketch = (O, I, width, config.ga_sketch_passes, seed, weight.device, basis_dtype(weight))
    return ExpertSketches(weight.experts, *sketch) if is_parameter else GradientSketch(*sketch)


def is_sketched(weight: AdaptedWeight, config: LoRAGAArguments) -> bool:
    O, I = weight.out_features, weight.in_features
    return config.ga_estimator == "sketch" and 2 * sketch_width(weight, config) * (O + I) < O * I


def basis_dtype(weight: AdaptedWeight) -> torch.dtype:
    """float32 where the weight is, whatever autocast makes of x and dy. A quantized layer computes in 16 bits, and need not
    have a parameter."""
    is_float32 = any(parameter.dtype == torch.float32 for parameter in weight.layer.get_base_layer().parameters())
    return torch.float32 if is_float32 else torch.bfloat16


def accumulator_bytes(weight: AdaptedWeight, config: LoRAGAArguments) -> int:
    """The most that the accumulator of `weight` holds while batches stream by, without what it shares with others."""
    E, O, I = weight.experts, weight.out_features, weight.in_features
    if not is_sketched(weight, config):
        return 4 * E * O * I
    K, in_basis = sketch_width(weight, config), basis_dtype(weight).itemsize
    first_pass = 4 * (O * (K + HELD_OUT_COLUMNS) + I * K)
    later_passes = (4 + in_basis) * K * (O + I) + in_basis * O * HELD_OUT_COLUMNS
    after_a_look = later_passes + (4 * O + in_basis * I) * HELD_OUT_COLUMNS
    if config.ga_sketch_passes == 1:
        return E * first_pass
    return E * (after_a_look if config.ga_sketch_passes % 1 else later_passes)


def derived_seed(purpose: str, seed: int) -> int:
    """A seed for one purpose that does not depend on process or device, nor meets a model's or a data set's own seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")


def estimate_gradients(
    adapter: LoRAGAAdapter, accumulators: dict[str, Accumulator], objective: Objective, disable_tqdm: bool = True
) -> list[int]:
    """Fill `accumulators` with the gradient of the `objective` at the current function.

    Returns:
        for each pass, the look included, the bytes that this process put into the all-reduce of its sums.

    Raises:
        ValueError: on all processes, if the loss of one is not finite, or a weight's gradient is not, or so few weights get
            one that the sample, the loss or the targets must be wrong.
    """
    most = max(accumulator.passes for accumulator in accumulators.values())
    passes, look = int(most), most % 1
    shares = ([look] if look else []) + [1.0] * passes
    bytes_of_passes = []
    process = f", process 1 of {world_size()}" if world_size() > 1 else ""
    total = sum(map(objective.num_examples, shares))
    with tqdm(total=total, disable=disable_tqdm, unit=" samples", desc="LoRA-GA gradient") as progress:
        for number, share in enumerate(shares, start=0 if look else 1):
            step = f"pass {number} of {passes}" if number else "first look"
            progress.set_description(f"LoRA-GA gradient, {step}{process}")
            summing = {
                name: acc for name, acc in accumulators.items() if (acc.passes >= number if number else acc.passes % 1)
            }
            # all are tapped in every pass, so that what the loss depends on is the same in all of them
            receivers = {name: acc.add if name in summing else _ignore for name, acc in accumulators.items()}
            with gradient_probe(adapter, receivers) as backward:
                for loss, examples in objective.losses(share):
                    backward(loss)
                    progress.update(examples)
            bytes_of_passes.append(_finish_sums(summing, objective.loss_scale))
            _check_finite(summing)
            if number == 1:  # a look may miss what all of the sample reaches, and later passes see fewer weights
                _check_reached(summing)
            with failing_together():
                for accumulator in summing.values():
                    accumulator.end_pass()
    return bytes_of_passes


def _finish_sums(accumulators: dict[str, Accumulator], scale: float) -> int:
    """Sum a pass over processes and undo the `scale` of the loss; returns the bytes all-reduced.

    No reference to the sums may outlive it: the next pass makes its own, and there is memory for one set.
    """
    sums = [total for accumulator in accumulators.values() for total in accumulator.sums()]
    all_reduced_bytes = sum_over_processes(sums)
    for total in sums:
        total.div_(scale)
    return all_reduced_bytes


def whole_list(names: list[str]) -> str:
    """All of `names`, which somebody is to copy; in the log if they are many, once for all processes."""
    if len(names) <= IN_A_MESSAGE:
        return ", ".join(names)
    if rank() == 0:
        logger.error("\n".join(names))
    return f"{', '.join(names[:3])} and {len(names) - 3} more, all of which are in the log"


def _ignore(*_: Any) -> None:
    """The receiver of a weight whose gradient is known already."""


def _without(condition: Callable[[Tensor], Tensor], accumulators: dict[str, Accumulator]) -> list[str]:
    """The names of the accumulators with a sum that fails the `condition`."""
    # all layers' answers wait for the accelerator once; a model may be split over several
    answers = [torch.stack([condition(total) for total in acc.sums()]).all() for acc in accumulators.values()]
    met = torch.stack([answer.to(answers[0].device) for answer in answers]).tolist()
    return [name for name, is_met in zip(accumulators, met, strict=True) if not is_met]


def _check_finite(accumulators: dict[str, Accumulator]) -> None:
    infinite = _without(lambda total: total.isfinite().all(), accumulators)
    if infinite:
        raise ValueError(
            f"{len(infinite)} of {len(accumulators)} target layers get a gradient with NaN or Inf: {whole_list(infinite)}. "
            "LoRA-GA cannot initialize them: leave them out with `LoraConfig(exclude_modules=...)`, load the model in a wider "
            "dtype (bf16 or fp32 instead of fp16), or estimate on other samples (`ga_seed`)."
        )


def _check_reached(accumulators: dict[str, Accumulator]) -> None:
    """Single weights without a gradient start as in LoRA, see `factors`; too many of them are a mistake."""
    idle = _without(Tensor.any, accumulators)
    if len(accumulators) - len(idle) < SMALLEST_SHARE * len(accumulators):
        raise ValueError(
            f"{len(idle)} of {len(accumulators)} target layers get no gradient (it is exactly zero): {whole_list(idle)}. "
            f"LoRA-GA needs one for {SMALLEST_SHARE:.0%} of its targets at least. Check that the forward pass uses them and "
            "that the loss depends on them, name others in `target_modules`, or estimate on other or more samples "
            "(`ga_num_samples`)."
        )
