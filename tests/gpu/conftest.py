"""Where the tests of this folder run: on CUDA, or with `--device cpu` on the CPU, to try the tests themselves out."""

import os

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read when CUDA starts: else cuBLAS may sum in another order

import pytest
import torch
from tiny import lora_config, sft_arguments, word_problems, word_tokenizer
from transformers import AutoModelForCausalLM

from lora_ga_trainer import LoRAGASFTConfig, LoRAGASFTTrainer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="of tests/gpu; cpu tries them out")
    parser.addoption("--one-of-each", action="store_true", help="only the first case of each test in tests/gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--one-of-each", default=False):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
    items[:] = first.values()


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    # the default again: pytest does not know the option where this folder is not named on its command line
    name = request.config.getoption("--device", default="cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device(name)


@pytest.fixture
def cuda(device) -> torch.device:
    """For what the CPU does not have."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture
def make_trainer(base_model, tmp_path):
    """A trainer on a device; keyword arguments are those of the configuration."""

    def make(device, lora=None, attention="sdpa", callbacks=(), **options):
        options = {"ga_estimator": "exact", "use_cpu": torch.device(device).type == "cpu"} | options
        args = LoRAGASFTConfig(**sft_arguments(tmp_path / "run", **options))
        assert args.device.type == torch.device(device).type
        args._n_gpu = min(1, args.n_gpu)  # no `nn.DataParallel` over further cards
        model = AutoModelForCausalLM.from_pretrained(base_model, attn_implementation=attention, dtype=torch.float32)
        return LoRAGASFTTrainer(
            model,
            args,
            train_dataset=word_problems(),
            processing_class=word_tokenizer(),
            peft_config=lora_config(**{"r": 2} | (lora or {})),
            callbacks=list(callbacks),
        )

    return make
