"""The model that an evaluation asks: an untouched base, and an ordinary adapter on it."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .results import weights_digest


def load(base: str, revision: str, adapter: str | None, dtype: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """(model in eval mode on this process's device, tokenizer), through stock transformers and PEFT.

    Raises:
        ValueError: the base or the adapter cannot be found.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` is {dtype!r}, but must be 'auto', 'float32', 'bfloat16' or 'float16'.")
    own_code_only: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": False,
    }  # left out, transformers would ask on a terminal
    try:
        kind = (
            AutoModelForSeq2SeqLM
            if AutoConfig.from_pretrained(base, **own_code_only).is_encoder_decoder
            else AutoModelForCausalLM
        )
        model = kind.from_pretrained(base, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **own_code_only)
    except (OSError, ValueError) as error:
        raise ValueError(f"`base` is {base}, but no model can be loaded from there ({error}).") from error
    tokenizer_of, at = base, own_code_only
    if adapter is not None:
        try:
            rows = resized_vocabulary(adapter, model)
            if rows is not None:
                model.resize_token_embeddings(rows)
                tokenizer_of, at = adapter, {"trust_remote_code": False}
            model = PeftModel.from_pretrained(model, adapter)
        except (OSError, ValueError) as error:
            raise ValueError(f"`adapter` is {adapter}, but no adapter can be loaded from there ({error}).") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_of, **at)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer can be loaded from {tokenizer_of} ({error}). Save it there.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(PartialState().device).eval(), tokenizer


def resized_vocabulary(adapter: str, model: PreTrainedModel) -> int | None:
    """How many rows the embeddings in the adapter's files have, if they are more or fewer than the base model's."""
    PeftConfig.from_pretrained(adapter)  # says plainly where no adapter is
    embeddings: Any = model.get_input_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is embeddings]
    held = load_peft_weights(adapter, device="cpu").get(f"base_model.model.{name}.weight", embeddings.weight)
    return len(held) if len(held) != len(embeddings.weight) else None


def model_settings(base: str, revision: str, adapter: str | None, dtype: str) -> dict[str, Any]:
    """What tells one model from another: names, and for local folders what is in their weights."""
    folders = {"base": base, "adapter": adapter}
    digests = {
        f"{role}_weights": weights_digest(Path(folder))
        for role, folder in folders.items()
        if folder and Path(folder).is_dir()
    }
    return folders | digests | {"revision": revision, "dtype": dtype}
