"""An adapter's file in other forms, for readers that know less or hold less than PEFT: the plain scaling, the scaling in B,
another rank.

Shapes: E experts, O out features, I in features, K the rank in the file, R the rank wanted.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .mergeable import HARMLESS_ELSEWHERE, check_mergeable
from .pairs import Pairs
from .scaling import PREFIX, plain_form, scaling_of, with_form
from .truncation import truncate

FORM = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""The fields of `adapter_config.json` that say how the matrices are scaled."""


class Lost(NamedTuple):
    """What a layer's ΔW = s·BA (O×I, or E of them) loses at another rank, in Frobenius norm."""

    norm: float
    """‖ΔW‖"""
    error: float
    """‖ΔW − ΔW_R‖"""

    @property
    def share(self) -> float:
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter's two files hold."""

    document: dict[str, Any]
    """`adapter_config.json`, with fields of later versions of PEFT too."""
    config: LoraConfig | None
    """The same as PEFT reads it; None if the adapter is no LoRA."""
    tensors: dict[str, Tensor]

    @property
    def modules(self) -> list[str]:
        """The names in the file of all modules with a pair of A and B."""
        return [name.removesuffix(".lora_A.weight") for name in self.tensors if name.endswith(".lora_A.weight")]

    @property
    def shapes(self) -> dict[str, tuple[torch.Size, torch.Size]]:
        """Those of (lora_A, lora_B), by module.

        Raises:
            ValueError: a module has no lora_B.
        """
        found = {}
        for module in self.modules:
            names = [f"{module}.lora_{half}.weight" for half in "AB"]
            if names[1] not in self.tensors:
                raise ValueError(f"The adapter's file has {names[0]}, but no {names[1]}. Use another checkpoint.")
            found[module] = self.tensors[names[0]].shape, self.tensors[names[1]].shape
        return found

    def write(self, directory: Path) -> None:
        text = json.dumps(self.document, indent=2, sort_keys=True)
        (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
        save_file(self.tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def read_adapter(directory: Path) -> AdapterFile:
    """
    Raises:
        ValueError: a file is missing or damaged.
    """
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise ValueError(
                f"{directory} has no {name}. Pass a `checkpoint-N`, or the folder that `save_model` wrote."
            )
    try:
        document = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        tensors = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
    except (ValueError, SafetensorError) as error:
        damaged = CONFIG_NAME if isinstance(error, ValueError) else SAFETENSORS_WEIGHTS_NAME
        raise ValueError(f"{directory / damaged} is damaged ({error}). Use another checkpoint.") from error
    is_lora = document.get("peft_type") == "LORA"
    return AdapterFile(document, LoraConfig.from_pretrained(directory) if is_lora else None, tensors)


def with_config(adapter: AdapterFile, config: LoraConfig, tensors: dict[str, Tensor]) -> AdapterFile:
    """The `adapter` with other `tensors`, and the scaling that `config` says."""
    document = adapter.document | {name: getattr(config, name) for name in FORM}
    return AdapterFile(document, config, tensors)


def in_plain_form(adapter: AdapterFile, pairs: dict[str, Pairs]) -> AdapterFile:
    """The same tensors without rsLoRA, as versions from 0.2 on save them; see `scaling`.

    Args:
        pairs: of all modules of the adapter, by their names in its file.
    """
    assert adapter.config is not None  # it is a LoRA
    others = {name.rpartition(".lora_")[0] for name in adapter.tensors if ".lora_" in name} - pairs.keys()
    keys = {*(pair.key for pair in pairs.values()), *others}
    return with_config(adapter, plain_form(adapter.config, keys), adapter.tensors)


def fold_scaling(adapter: AdapterFile, pairs: dict[str, Pairs]) -> AdapterFile:
    """The scaling multiplied into B, so that α = r: a whole number and a factor of 1 for every reader, without patterns.

    B is rounded once more to its dtype, unless s is a power of two. Where ranks differ, the smaller are filled up with zeros.

    Args:
        pairs: of all modules of the adapter, by their names in its file.
    """
    assert adapter.config is not None  # `check_pairs` has passed
    tensors = dict(adapter.tensors)
    rank = largest_rank(adapter, pairs)
    for module, pair in pairs.items():
        s = scaling_of(adapter.config, pair.key)
        a_name, b_name = (f"{module}.lora_{half}.weight" for half in "AB")
        a_EKI, b_EOK = pair.a_EKI(tensors[a_name]), pair.b_EOK(tensors[b_name])
        missing = rank - a_EKI.shape[1]
        a_EKI = F.pad(a_EKI, (0, 0, 0, missing))
        b_EOK = F.pad((s * b_EOK.double()).to(b_EOK.dtype), (0, missing))
        tensors[b_name], tensors[a_name] = pair.matrices(b_EOK, a_EKI)
        bias = f"{module}.lora_B.bias"
        if bias in tensors:  # PEFT scales it as well
            tensors[bias] = (s * tensors[bias].double()).to(tensors[bias].dtype)
    folded = replace(adapter.config, r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={})
    return with_config(adapter, folded, tensors)


def at_rank(adapter: AdapterFile, pairs: dict[str, Pairs], rank: int) -> tuple[AdapterFile, dict[str, Lost]]:
    """(the nearest adapter whose modules all have this rank, what each of them loses). Each keeps its scaling.

    A module of a smaller rank loses nothing and is filled up with zeros: many servers read one rank for all.

    Args:
        pairs: of all modules of the adapter, by their names in its file.

    Raises:
        ValueError: the rank is not below that of the file.
    """
    assert adapter.config is not None  # `check_pairs` has passed
    largest = largest_rank(adapter, pairs)
    if type(rank) is not int or not 1 <= rank < largest:
        smaller = f"only a whole number from 1 to {largest - 1} makes" if largest > 1 else "nothing makes"
        raise ValueError(
            f"`rank` is {rank!r}, but the adapter's file has rank {largest}, so {smaller} it smaller. Choose such a rank, or "
            "leave out `rank`."
        )
    tensors, lost = dict(adapter.tensors), {}
    scalings = {pair.key: scaling_of(adapter.config, pair.key) for pair in pairs.values()}
    for module, pair in pairs.items():
        a_name, b_name = (f"{module}.lora_{half}.weight" for half in "AB")
        if not (tensors[a_name].isfinite().all() and tensors[b_name].isfinite().all()):
            raise ValueError(
                f"The adapter's matrices of {module} hold NaN or infinity, so no rank is near them. Use another checkpoint."
            )
        b_EOR, a_ERI, singular_values = truncate(pair.b_EOK(tensors[b_name]), pair.a_EKI(tensors[a_name]), rank)
        tensors[b_name], tensors[a_name] = pair.matrices(b_EOR, a_ERI)
        s = scalings[pair.key]
        lost[f"{PREFIX}{pair.key}"] = Lost(
            s * singular_values.norm().item(), s * singular_values[:, rank:].norm().item()
        )
    form = with_form(adapter.config, rank, dict.fromkeys(scalings, rank), scalings)
    return with_config(adapter, form, tensors), lost


def largest_rank(adapter: AdapterFile, pairs: dict[str, Pairs]) -> int:
    return max(len(adapter.tensors[f"{module}.lora_A.weight"]) // pair.experts for module, pair in pairs.items())


def check_pairs(adapter: AdapterFile) -> None:
    """
    Raises:
        ValueError: the adapter adds more than s·BA to weights; or it has a LoRA on an embedding or a convolution.
    """
    check_mergeable(adapter.document, "given another rank or another scaling", HARMLESS_ELSEWHERE)
    for name, tensor in adapter.tensors.items():
        if ".lora_embedding_" in name or (".lora_A." in name and tensor.dim() != 2):
            raise ValueError(
                f"The adapter's {name} is not that of a linear layer, so it cannot be given another rank or another scaling. "
                "Export the adapter alone, and load it with PEFT."
            )
    if not adapter.modules:
        raise ValueError("The adapter's file has no LoRA, so there is no rank and no scaling. Export it as it is.")
    _ = adapter.shapes  # there is a B for each A
