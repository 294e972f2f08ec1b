"""The base model with an adapter merged into it by PEFT, where a weight is not one tensor of one name in memory and files."""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from .base_files import base_names, copy_model_files, rewrite, shards_of, usual_dtype
from .companions import companions, copy_files


def write_merged_model(
    model: type[PreTrainedModel], shards: list[Path], source: Path, target: Path, adapter: Path
) -> None:
    """The model in `source`, merged, in `target`. Weights that the adapter does not change stay as the files have them.

    Raises:
        ValueError: the adapter does not fit the base.
    """
    base = model.from_pretrained(source, dtype=usual_dtype(shards))
    merged = with_adapter(base, adapter).merge_and_unload()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        merged.save_pretrained(folder)  # under the names that files have
        of_merged = shards_of(Path(folder))
        if base_names(of_merged) <= base_names(shards):
            copy_model_files(source, target)
            with ExitStack() as stack:
                files = [stack.enter_context(safe_open(shard, framework="pt")) for shard in of_merged]
                file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)

                def changed(name: str, base: Tensor) -> Tensor:
                    return merged_or_base(file_of[name].get_tensor(name), base) if name in file_of else base

                for shard in shards:
                    rewrite(shard, target, changed)
        else:  # other names than the base's, as an older version wrote it
            shutil.copytree(folder, target, dirs_exist_ok=True)
            copy_files(source, companions(source), target)


def with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """
    Raises:
        ValueError: one of the two has a matrix that the other has not, or of another shape, of which PEFT would only warn.
    """
    adapted = PeftModel(base, LoraConfig.from_pretrained(folder))
    try:
        loaded = adapted.load_adapter(folder, "default")
    except RuntimeError as error:  # of torch, on other shapes
        raise ValueError(
            f"The adapter does not fit the base model ({str(error).splitlines()[-1].strip()}). Pass the one that it was "
            "trained on as `base_model`."
        ) from error
    odd = [*loaded.missing_keys, *loaded.unexpected_keys]
    if odd:
        raise ValueError(
            f"The adapter does not fit the base model: only one of them has {odd[0]}. Pass the one that it was trained on as "
            f"`base_model`; if that was a part of {type(base).__name__}, load that part and the adapter with PEFT, and use "
            "`merge_and_unload`."
        )
    return adapted


def merged_or_base(merged: Tensor, base: Tensor) -> Tensor:
    """`merged` in the dtype of `base`; or `base`, where merging changed nothing, even if loading has rounded it."""
    return base if torch.equal(base.to(merged.dtype), merged) else merged.to(base.dtype)
