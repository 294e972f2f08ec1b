"""One initialization, measured in this process and its siblings, and how what was found grows along an axis."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from costs.models import llama_shape, lora_config, random_llama
from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.distributed.backends import gather_objects, rank, world_size
from lora_ga_trainer.gradient.estimation import Accumulator, make_accumulator

OPTIONS = LoRAGAArguments(ga_learning_rate=1e-3)


@dataclass(frozen=True)
class Point:
    """One initialization."""

    samples: int
    width: int
    layers: int
    rank: int
    batch_size: int
    length: int
    """Tokens per sample."""
    processes: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        return (
            f"{self.samples} samples of {self.length} tokens in batches of {self.batch_size}, width {self.width}, "
            f"{self.layers} layers, rank {self.rank}, processes {self.processes}, {self.device}"
        )


@dataclass(frozen=True)
class Plan:
    """A base point, and the values that its quantities take one at a time."""

    base: Point
    values: dict[str, list[int]]

    def points(self, axis: str) -> dict[int, Point]:
        return {value: replace(self.base, **{axis: value}) for value in self.values[axis]}


def measure(point: Point, device: torch.device) -> dict[str, Any]:
    """What this process, together with its siblings, finds."""
    shape = llama_shape(point.width, point.layers) | {"max_position_embeddings": point.length}
    model, batches = random_llama(shape, point.samples, point.length, point.batch_size, torch.float32, device)
    batches = batches[rank() :: world_size()]
    # Once before, on one batch: kernels and thread buffers that any first use loads are no cost of an initialization.
    warm = get_peft_model(model, lora_config(point.rank))
    initialize_lora_ga(warm, batches[:1], OPTIONS, disable_tqdm=True)
    model = get_peft_model(warm.unload(), lora_config(point.rank))
    report = initialize_lora_ga(model, batches, OPTIONS, disable_tqdm=True)

    peaks = gather_objects(report.extra_peak_bytes)
    return {
        "seconds": max(gather_objects(report.seconds)),
        "extra_peak_bytes": None if None in peaks else max(peaks),
        "all_reduced_bytes": report.all_reduced_bytes,
        **held_bytes(model),
    }


def held_bytes(model: PeftModel) -> dict[str, int]:
    """What the accumulators of all layers hold in the first pass, the largest, and what the gradients would take."""
    weights = model.lora_ga.weights.values()
    accumulators = [make_accumulator(weight, OPTIONS) for weight in weights]
    gradient = sum(weight.layer.get_base_layer().weight.nbytes for weight in weights)  # as large, both float32
    return {"sketch_bytes": bytes_of(accumulators), "gradient_bytes": gradient}


def bytes_of(accumulators: list[Accumulator]) -> int:
    """What they hold; a matrix that sketches share counts once."""
    tensors = [value for acc in accumulators for value in vars(acc).values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def power_law(xs: Iterable[float], ys: Iterable[float]) -> tuple[float, float] | None:
    """(p, c) of y = c·x^p, by least squares on the logarithms; None if there are no two points, or a y that has none."""
    xs, ys = list(xs), list(ys)
    if len(xs) < 2 or not all(ys):
        return None
    p, log_c = np.polyfit(np.log(xs), np.log(ys), 1)
    return float(p), float(np.exp(log_c))


@dataclass(frozen=True)
class Curve:
    """One quantity along one axis."""

    xs: list[int]
    repeats: list[list[float | None]]
    """For each x the repeats' values; None where the platform cannot measure it."""

    @property
    def medians(self) -> list[float | None]:
        return [None if None in ys else statistics.median(ys) for ys in self.repeats]

    @property
    def fitted_xs(self) -> list[int]:
        """From the middle value up, where what does not grow weighs least; of two values both."""
        return self.xs[(len(self.xs) - 1) // 2 :]

    @property
    def fit(self) -> tuple[float, float] | None:
        """(p, c) of the medians at `fitted_xs`."""
        return power_law(self.fitted_xs, self.medians[-len(self.fitted_xs) :])


def curve(runs: dict[int, list[dict[str, Any]]], quantity: str) -> Curve:
    return Curve(list(runs), [[run[quantity] for run in repeats] for repeats in runs.values()])
