"""What the installed versions lack is refused when it is asked for; entries go with the versions they are for."""

import configparser
import re
from pathlib import Path

import pytest
import torch
from accelerate.utils import compare_versions
from packaging.requirements import Requirement
from packaging.version import Version
from tiny import tiny_model

from lora_ga_trainer import LoRAGASFTTrainer
from lora_ga_trainer.compatibility import CHECKPOINTING_SINCE, check_version

REPOSITORY = Path(__file__).resolve().parents[1]
ASKS = re.compile(r"compare_versions|packaging\.|version_info|importlib\.metadata|\bis_\w+_version\b|ImportError")
VALUES = {"every_n_layers": 2, "offload": True, "selective": True}


def install_requires() -> list[str]:
    config = configparser.ConfigParser()
    config.read_string((REPOSITORY / "setup.cfg").read_text(encoding="utf-8"))
    return config["options"]["install_requires"].split("\n")[1:]


@pytest.mark.parametrize("name", CHECKPOINTING_SINCE)
def test_an_option_trains_or_is_refused_with_the_version_it_needs(sft_config, prompt_completion, tokenizer, name):
    package, version = CHECKPOINTING_SINCE[name]

    def make():
        config = sft_config(
            gradient_checkpointing=True, gradient_checkpointing_kwargs={name: VALUES[name]}, max_steps=1
        )
        return LoRAGASFTTrainer(tiny_model(), config, train_dataset=prompt_completion, processing_class=tokenizer)

    if compare_versions(package, "<", version):
        with pytest.raises(
            ValueError, match=rf"{name}.* needs {package} {version}, .*pip install '{package}>={version}'"
        ):
            make()
    elif name == "offload" and not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="finds no GPU"):
            make()
    else:
        make().train()


def test_the_error_of_an_older_version():
    with pytest.raises(ValueError) as raised:
        check_version("trl", "1000.2", "`sixth_sense=True`")
    assert str(raised.value) == (
        "`sixth_sense=True` needs trl 1000.2, but an older version is installed. Leave it out, or upgrade: "
        "`pip install 'trl>=1000.2'`."
    )
    check_version("trl", "1.0", "`SFTTrainer`")


@pytest.mark.parametrize(("package", "version"), CHECKPOINTING_SINCE.values(), ids=CHECKPOINTING_SINCE.keys())
def test_an_entry_goes_when_the_lower_bound_has_reached_it(package, version):
    requirements = [Requirement(line) for line in install_requires() if not line.startswith("#")]
    (specifier,) = [requirement.specifier for requirement in requirements if requirement.name == package]
    (lowest,) = [bound.version for bound in specifier if bound.operator == ">="]
    assert Version(lowest) < Version(version), f"no admitted {package} lacks it any more"


def test_no_other_module_asks_for_a_version():
    modules = sorted((REPOSITORY / "lora_ga_trainer").rglob("*.py"))
    asking = [path.name for path in modules if ASKS.search(path.read_text(encoding="utf-8"))]
    assert asking == ["compatibility.py"]
