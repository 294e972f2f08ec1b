"""The files of a base model: which hold its weights, and the same files with other weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .companions import OF_MODEL, companions, copy_files


def shards_of(source: Path) -> list[Path]:
    """The files in `source` from which transformers loads the weights; others would be copied unmerged.

    They are model.safetensors, else those that the index names, else all there are.

    Raises:
        ValueError: the index names a file that is not there.
    """
    there = {path.name: path for path in sorted(source.glob("*.safetensors"))}
    if "model.safetensors" in there:
        return [there["model.safetensors"]]
    index = source / "model.safetensors.index.json"
    if not index.is_file():
        return [*there.values()]
    named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elsewhere = [name for name in named if name not in there]
    if elsewhere:
        raise ValueError(
            f"{index} names {elsewhere[0]!r}, which is not among the .safetensors files of its folder. Get the base model "
            "again from its source."
        )
    return [there[name] for name in named]


def base_names(shards: list[Path]) -> set[str]:
    names = set()
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            names.update(file.keys())
    return names


def usual_dtype(shards: list[Path]) -> torch.dtype:
    """That of most numbers in the files, which need not be what their config.json says."""
    numbers: dict[torch.dtype, int] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_slice(name)  # reads its header alone
                dtype = tensor[:0].dtype if tensor.get_shape() else file.get_tensor(name).dtype
                numbers[dtype] = numbers.get(dtype, 0) + math.prod(tensor.get_shape())
    return max((dtype for dtype in numbers if dtype.is_floating_point), key=lambda dtype: numbers[dtype])


def copy_model_files(source: Path, target: Path) -> None:
    """All but the weights."""
    of_model = [*OF_MODEL, *(path.name for path in source.glob("*.safetensors.index.json"))]
    copy_files(source, [Path(name) for name in of_model if (source / name).is_file()] + companions(source), target)


def rewrite(shard: Path, target: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    with safe_open(shard, framework="pt") as file:
        tensors = {name: change(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, target / shard.name, metadata={"format": "pt"})
