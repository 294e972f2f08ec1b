"""LoRA-GA with ranks from the gradient, at equal parameters, as more `--method`s of the recipes: `ranked`, `ranked_by_energy`.

With its first step a LoRA-GA of rank k follows the first 2k singular pairs of the gradient G (paper section 3.2), which hold a
share of (σ₁² + … + σ₂ₖ²) / ‖G‖² of it, one that grows by less and less with k. So the k-th rank of a layer is worth

    (σ²₂ₖ₋₁ + σ²₂ₖ) / ‖G‖²  for O + I parameters        (`ranked`; `ranked_by_energy` leaves out ‖G‖²)

and a budget buys most if it always goes to the layer where the next rank is worth most for each parameter.
"""

import heapq
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from methods.table import LORA_GA, Method, lora
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTTrainer, initialize_lora_ga

RATIO = 2
"""No layer gets more than this times the rank of the others' mean; EVA's ρ."""


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


class RankedSFTTrainer(LoRAGASFTTrainer):
    """Estimates at `RATIO` times the rank, allots the parameters of the rank, attaches, and estimates again."""

    by_share = True

    def __init__(self, model, args, train_dataset, processing_class, peft_config, **kwargs):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=args.model_init_kwargs["dtype"])
        sample = train_dataset.shuffle(seed=args.ga_seed).select(range(args.ga_num_samples))
        stock = SFTTrainer(model, args, train_dataset=sample, eval_dataset=sample, processing_class=processing_class)

        def loss(model, batch, num_items):
            items = batch["labels"][..., 1:].ne(-100).sum()
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=args.bf16):
                return stock.compute_loss(model, batch) * (items / num_items)

        probe = get_peft_model(model, replace(peft_config, r=RATIO * peft_config.r))
        options = LoRAGAArguments(ga_estimator="exact", ga_scale="unit")
        report = initialize_lora_ga(probe, list(stock.get_train_dataloader()), options, loss)
        weights = probe.lora_ga.weights
        spectra = {
            name: Spectrum(
                values,
                report.gradient_norm[name] if self.by_share else 1.0,
                weights[name].out_features + weights[name].in_features,
            )
            for name, values in report.singular_values.items()
        }
        ranks = ranks_within(spectra, peft_config.r * sum(layer.parameters_per_rank for layer in spectra.values()))
        pattern = {f"^{name.removeprefix('base_model.model.')}": rank for name, rank in ranks.items()}
        super().__init__(
            probe.unload(),
            args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=replace(peft_config, rank_pattern=pattern),
            **kwargs,
        )


class EnergySFTTrainer(RankedSFTTrainer):
    by_share = False


RANKED = {
    name: Method(LORA_GA._replace(causal=trainer), lora(use_rslora=True))
    for name, trainer in {"ranked": RankedSFTTrainer, "ranked_by_energy": EnergySFTTrainer}.items()
}
