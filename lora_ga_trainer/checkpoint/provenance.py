"""Whether the base model in memory still is what its name says.

Names outlive changes: after `merge_and_unload`, or any other change of its weights, a model keeps the name that it was loaded
by. PEFT writes it into the next adapter's files, and whoever loads that adapter gets a different model. So a few rows of each
weight are compared with the model's files, if those are on this machine.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter.quantized import UNQUANTIZED
from ..distributed.backends import full_shape, gather_objects, leading_rows, rank
from .merging import shards_of

logger = logging.getLogger(__name__)

ROWS = 8
"""Rows compared per weight. Merging an adapter, or training, changes all rows of some weight."""
WRAPPERS = (".base_layer", ".original_module")
"""What PEFT adds to the names of the base's weights."""


def forget_changed_base(peft_model: PeftModel, adapter_name: str) -> None:
    """Remove the base model's name from the adapter's configuration if its weights no longer match that name.

    Every process must call it. A base that cannot be compared keeps its name: quantized, not in safetensors, or not here.
    """
    config = peft_model.peft_config[adapter_name]
    name = config.base_model_name_or_path
    changed = gather_objects(first_changed_weight(peft_model, name, config.revision) if name and rank() == 0 else None)[
        0
    ]
    if changed is None:
        return
    config.base_model_name_or_path = ""  # for None, PEFT would look up the name again
    if rank() == 0:
        logger.warning(
            f"The base model is named {name}, but its weights have changed since, first {changed}. The adapter is relative "
            "to the current weights, and will not name its base. Save them (`model.save_pretrained(folder)`) and "
            "train on that folder, so that the adapter can be loaded again."
        )


def first_changed_weight(peft_model: PeftModel, name: str, revision: str | None) -> str | None:
    """The first weight of the base in memory that differs from the files of the model `name`, a folder or in the hub's cache.

    Rounding to half precision is no change. Weights that the files lack or have in another shape, such as the embeddings of
    a resized vocabulary, are not compared.
    """
    base = peft_model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        return None
    parameters = {_plain_name(key): value for key, value in base.named_parameters(remove_duplicate=False)}
    try:
        for shard in shards_of(local_files(name, vars(base.config).get("_commit_hash") or revision)):
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    # files may omit the name of the outermost module, or add one
                    names = (key, f"{base.base_model_prefix}.{key}", key.partition(".")[2])
                    known = next((own for own in names if own in parameters), None)
                    if known is not None and not _same(parameters[known], file.get_slice(key)):
                        return known
    except (OSError, ValueError, KeyError, SafetensorError):  # not here, or incomplete
        pass
    return None


def local_files(name: str, revision: str | None) -> Path:
    """The folder with the files of the model `name`; nothing is downloaded.

    Raises:
        OSError, ValueError: they are not on this machine.
    """
    return (
        Path(name) if Path(name).is_dir() else Path(snapshot_download(name, revision=revision, local_files_only=True))
    )


def _plain_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _same(parameter: Tensor, saved: Any) -> bool:
    """Whether a weight has the values of a slice of the files; True if the two cannot be compared."""
    shape = full_shape(parameter)
    if type(parameter) is not nn.Parameter or parameter.is_meta or not shape or list(shape) != saved.get_shape():
        return True
    held = leading_rows(parameter)
    rows = sorted({len(held) * n // ROWS for n in range(ROWS)} | {len(held) - 1}) if len(held) else []
    found, wanted = held[rows].cpu(), saved[rows]
    if not {found.dtype, wanted.dtype} <= {*UNQUANTIZED}:
        return True
    steps = (wanted.dtype, torch.bfloat16, torch.float16)
    return any(torch.allclose(found, wanted.to(step).to(found.dtype), rtol=0, atol=0, equal_nan=True) for step in steps)
