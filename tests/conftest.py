"""Fixtures over `tiny`."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything reads it: asking for a hub that is not there takes 23 s

import forked_python
import pytest
import torch
import transformers.integrations.peft
from datasets import Dataset
from tiny import sft_arguments, tiny_model, word_problems, word_tokenizer
from transformers import PreTrainedTokenizerFast

from lora_ga_trainer import LoRAGASFTConfig


def pytest_configure(config):
    if "FORKED_PYTHON" not in os.environ:  # workers of pytest-xdist inherit it
        os.environ["FORKED_PYTHON"] = config.forked_python = str(forked_python.install())


def pytest_unconfigure(config):
    if hasattr(config, "forked_python"):
        shutil.rmtree(Path(config.forked_python).parent)


@pytest.fixture(scope="session", autouse=True)
def todays_peft_in_transformers():
    """transformers 5.24 adds and deletes adapters with PEFT 0.22 only, which is not out yet: let it try with any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.18.0")
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def prompt_completion() -> Dataset:
    return word_problems()


@pytest.fixture
def sft_config(tmp_path):
    """A `LoRAGASFTConfig` for a few steps on the CPU; keyword arguments override."""

    def make(**overrides) -> LoRAGASFTConfig:
        return LoRAGASFTConfig(**sft_arguments(tmp_path / "run", **overrides))

    return make


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def one_thread():
    """What torch does in the processes that `launching` starts, so that results can agree to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
