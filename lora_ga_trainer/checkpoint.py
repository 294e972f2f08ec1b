"""Files: an adapter in delta form is saved as an ordinary LoRA of rank 2R, and can be taken up again exactly.

    adapter_model.safetensors   lora_A = [A0 + dA; dA] (2R×I), lora_B = [dB, B0] (O×2R): stock PEFT on the untouched base
    adapter_config.json         r doubled, lora_alpha such that the scaling stays the same
    lora_ga.safetensors         A0 (R×I) per layer: dA, dB and B0 are in the adapter file as they are, A0 is not
    lora_ga.json                the options, the adapter's own r and alpha, alignment per layer, versions

Shapes: O out features, I in features, R the rank that trains.
"""

import copy
import json
import math
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import peft
import torch
import transformers
import trl
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ._version import __version__
from .arguments import LoRAGAArguments
from .delta import DeltaA, DeltaB, delta_layers
from .report import InitReport

FROZEN_FILE = "lora_ga.safetensors"
STATE_FILE = "lora_ga.json"
LORA_FIELDS = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "bias", "lora_bias", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
"""What a `LoraConfig` says about the parameters that train; a checkpoint made with others cannot be resumed."""
WITHOUT_EFFECT = ("ga_batch_size",)
"""Options that change no result, so that they may differ on resuming."""


@dataclass
class LoRAGAState:
    """What `lora_ga.json` holds: enough to know whether a checkpoint belongs to a run. `peft_model.lora_ga` is one."""

    adapter_name: str
    lora: dict[str, Any]
    """The fields of `LORA_FIELDS`, of the adapter that trains."""
    options: dict[str, Any]
    """The `ga_*` options."""
    report: InitReport | None
    """None until the adapter has been initialized."""

    @classmethod
    def before_init(cls, lora_config: LoraConfig, adapter_name: str, config: LoRAGAArguments) -> "LoRAGAState":
        # a set, as PEFT makes of some lists, would not survive JSON
        values = {name: copy.copy(getattr(lora_config, name)) for name in LORA_FIELDS}
        lora = {name: sorted(value) if isinstance(value, (set, list)) else value for name, value in values.items()}
        options = {option.name: getattr(config, option.name) for option in fields(LoRAGAArguments)}
        return cls(adapter_name, lora, options, report=None)


def portable_config(lora_config: LoraConfig) -> LoraConfig:
    """The `LoraConfig` of the saved file: rank 2R, the same scaling s.

    s = α/√r with rsLoRA and α/r without, so doubling r takes α·√2 and α·2.
    """
    portable = copy.deepcopy(lora_config)
    factor = math.sqrt(2) if lora_config.use_rslora else 2
    portable.r *= 2
    portable.lora_alpha *= factor
    portable.rank_pattern = {name: 2 * rank for name, rank in portable.rank_pattern.items()}
    portable.alpha_pattern = {name: factor * alpha for name, alpha in portable.alpha_pattern.items()}
    return portable


def portable_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with the two halves of each delta-form matrix joined into the one rank-2R `weight` that PEFT reads."""
    portable = {}
    for key, value in state_dict.items():
        module, _, half = key.rpartition(".")
        if ".lora_A." in key and half == "trainable":
            portable[f"{module}.weight"] = DeltaA.join(value, state_dict[f"{module}.frozen"])
        elif ".lora_B." in key and half == "trainable":
            portable[f"{module}.weight"] = DeltaB.join(value, state_dict[f"{module}.frozen"])
        elif not ((".lora_A." in key or ".lora_B." in key) and half == "frozen"):
            portable[key] = value
    return portable


def native_state_dict(portable: dict[str, Tensor], frozen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `portable_state_dict`, given A0 per layer: every half comes out bit for bit."""
    native = {}
    for key, value in portable.items():
        module = key.removesuffix(".weight")
        if key.endswith(".lora_A.weight"):
            native[f"{module}.trainable"] = DeltaA.split(value)
            native[f"{module}.frozen"] = frozen[module.removesuffix(".lora_A")]
        elif key.endswith(".lora_B.weight"):
            native[f"{module}.trainable"], native[f"{module}.frozen"] = DeltaB.split(value)
        else:
            native[key] = value
    return native


def make_portable(peft_model: PeftModel, state: LoRAGAState) -> None:
    """Have `peft_model.save_pretrained` and `load_adapter` write and read the files above; `Trainer` calls them too.

    Bound to the instance, because PEFT offers no hook for an adapter's own file form, and its `load_adapter` drops keys
    that it does not know without a word.
    """
    peft_model.lora_ga = state
    peft_model.save_pretrained = MethodType(save_pretrained, peft_model)
    peft_model.load_adapter = MethodType(load_adapter, peft_model)


def save_pretrained(
    peft_model: PeftModel,
    save_directory: str | Path,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    *,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | None = None,
    **kwargs: Any,
) -> None:
    """`PeftModel.save_pretrained` for a model with an adapter in delta form; same arguments.

    Raises:
        ValueError: the adapter has not been initialized yet, so that there is nothing worth saving; or
            `path_initial_model_for_weight_conversion` is given.
    """
    if path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            f"`path_initial_model_for_weight_conversion` is {path_initial_model_for_weight_conversion!r}, but a LoRA-GA "
            "adapter is always saved relative to the untouched base model, so there is nothing to convert. Leave it out."
        )
    stock_save = partial(
        type(peft_model).save_pretrained,
        peft_model,
        save_directory,
        safe_serialization,
        selected_adapters,
        is_main_process=is_main_process,
        **kwargs,
    )
    state = peft_model.lora_ga
    if state.adapter_name not in (selected_adapters or peft_model.peft_config):  # left out, or deleted since
        stock_save(state_dict=state_dict)
        return
    if state.report is None:
        raise ValueError(
            f"The adapter {state.adapter_name!r} has not been initialized by LoRA-GA yet, so saving it would write zeros. "
            "Call `trainer.train()` or `initialize_lora_ga(...)` first."
        )
    native = peft_model.state_dict() if state_dict is None else state_dict
    lora_config = peft_model.peft_config[state.adapter_name]
    try:
        peft_model.peft_config[state.adapter_name] = portable_config(lora_config)
        stock_save(state_dict=portable_state_dict(native))
    finally:
        peft_model.peft_config[state.adapter_name] = lora_config
    if is_main_process:
        directory = adapter_directory(save_directory, state.adapter_name)
        write_state(directory, state, frozen_factors(native, state.adapter_name))


def load_adapter(
    peft_model: PeftModel, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **kwargs: Any
) -> Any:
    """`PeftModel.load_adapter`; for the adapter in delta form `model_id` must be a checkpoint of the same kind of run.

    Everything is read and checked before the first weight is written.

    Raises:
        ValueError: a file is missing or damaged, or was made with another `LoraConfig` or other `ga_*` options.
    """
    if adapter_name != peft_model.lora_ga.adapter_name:
        return type(peft_model).load_adapter(peft_model, model_id, adapter_name, is_trainable=is_trainable, **kwargs)
    directory = Path(model_id)
    saved = check_same_run(peft_model.lora_ga, directory)
    layers = delta_layers(peft_model, adapter_name)
    frozen = read_tensors(
        directory / FROZEN_FILE, {name: layer.lora_A[adapter_name].frozen.shape for name, layer in layers.items()}
    )
    # All that PEFT would save of this model, and nothing else: it drops names it does not know without a word.
    saved_by_peft = get_peft_model_state_dict(
        peft_model, portable_state_dict(peft_model.state_dict()), adapter_name=adapter_name
    )
    portable = read_tensors(
        directory / SAFETENSORS_WEIGHTS_NAME, {name: value.shape for name, value in saved_by_peft.items()}
    )
    result = set_peft_model_state_dict(peft_model, native_state_dict(portable, frozen), adapter_name)
    peft_model.lora_ga.report = saved.report
    if not is_trainable:  # as PEFT does
        peft_model.eval()
    return result


def adapter_directory(save_directory: str, adapter_name: str) -> Path:
    """Where PEFT puts the files of an adapter: adapters not named "default" go to a folder of their own."""
    return Path(save_directory) if adapter_name == "default" else Path(save_directory, adapter_name)


def frozen_factors(native_state_dict: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """A0 (R×I) per layer, under the layer's module name."""
    suffix = f".lora_A.{adapter_name}.frozen"
    return {
        key.removesuffix(suffix): value.contiguous() for key, value in native_state_dict.items() if key.endswith(suffix)
    }


def write_state(directory: Path, state: LoRAGAState, frozen: dict[str, Tensor]) -> None:
    """Write `lora_ga.safetensors` and `lora_ga.json` beside the adapter's files."""
    save_file(frozen, directory / FROZEN_FILE, metadata={"format": "pt"})
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)}
    document = asdict(state) | {"versions": {"lora_ga_trainer": __version__} | versions}
    (directory / STATE_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_state(directory: Path) -> LoRAGAState:
    """The state that `write_state` wrote.

    Raises:
        ValueError: the file is missing or is none of ours.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{directory} has no {STATE_FILE}, so it is no checkpoint of a LoRA-GA run and its two halves cannot be told "
            "apart. Resume from a `checkpoint-N` that a LoRA-GA trainer wrote."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document.pop("versions")
        return LoRAGAState(**document | {"report": InitReport(**document["report"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Resume from another checkpoint, or copy the file again from where it came."
        ) from error


def check_same_run(state: LoRAGAState, directory: Path) -> LoRAGAState:
    """The state saved in `directory`, if it was made with the LoRA and `ga_*` settings of `state`.

    Raises:
        ValueError: naming the first setting that differs, with both values.
    """
    saved = read_state(directory)
    for group in ("lora", "options"):
        ours, theirs = getattr(state, group), getattr(saved, group)
        for name in theirs:
            if name not in WITHOUT_EFFECT and ours.get(name) != theirs[name]:
                raise ValueError(
                    f"`{name}` is {ours.get(name)!r}, but the checkpoint {directory} was made with {theirs[name]!r}. "
                    "Resume with the settings of the checkpoint, or start a new run in another `output_dir`."
                )
    return saved


def read_tensors(path: Path, expected: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors in `path`, which must have the names and shapes of `expected`.

    Raises:
        ValueError: the file is missing or damaged, or its tensors are others.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}), so this checkpoint is not complete. Resume from another one, or copy the file "
            "again from where it came."
        ) from error
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        name = next(name for name in expected | found if expected.get(name) != found.get(name))
        raise ValueError(
            f"{path} does not fit this model: for {name} it holds {found.get(name)}, the model needs {expected.get(name)}. "
            "Resume with the base model and the `LoraConfig` of the checkpoint."
        )
    return tensors
