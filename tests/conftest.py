"""Fixtures over `tiny`."""

import pytest
from datasets import Dataset
from tiny import sft_arguments, word_problems, word_tokenizer
from transformers import PreTrainedTokenizerFast

from lora_ga_trainer import LoRAGASFTConfig


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
