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
from lora_ga_trainer.compatibility import CHECKPOINTING_SINCE, CPUS_RESUME_SINCE, FSDP2_RESUMES_SINCE, check_version
from lora_ga_trainer.distributed.launches import Launch

REPOSITORY = Path(__file__).resolve().parents[1]
ASKS = re.compile(r"compare_versions|packaging\.|version_info|importlib\.metadata|\bis_\w+_version\b|ImportError")
SINCE = CHECKPOINTING_SINCE | {
    "FSDP2": FSDP2_RESUMES_SINCE,
    "several CPU processes": CPUS_RESUME_SINCE,
    "without_other_adapters": ("peft", "0.20"),
}
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


@pytest.mark.parametrize(
    ("launch", "since", "named"),
    [
        (Launch("FSDP2", 1), FSDP2_RESUMES_SINCE, "Resuming under FSDP2"),
        (Launch("DDP", 2), CPUS_RESUME_SINCE, "Resuming on several CPU processes"),
        (Launch("DDP", 1), ("trl", "1.0"), "one process"),
    ],
)
def test_a_launch_resumes_or_is_refused_with_the_version_it_needs(
    sft_config, prompt_completion, tokenizer, launch, since, named
):
    """On one process that takes itself for the launch, so that only the check differs; test_resume launches them."""

    def make(steps):
        config = sft_config(max_steps=steps, save_strategy="steps", save_steps=1)
        trainer = LoRAGASFTTrainer(tiny_model(), config, train_dataset=prompt_completion, processing_class=tokenizer)
        trainer.model.lora_ga.state.launch = launch
        return trainer

    make(1).train()
    package, version = since
    if compare_versions(package, "<", version):
        with pytest.raises(ValueError, match=rf"{named} needs {package} {version}"):
            make(2).train(resume_from_checkpoint=True)
    else:
        make(2).train(resume_from_checkpoint=True)


def test_the_error_of_an_older_version():
    with pytest.raises(ValueError) as raised:
        check_version("trl", "1000.2", "`sixth_sense=True`")
    assert str(raised.value) == (
        "`sixth_sense=True` needs trl 1000.2, but an older version is installed. Do without it, or upgrade: "
        "`pip install 'trl>=1000.2'`."
    )
    check_version("trl", "1.0", "`SFTTrainer`")


@pytest.mark.parametrize(("package", "version"), SINCE.values(), ids=SINCE.keys())
def test_an_entry_goes_when_the_lower_bound_has_reached_it(package, version):
    requirements = [Requirement(line) for line in install_requires() if not line.startswith("#")]
    (specifier,) = [requirement.specifier for requirement in requirements if requirement.name == package]
    (lowest,) = [bound.version for bound in specifier if bound.operator == ">="]
    assert Version(lowest) < Version(version), f"no admitted {package} lacks it any more"


def test_the_digest_goes_with_python_3_10():
    assert "python_requires = >=3.10\n" in (REPOSITORY / "setup.cfg").read_text(encoding="utf-8")


def test_no_other_module_asks_for_a_version():
    modules = sorted((REPOSITORY / "lora_ga_trainer").rglob("*.py"))
    asking = [path.name for path in modules if ASKS.search(path.read_text(encoding="utf-8"))]
    assert asking == ["compatibility.py"]
