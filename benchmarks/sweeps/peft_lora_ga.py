"""PEFT's own LoRA-GA as one more `--method` of the recipes, `peft_lora_ga`: what ours is compared with."""

import torch
from costs.models import TARGETS
from methods.table import STOCK, Method
from peft import LoraConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM
from trl import SFTTrainer


class PEFTLoRAGASFTTrainer(SFTTrainer):
    """`preprocess_loraga` on the first `ga_num_samples` shuffled examples, then PEFT's layers, then TRL as it is."""

    def __init__(self, model, args, train_dataset, processing_class, peft_config, **kwargs):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=args.model_init_kwargs["dtype"])
        sample = train_dataset.shuffle(seed=args.ga_seed).select(range(args.ga_num_samples))
        # a trainer of its own prepares the sample as the real one will
        stock = SFTTrainer(model, args, train_dataset=sample, eval_dataset=sample, processing_class=processing_class)
        batches = list(stock.get_train_dataloader())

        def train_step() -> None:
            model.train()
            for batch in batches:
                with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=args.bf16):
                    stock.compute_loss(model, batch).backward()

        preprocess_loraga(model, peft_config, train_step)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )


def adapter(r: int, target_modules: list[str], **shared) -> LoraConfig:
    return LoraConfig(
        r=r,
        use_rslora=True,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
        target_modules=TARGETS,
        **shared,
    )


PEFTS = {"peft_lora_ga": Method(STOCK._replace(causal=PEFTLoRAGASFTTrainer), adapter)}
"""What it saves does not fit the untouched base."""
