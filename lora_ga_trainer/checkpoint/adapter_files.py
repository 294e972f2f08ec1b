"""An adapter in delta form is saved as an ordinary LoRA of rank 2R, and can be resumed exactly.

    adapter_model.safetensors   lora_A = [A0 + dA; dA] (2R×I), lora_B = [dB, B0] (O×2R): stock PEFT on the untouched base;
                                after each restart 2R more rows and columns, the history; and last of all those of the
                                adapter that this stage of training started from
    adapter_config.json         r doubled, and an alpha with which the scaling is alpha/r, without rsLoRA; see `scaling`
    lora_ga.tensors             A0 (R×I) per layer: dA, dB, B0 and the history are in the adapter file unchanged, A0 is not
    lora_ga.json                the options, the adapter's own r, alpha and rsLoRA, alignment per layer, versions; see `state`

This is the form with the offset; without it, the file is the adapter of rank R itself. `layouts` has both.

Shapes: O out features, I in features, R the rank that trains.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adapter.adapter import LoRAGAAdapter
from ..adapter.state import LoRAGAState
from ..compatibility import without_other_adapters
from ..distributed.backends import compute_device, full_shape, full_tensor, gather_objects, is_sharded, write_parameter
from .layouts import LAYOUTS, Layout
from .model_card import create_or_update_model_card
from .scaling import form_of
from .state import check_same_run, write_state

FROZEN_FILE = "lora_ga.tensors"
"""In the format of safetensors, but not of that name: servers load the tensors of every `*.safetensors` in a folder."""
FORMER_FROZEN_FILE = "lora_ga.safetensors"
"""Its name in 0.1.0."""


def layout_of(adapter: LoRAGAAdapter) -> Layout:
    return LAYOUTS[adapter.state.options["ga_offset"]]


def ranks_in_file(adapter: LoRAGAAdapter, restarts: int) -> dict[str, int]:
    """The rank that each weight presents to PEFT and has in the file after so many restarts, by name."""
    times, earlier = layout_of(adapter).times * (restarts + 1), adapter.state.earlier_ranks
    return {name: times * weight.rank + earlier.get(name, 0) for name, weight in adapter.weights.items()}


@contextmanager
def config_as_in_file(adapter: LoRAGAAdapter) -> Iterator[LoraConfig]:
    """While inside, the adapter's `LoraConfig` is that of its file, which has the matrices that its layers present."""
    trained = adapter.lora_config
    presented = form_of(trained, adapter.weights, ranks_in_file(adapter, len(adapter.state.restarts)))
    try:
        adapter.model.peft_config[adapter.name] = presented
        yield presented
    finally:
        adapter.model.peft_config[adapter.name] = trained


def file_has_embeddings(peft_model: PeftModel, adapter_name: str) -> bool:
    """Whether PEFT saves the embeddings with the adapter. It may ask the hub, so this is decided once, by the first process."""
    tensors = stand_ins(peft_model.state_dict(keep_vars=True))
    sizes = [
        len(get_peft_model_state_dict(peft_model, tensors, adapter_name=adapter_name, save_embedding_layers=decision))
        for decision in ("auto", False)
    ]
    return gather_objects(sizes[0] > sizes[1])[0]


def stand_ins(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The index of each of `tensors`, as a tensor. PEFT only has to select those of an adapter: with the values, it would
    gather all weights of a model that transformers has sharded, and return copies."""
    return {name: torch.tensor(number, device="cpu") for number, name in enumerate(tensors)}


def adapter_parameters(peft_model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """The parameters and buffers of an adapter, still sharded, under PEFT's names for its file.

    They include `modules_to_save`, trained biases and new tokens; each matrix in delta form counts as its two halves.

    Raises:
        ValueError: no matrix of the adapter is found.
    """
    tensors = peft_model.state_dict(keep_vars=True)
    chosen = get_peft_model_state_dict(
        peft_model,
        without_other_adapters(stand_ins(tensors), peft_model, adapter_name),
        adapter_name=adapter_name,
        save_embedding_layers=peft_model.lora_ga.state.has_embeddings,
    )
    all_tensors = list(tensors.values())
    found = {name: all_tensors[int(stand_in)] for name, stand_in in chosen.items()}
    if adapter_name == peft_model.lora_ga.name and not any(".lora_A." in name for name in found):
        raise ValueError(
            f"PEFT finds no matrix of the adapter {adapter_name!r} under the names of the model's layers: something has "
            "since wrapped and renamed them, such as torch's `checkpoint_wrapper`. Leave it out, and checkpoint "
            "with `gradient_checkpointing=True`."
        )
    return found


def adapter_state_dict(peft_model: PeftModel, keep: bool = True) -> dict[str, Tensor]:
    """The entries of `peft_model.state_dict()` that belong to adapters, whole, on the CPU; the base model stays sharded.

    Every process must call it. Without `keep`, a process only takes part in gathering and gets nothing.
    """
    wanted = {id(value) for name in peft_model.peft_config for value in adapter_parameters(peft_model, name).values()}
    whole = {}
    for name, value in peft_model.state_dict(keep_vars=True).items():
        if id(value) in wanted and (keep or is_sharded(value)):
            gathered = full_tensor(value)
            if keep:
                whole[name] = gathered.cpu()
    return whole


def bind_files(adapter: LoRAGAAdapter) -> None:
    """Make `save_pretrained` and `load_adapter` of the adapter's model write and read the files above; `Trainer` calls them
    too. The model card saved with them has a section on LoRA-GA.

    They are bound to the instance, because PEFT has no hook for an adapter's own file format, and its `load_adapter`
    silently drops unknown keys.
    """
    peft_model = adapter.model
    peft_model.lora_ga = adapter
    peft_model.save_pretrained = partial(save_pretrained, peft_model)
    peft_model.load_adapter = partial(load_adapter, peft_model)
    peft_model.create_or_update_model_card = partial(create_or_update_model_card, peft_model)
    peft_model.merge_and_unload = partial(merge_and_unload, peft_model)


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

    If the parameters are sharded and no `state_dict` is given, every process must call it.

    Raises:
        ValueError: the adapter has not been initialized yet, so there is nothing to save; or
            `path_initial_model_for_weight_conversion` is given; or `state_dict` lacks a part of the adapter.
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
        **kwargs,
    )
    adapter, state = peft_model.lora_ga, peft_model.lora_ga.state
    selected_adapters = selected_adapters or list(peft_model.peft_config)
    if adapter.is_deleted or adapter.name not in selected_adapters:
        stock_save(selected_adapters=selected_adapters, state_dict=state_dict, is_main_process=is_main_process)
        return
    if not adapter.is_initialized:
        raise ValueError(
            f"The adapter {adapter.name!r} has not been initialized by LoRA-GA yet, so saving it would write zeros. "
            "Call `trainer.train()` or `initialize_lora_ga(...)` first."
        )
    in_memory = adapter_state_dict(peft_model, keep=is_main_process) if state_dict is None else state_dict
    if not is_main_process:
        return
    for weight in adapter.weights.values():
        if f"{weight.path}.lora_A.{adapter.name}.frozen" not in in_memory:
            raise ValueError(
                f"The `state_dict` to be saved lacks A0 of {weight.name}, as that of a plain `Trainer` does under ZeRO-3 and "
                "FSDP2, where it leaves out what is frozen. Train with one of the LoRA-GA trainers, or with "
                "`class MyTrainer(LoRAGAMixin, Trainer)`, which save all of the adapter."
            )
    in_memory = in_memory | histories(adapter)
    layout = layout_of(adapter)
    joined = layout.join(in_memory)
    # decided when the adapter was attached: PEFT would ask the hub again at every save
    options = {"save_embedding_layers": state.has_embeddings} | kwargs
    with config_as_in_file(adapter):
        for name in selected_adapters:
            tensors = without_other_adapters(joined, peft_model, name)
            stock_save(selected_adapters=[name], state_dict=tensors, **options)
    directory = adapter_directory(save_directory, adapter.name)
    resume_only = layout.keep(without_adapter_name(in_memory, adapter.name))
    # as in PEFT's own file: a layer that occurs several times in the model has only its first name
    names = layout.keep(adapter_parameters(peft_model, adapter.name))
    resume_only = {name: resume_only[name].contiguous() for name in names}
    save_file(resume_only, directory / FROZEN_FILE, metadata={"format": "pt"})
    (directory / FORMER_FROZEN_FILE).unlink(missing_ok=True)
    write_state(directory, state)


def merge_and_unload(peft_model: PeftModel, *args: Any, **kwargs: Any) -> nn.Module:
    """PEFT's `merge_and_unload`. The merged model loses the base's name, which the next adapter would otherwise get."""
    model = peft_model.base_model.merge_and_unload(*args, **kwargs)
    model.name_or_path = ""
    return model


def load_adapter(
    peft_model: PeftModel, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **kwargs: Any
) -> Any:
    """`PeftModel.load_adapter`; for the adapter in delta form, `model_id` must be a checkpoint of the same kind of run.

    Everything is read and checked before the first weight is written. Every process must call it. With DeepSpeed, load
    before `deepspeed.initialize`, or together with the engine's own `load_checkpoint`, which restores its fp32 copies; the
    trainer does the latter.

    Raises:
        ValueError: a file is missing or damaged, or was made with another `LoraConfig` or other `ga_*` options.
    """
    adapter = peft_model.lora_ga
    if adapter_name != adapter.name:
        return type(peft_model).load_adapter(peft_model, model_id, adapter_name, is_trainable=is_trainable, **kwargs)
    directory = Path(model_id)
    saved = check_adapter(adapter, directory)
    on_disk, resume_only = load_file(directory / SAFETENSORS_WEIGHTS_NAME), load_file(frozen_file(directory))
    values = layout_of(adapter).split(on_disk, resume_only)
    for name, parameter in adapter_parameters(peft_model, adapter_name).items():
        write_parameter(parameter, values[name])
    for name, half in adapter.halves.items():
        history = values[f"{name.removesuffix(f'.{adapter_name}')}.history"]
        half.history = None if history is None else history.to(compute_device(half.trainable))
    adapter.state.report, adapter.state.restarts = saved.report, saved.restarts
    if not is_trainable:  # as PEFT does
        peft_model.eval()


def check_adapter(adapter: LoRAGAAdapter, directory: Path) -> LoRAGAState:
    """The state saved in `directory`, if the files there hold exactly the `adapter`, made with its settings.

    Raises:
        ValueError: a file is missing or damaged, or was made with another `LoraConfig` or other `ga_*` options.
    """
    saved = check_same_run(adapter.state, directory)
    in_memory = {
        name: torch.empty(full_shape(parameter), dtype=torch.float32, device="meta")
        for name, parameter in adapter_parameters(adapter.model, adapter.name).items()
    }
    layout = layout_of(adapter)
    resume_only = {name: list(value.shape) for name, value in layout.keep(in_memory).items()}
    on_disk = {name: list(value.shape) for name, value in layout.join(in_memory).items()}
    for name, rank in ranks_in_file(adapter, len(saved.restarts)).items():
        weight = adapter.weights[name]
        for matrix, side in ((f"{weight.path}.lora_A.weight", 0), (f"{weight.path}.lora_B.weight", 1)):
            if matrix in on_disk:  # not the further names of a layer that occurs several times
                on_disk[matrix][side] = weight.experts * rank
    check_tensors(frozen_file(directory), resume_only)
    check_tensors(directory / SAFETENSORS_WEIGHTS_NAME, on_disk)
    return saved


def histories(adapter: LoRAGAAdapter) -> dict[str, Tensor]:
    """What restarts have frozen, on the CPU, under the names that the model's `state_dict()` would use."""
    return {f"{name}.history": half.history.cpu() for name, half in adapter.halves.items() if half.history is not None}


def frozen_file(directory: Path) -> Path:
    """The file of the initial factors in `directory`, under its present name unless only the former one is there."""
    present, former = directory / FROZEN_FILE, directory / FORMER_FROZEN_FILE
    return former if former.is_file() and not present.is_file() else present


def adapter_directory(save_directory: str | Path, adapter_name: str) -> Path:
    """Where PEFT puts an adapter's files: one not named "default" has its own folder."""
    return Path(save_directory) if adapter_name == "default" else Path(save_directory, adapter_name)


def without_adapter_name(in_memory: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The parts of the adapter's matrices A, under PEFT's names in files."""
    infix = f".lora_A.{adapter_name}."
    return {key.replace(infix, ".lora_A."): value for key, value in in_memory.items() if infix in key}


def check_tensors(path: Path, expected: dict[str, list[int]]) -> None:
    """Check that `path` has the tensors of `expected`, by name and shape, and no others, which PEFT would silently drop.

    Raises:
        ValueError: the file is missing or damaged, or its tensors differ.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}), so this checkpoint is not complete. Resume from another one, or copy the file "
            "again from its source."
        ) from error
    if found != expected:
        name = next(name for name in expected | found if expected.get(name) != found.get(name))
        raise ValueError(
            f"{path} does not fit this model: for {name} it holds {found.get(name)}, the model needs {expected.get(name)}. "
            "Resume with the base model and the `LoraConfig` of the checkpoint."
        )
