"""The differences between the versions that setup.cfg admits. No other module asks for a version.

An entry can go once setup.cfg's lower bound has reached its version; `tests/test_compatibility.py` fails from then on.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import compare_versions
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from torch import Tensor

from .distributed.launches import Launch

CHECKPOINTING_SINCE = {
    "every_n_layers": ("transformers", "5.16"),
    "offload": ("transformers", "5.17"),
    "selective": ("trl", "1.15"),
}
"""Keys of `gradient_checkpointing_kwargs` that older versions pass on to torch, which fails on them in the first forward."""

FSDP2_RESUMES_SINCE = ("accelerate", "1.13")
"""Older versions silently do not load the optimizer's state, since the new optimizer has none to load into."""

CPUS_RESUME_SINCE = ("transformers", "5.18")
"""Older versions ask torch to load the optimizer's state onto "cpu:0", which it refuses."""


def check_resuming(launch: Launch, device: torch.device) -> None:
    """
    Raises:
        ValueError: the installed versions do not restore the optimizer of a run with this launch.
    """
    if launch.backend == "FSDP2":
        check_version(*FSDP2_RESUMES_SINCE, "Resuming under FSDP2")
    if launch.backend == "DDP" and launch.world_size > 1 and device.type == "cpu":
        check_version(*CPUS_RESUME_SINCE, "Resuming on several CPU processes")


def check_checkpointing_kwargs(options: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: one of the `options` needs a newer version than the installed one.
    """
    for name, (package, version) in CHECKPOINTING_SINCE.items():
        if options.get(name):
            check_version(package, version, f"`gradient_checkpointing_kwargs={{{name!r}: {options[name]!r}}}`")


def check_version(package: str, version: str, feature: str) -> None:
    """
    Raises:
        ValueError: the installed `package` is older than `version`, which `feature` needs.
    """
    if compare_versions(package, "<", version):
        raise ValueError(
            f"{feature} needs {package} {version}, but an older version is installed. Do without it, or upgrade: "
            f"`pip install '{package}>={version}'`."
        )


def enable_selective_checkpointing(model: PeftModel) -> None:
    """Set up `gradient_checkpointing_kwargs={"selective": True}`, after `check_checkpointing_kwargs` has accepted it.

    TRL 1.15 and 1.16 set it up on the PEFT model, but transformers looks at the model inside.
    """
    from trl.models import enable_selective_activation_checkpointing  # TRL before 1.15 has none

    enable_selective_activation_checkpointing(model.get_base_model())


def without_other_adapters(tensors: dict[str, Tensor], peft_model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """The `tensors` of a state dict, without the matrices of adapters other than `adapter_name`.

    PEFT before 0.20 saves every matrix whose name contains the adapter's: with "default" also those of "default_2".
    """
    others = peft_model.peft_config.keys() - {adapter_name}
    of_others = re.compile(rf"\.lora_\w+\.({'|'.join(map(re.escape, others))})(\.|$)")
    return {name: tensor for name, tensor in tensors.items() if not of_others.search(name)}


def stores_outputs_first(layer: ParamWrapper) -> bool:
    """Whether the experts' parameter is E×O×I for PEFT; else it is E×I×O.

    PEFT 0.18 takes every one for E×I×O. Where it is not, A and B change sides, and make the same change of the weight.
    """
    return vars(layer).get("_did_swap_in_out_features", False)


def sha256(path: Path) -> bytes:
    """Digest of a file of any size. Drop it with Python 3.10: 3.11 has `hashlib.file_digest`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()
