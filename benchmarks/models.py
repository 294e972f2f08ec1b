"""What the benchmarks of costs run on: a small real model, and layers in the shapes of a large one."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from demo_model import demo_model_path
from gsm_symbolic import gsm_symbolic
from metamath import to_prompt_completion

Batches = list[dict[str, Tensor]]

# All linear layers but the head, by name: PEFT's pre-pass of LoRA-GA finds no layer for "all-linear".
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_model_arguments(parser: ArgumentParser, layers: int) -> None:
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--layers", type=int, default=layers, help="of llama2-7b-shapes")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def make_model(args: Namespace, samples: int, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Batches]:
    """The model that the arguments name, in `dtype`, and `samples` examples in batches; both on the device."""
    model, batches = MODELS[args.model](args, samples, dtype)
    return model, [{name: value.to(args.device) for name, value in batch.items()} for batch in batches]


def smollm2(args: Namespace, samples: int, dtype: torch.dtype) -> tuple[PreTrainedModel, Batches]:
    """The real model and real problems, prompts masked out."""
    path = demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = gsm_symbolic(samples, seed=5).map(to_prompt_completion).to_list()
    batches = []
    for start in range(0, samples, args.batch_size):
        chunk = rows[start : start + args.batch_size]
        texts = [row["prompt"] + row["completion"] for row in chunk]
        batch = dict(
            tokenizer(
                texts,
                return_tensors="pt",
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=args.max_length,
            )
        )
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
        for labels, row in zip(batch["labels"], chunk, strict=True):
            labels[: len(tokenizer(row["prompt"])["input_ids"])] = -100
        batches.append(batch)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device), batches


def llama2_7b_shapes(args: Namespace, samples: int, dtype: torch.dtype) -> tuple[PreTrainedModel, Batches]:
    """Random weights in Llama-2-7B's layer shapes, random tokens; `--layers 32` is the whole model."""
    set_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=args.layers,
        vocab_size=32000,
    )
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tokens = torch.randint(0, 32000, (samples, args.max_length))
    return model, [{"input_ids": ids, "labels": ids} for ids in tokens.split(args.batch_size)]


MODELS = {"smollm2": smollm2, "llama2-7b-shapes": llama2_7b_shapes}


def lora_config(rank: int, **options) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=16, use_rslora=True, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
