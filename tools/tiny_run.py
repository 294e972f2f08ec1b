"""The installed package at work: imports everything public and initializes a tiny model. Prints where it was imported from.

Run it from elsewhere than the repository, as `python -P tools/tiny_run.py`, so that what is installed is what is found.
"""

import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import lora_ga_trainer

for name in lora_ga_trainer.__all__:
    getattr(lora_ga_trainer, name)

torch.manual_seed(0)
base = AutoModelForCausalLM.from_config(
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
)
lora = LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules="all-linear")
model = get_peft_model(copy.deepcopy(base), lora)
tokens = torch.randint(0, 50, (8, 12))
batches = [{"input_ids": ids, "labels": ids} for ids in tokens.split(4)]

report = lora_ga_trainer.initialize_lora_ga(
    model, batches, lora_ga_trainer.LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True
)
if not (all(0 < value <= 1.001 for value in report.alignment.values()) and len(report.alignment) == 7):
    sys.exit(f"error: 7 layers should be aligned, found {report.alignment}")
if not torch.equal(model(input_ids=tokens).logits, base(input_ids=tokens).logits):
    sys.exit("error: the initialized model does not compute the base function")
print(lora_ga_trainer.__version__, lora_ga_trainer.__file__)
