"""The base model's own files with an adapter's weights in place, one file at a time: W0 + s·lora_B lora_A.

It takes one process, and no model in memory but the largest file. Where memory and files differ, so that a weight is not one
tensor of the same name in both, the model is merged in memory: a mixture's experts, many vision-language models.

Shapes: O out features, I in features, R rank in the file (with the offset twice the one that trained).
"""

from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .base_files import base_names, copy_model_files, rewrite, shards_of
from .merging_in_memory import write_merged_model
from .scaling import PREFIX, scaling_of


def write_merged(source: Path, target: Path, adapter: dict[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Copy the model in `source` to `target` with the adapter's weights in place.

    Args:
        adapter: its tensors.
        config: its scalings.
        folder: with files of both.

    Raises:
        ValueError: the base is quantized, is not one of transformers' own models, or its index names a missing file; or
            something in the adapter has no counterpart in it.
    """
    model_config = unquantized_config(source)
    with torch.device("meta"):
        skeleton = model_class(model_config)(model_config)
    check_same_vocabulary(adapter, skeleton)
    check_not_untied(adapter, skeleton)
    shards = shards_of(source)
    names = base_names(shards)
    if config.target_parameters or in_memory_only(adapter, names, skeleton):
        write_merged_model(type(skeleton), shards, source, target, folder)
        return
    pieces = by_base_weight(adapter, names)
    # an older version's name for a module is in the files only
    transposed = {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
    copy_model_files(source, target)
    for shard in shards:
        rewrite(shard, target, lambda name, W0: merge_tensor(W0, pieces.get(name, {}), config, transposed))


def unquantized_config(source: Path) -> PreTrainedConfig:
    """
    Raises:
        ValueError: the model in `source` is unknown to transformers, or quantized.
    """
    try:
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} has no configuration of a model that transformers knows ({error}). Pass the untouched base model as "
            "`base_model`."
        ) from error
    if "quantization_config" in model_config.to_dict():
        raise ValueError(
            f"{source} is quantized, so nothing can be added to its weights. Pass the unquantized model as `base_model`, or "
            "export the adapter alone."
        )
    return model_config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `config.json` names as the model's.

    Raises:
        ValueError: it is not a transformers model; the name is untrusted and must not call anything else.
    """
    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"The base model's config.json names the architecture {name!r}, which is not a transformers model, so nobody "
            "can tell its layers. Load both with PEFT and use `merge_and_unload`, or export the adapter alone."
        )
    return found


def check_same_vocabulary(adapter: dict[str, Tensor], skeleton: PreTrainedModel) -> None:
    """Refuse an adapter that was trained with another vocabulary size than the base's files have.

    Raises:
        ValueError: the embeddings in the adapter have another number of rows.
    """
    embeddings = skeleton.get_input_embeddings()
    for name, module in skeleton.named_modules():
        held = adapter.get(f"{PREFIX}{name}.weight") if module is embeddings else None
        if held is not None and len(held) != embeddings.num_embeddings:
            raise ValueError(
                f"The adapter was trained with a vocabulary of {len(held):,} tokens, the base model's files have "
                f"{embeddings.num_embeddings:,}, so it cannot be merged file by file. Load the base, "
                f"`resize_token_embeddings({len(held)})`, load the adapter with PEFT and use `merge_and_unload`."
            )


def check_not_untied(adapter: dict[str, Tensor], skeleton: PreTrainedModel) -> None:
    """Refuse an adapter for one of two tied weights: in the base's files, the other would change with it.

    Raises:
        ValueError: embedding and head share their weight, and one of them was trained separately or has a LoRA.
    """
    if not skeleton.config.tie_word_embeddings:
        return
    tied = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    for name, module in skeleton.named_modules():
        if module in tied and f"{PREFIX}{name}.weight" in adapter:
            raise ValueError(
                f"The adapter holds a trained {name}, whose weight the base model shares between embedding and head, so it "
                "cannot be merged file by file. Load both with PEFT and use `merge_and_unload`, or export the adapter alone."
            )
        if module in tied and {f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_embedding_A"} & adapter.keys():
            raise ValueError(
                f"The adapter has a LoRA on {name}, whose weight the base model shares between embedding and head, so merging "
                "would change both (PEFT's `merge_and_unload` does). Export the adapter alone, or pass as `base_model` a copy "
                "of the base with a weight of each and `tie_word_embeddings=False`."
            )


def in_memory_only(adapter: dict[str, Tensor], names: set[str], skeleton: PreTrainedModel) -> bool:
    """Whether the adapter changes a weight that the model has and its files, by their `names`, do not."""
    of_model = set(skeleton.state_dict())
    wanted = {weight_of(key)[0] for key in adapter}
    return any(name in of_model and name_in_files(name, names) is None for name in wanted)


def weight_of(key: str) -> tuple[str, str, str]:
    """(the weight in the model that the adapter's tensor `key` changes, which of the adapter's modules it is in, its kind)."""
    module, _, parameter = key.removeprefix(PREFIX).rpartition(".")
    module, _, kind = module.rpartition(".") if module.endswith((".lora_A", ".lora_B")) else (module, "", "instead")
    return f"{module.removesuffix('.base_layer')}.{parameter}", module, kind  # a bias may train beside the adapter


def name_in_files(weight: str, names: set[str]) -> str | None:
    """A file may omit the name of the outermost module: `h.0.attn.c_proj.weight` for `transformer.h.0…`."""
    return next((name for name in (weight, weight.partition(".")[2]) if name in names), None)


def by_base_weight(adapter: dict[str, Tensor], names: set[str]) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """For each of the base's weights, the parts of the adapter that change it: kind -> (module name, tensor).

    Raises:
        ValueError: a part of the adapter has no such weight.
    """
    pieces: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, value in adapter.items():
        wanted, module, kind = weight_of(key)
        name = name_in_files(wanted, names)
        if name is None:
            raise ValueError(
                f"The adapter's {key} has no counterpart {wanted} in the base model's files, so it cannot be merged file by "
                "file. Load both with PEFT and use `merge_and_unload`, or export the adapter alone."
            )
        pieces.setdefault(name, {})[kind] = (module, value)
    return pieces


def merge_tensor(
    base: Tensor, pieces: dict[str, tuple[str, Tensor]], config: LoraConfig, transposed: set[str]
) -> Tensor:
    """W0 + s·lora_B lora_A (O×I; I×O in the modules that are `transposed`), or b0 + s·lora_B's bias.

    W0 is `base`, or the adapter's replacement: fully trained, or, for a head with a LoRA, another copy of the base's.

    Raises:
        ValueError: the shapes differ, or it is the weight of a convolution.
    """
    if "instead" in pieces:
        _check_shape(*pieces["instead"], base)
        base = pieces["instead"][1].to(base.dtype)
    if "lora_B" not in pieces:
        return base
    module, lora_B = pieces["lora_B"]
    delta = scaling_of(config, module) * lora_B.float()
    if "lora_A" in pieces:
        lora_A = pieces["lora_A"][1]
        if lora_A.dim() != 2:
            raise ValueError(
                f"The adapter's {module} is a convolution, which is not merged file by file. Load both with PEFT and use "
                "`merge_and_unload`, or export the adapter alone."
            )
        delta = delta @ lora_A.float()
        if module in transposed:
            delta = delta.T
    _check_shape(module, delta, base)
    return (base.float() + delta).to(base.dtype)


def _check_shape(module: str, found: Tensor, base: Tensor) -> None:
    if found.shape != base.shape:
        raise ValueError(
            f"The adapter's {module} is for a weight of shape {list(found.shape)}, the base model's has {list(base.shape)}. "
            "Pass the model that the adapter was trained on as `base_model`."
        )
