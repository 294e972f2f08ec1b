"""llama.cpp reads what is saved and exported, and computes with it what PEFT computes.

Skipped, unless LLAMA_CPP names the source distribution of llama-cpp-python, unpacked and built as
`tools/llama_cpp_reads.py` says:

    LLAMA_CPP=llama_cpp_python-0.3.36 python -m pytest tests/readers
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from data.demo_model import demo_model_path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.checkpoint import export

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from llama_cpp_reads import (
    PROMPTS,
    Reading,
    convert_for,
    read_with_llama_cpp,
    read_with_transformers,
    rms,
    same_tokens,
)

pytestmark = [
    pytest.mark.reader,
    pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP does not name a built llama.cpp"),
]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """SmolLM2, and an adapter of a few steps in every form."""
    work, base = tmp_path_factory.mktemp("forms"), demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), config)
    batch = tokenizer("Q: What is 2 + 3?\nA: The wanted sum is 2 + 3 = 5.", return_tensors="pt")
    batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    arguments = LoRAGAArguments(ga_scale="stable", ga_estimator="exact")
    initialize_lora_ga(model, [batch], arguments, disable_tqdm=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for _ in range(4):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(work / "saved")
    export(work / "saved", work / "folded", fold_scale=True)
    export(work / "saved", work / "merged", merge=True, base_model=base)
    export(work / "saved", work / "small", rank=8, fold_scale=True)
    export(work / "saved", work / "rslora")  # and the configuration that 0.1.0 wrote
    path = work / "rslora/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16 * 2**0.5, "use_rslora": True}))
    return {"base": Path(base)} | {path.name: path for path in work.iterdir()}


@pytest.fixture(scope="module")
def read(folders, tmp_path_factory):
    """(what llama.cpp, what transformers and PEFT make of a form)."""
    work, llama_cpp = tmp_path_factory.mktemp("gguf"), Path(os.environ["LLAMA_CPP"])
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]

    def both(form: str) -> tuple[list[Reading], list[Reading]]:
        files = convert_for(llama_cpp, folders["base"], folders[form], work)
        expected = read_with_transformers(folders["base"], folders[form], prompts, NEW_TOKENS)
        return read_with_llama_cpp(llama_cpp, files, prompts, NEW_TOKENS), expected

    return both


@pytest.fixture(scope="module")
def of_base(read):
    return read("base")


@pytest.mark.parametrize("form", ["saved", "folded", "merged", "small"])
def test_it_computes_what_peft_computes(form, read, of_base):
    found, expected = read(form)
    apart, moved = rms(*of_base), rms(expected, of_base[1])
    assert moved > 100 * apart, "the adapter does so little that nothing could be seen"
    # llama.cpp keeps keys and values in 16 bits: that alone sets the two apart on the base model. With an adapter it may be a
    # little more or less; a wrong scaling is `moved` away, or a good part of it.
    assert rms(found, expected) < 3 * apart
    assert same_tokens(found, expected) == NEW_TOKENS


def test_it_would_not_see_rslora(read, of_base):
    """Why files are saved in the plain form; and that the test above can fail."""
    found, expected = read("rslora")
    assert rms(found, expected) > 0.2 * rms(expected, of_base[1])
