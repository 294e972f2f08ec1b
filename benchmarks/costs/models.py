"""What costs are measured on: a small real model, and random weights in the shapes of Llamas of any size."""

import importlib.util
from argparse import ArgumentParser, Namespace

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, set_seed

Batches = list[dict[str, Tensor]]

# All linear layers but the head, by name: PEFT's pre-pass of LoRA-GA finds no layer for "all-linear".
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
SHAPES = {
    "smollm2-shapes": SMOLLM2,
    "llama2-7b-shapes": LLAMA2_7B,
    # a tenth of the layers and of the width, to try a benchmark out
    "smollm2-tenth": SMOLLM2
    | {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 4915}
    | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "llama2-7b-tenth": LLAMA2_7B
    | {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 3, "vocab_size": 3200},
}
"""Fields of a `LlamaConfig`. Those of Llama-2-7B leave the number of layers to `--layers`; 32 is the whole model."""


def add_model_arguments(parser: ArgumentParser, layers: int, dtype: str = "float32") -> None:
    parser.add_argument("--model", choices=["smollm2", *SHAPES], default="smollm2")
    parser.add_argument("--layers", type=int, default=layers, help="of llama2-7b-shapes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=dtype)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def make_model(args: Namespace, samples: int) -> tuple[PreTrainedModel, Batches]:
    """The model that the arguments name, in `args.dtype`, and `samples` examples in batches; both on the device."""
    dtype = getattr(torch, args.dtype)
    if args.model == "smollm2":
        return smollm2(args, samples, dtype)
    shape = {"num_hidden_layers": args.layers} | SHAPES[args.model]
    return random_llama(shape, samples, args.max_length, args.batch_size, dtype, args.device)


def missing_weights() -> str | None:
    """What keeps SmolLM2's weights from being used, or None."""
    from data.demo_model import demo_model_path

    try:
        demo_model_path()
    except ImportError as error:
        return str(error).splitlines()[0]
    return None


def missing_for_smollm2() -> str | None:
    """What keeps the real SmolLM2 and its word problems from being used, or None."""
    if importlib.util.find_spec("reasoning_gym") is None:
        return "reasoning-gym is not installed"
    return missing_weights()


def smollm2(args: Namespace, samples: int, dtype: torch.dtype) -> tuple[PreTrainedModel, Batches]:
    """The real model and real problems, prompts masked out."""
    # here, since they import TRL, which random weights do not need
    from data.demo_model import demo_model_path
    from data.gsm_symbolic import gsm_symbolic
    from metamath import to_prompt_completion

    path = demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": args.max_length}
    rows = gsm_symbolic(samples, seed=5).map(to_prompt_completion).to_list()
    batches = []
    for start in range(0, samples, args.batch_size):
        chunk = rows[start : start + args.batch_size]
        batch = tokenizer([row["prompt"] + row["completion"] for row in chunk], return_tensors="pt", **options)
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
        for labels, row in zip(batch["labels"], chunk, strict=True):
            labels[: len(tokenizer(row["prompt"])["input_ids"])] = -100
        batches.append(dict(batch.to(args.device)))
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device), batches


def llama_shape(width: int, layers: int) -> dict[str, int]:
    """Llama-2-7B's proportions at another size; few words, so that the head, which is no target, does not decide the memory."""
    return {
        "hidden_size": width,
        "intermediate_size": round(11 / 4 * width / 64) * 64,
        "num_attention_heads": width // 64,
        "num_hidden_layers": layers,
        "vocab_size": 1000,
    }


def random_llama(
    shape: dict[str, int], samples: int, length: int, batch_size: int, dtype: torch.dtype, device: str | torch.device
) -> tuple[PreTrainedModel, Batches]:
    """Random weights in the shape, fields of a `LlamaConfig`, and random tokens, `length` a sample, in batches."""
    set_seed(0)
    config = LlamaConfig(**shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tokens = torch.randint(0, config.vocab_size, (samples, length)).to(device)
    return model, [{"input_ids": ids, "labels": ids} for ids in tokens.split(batch_size)]


def lora_config(rank: int, **options) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=16, use_rslora=True, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
