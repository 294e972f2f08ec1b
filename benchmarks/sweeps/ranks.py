"""LoRA-GA with ranks from the gradient at equal parameters, as one more `--method` of the recipes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from methods.table import LORA_GA, METHODS, Method, lora
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTTrainer, initialize_lora_ga
from lora_ga_trainer.ranks import Spectrum, ranks_within

RATIO = 2
"""No layer gets more than this times the rank of the others' mean; EVA's ρ."""


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
        print("ranks", sorted(ranks.values()))
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


@contextmanager
def with_ranks() -> Iterator[None]:
    """While inside, `--method ranked` is one of the recipes' methods."""
    METHODS["ranked"] = Method(LORA_GA._replace(causal=RankedSFTTrainer), lora(use_rslora=True))
    METHODS["ranked_by_energy"] = Method(LORA_GA._replace(causal=EnergySFTTrainer), lora(use_rslora=True))
    try:
        yield
    finally:
        del METHODS["ranked"], METHODS["ranked_by_energy"]
