"""How a run is launched, what LoRA-GA cannot do under each launch, and which launch can resume which checkpoints."""

import glob
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .backends import input_embedding_weight

WHOLE_PARAMETERS = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_MUSA,
    DistributedType.MULTI_HPU,
)
"""Every process has all of the model: one process, or DDP."""


@dataclass(frozen=True)
class Launch:
    """How a run is spread over processes. It decides which other runs can read its optimizer state."""

    backend: str
    """`DDP` (one process is a DDP of one), `ZeRO-0` to `ZeRO-3`, or `FSDP2`."""
    world_size: int

    def __str__(self) -> str:
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return processes if self == Launch("DDP", 1) else f"{self.backend} over {processes}"


def launch_of(accelerator: Accelerator, model: nn.Module) -> Launch:
    """How this run was launched. A model that was sharded before accelerate sees it, as by transformers' `DistributedConfig`,
    counts as FSDP2.

    Raises:
        ValueError: with FSDP1, tensor, context or sequence parallelism, a TPU or Megatron-LM, for which LoRA-GA's estimation
            is not implemented.
    """
    kind = accelerator.distributed_type
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    if splits_examples(accelerator) or any(map(splits_model, meshes)):
        raise ValueError(
            "This run splits its model or its sequences over processes (tensor, context or sequence parallelism), but LoRA-GA "
            "assumes that every process has its own examples. Launch it with data parallelism only: DDP, DeepSpeed ZeRO or "
            "FSDP2."
        )
    if meshes and kind in WHOLE_PARAMETERS:
        return Launch("FSDP2", accelerator.num_processes)
    if kind in WHOLE_PARAMETERS:
        return Launch("DDP", accelerator.num_processes)
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return Launch(f"ZeRO-{stage}", accelerator.num_processes)
    if accelerator.is_fsdp2:
        return Launch("FSDP2", accelerator.num_processes)
    raise ValueError(
        f"This run was launched with {kind.value}{' 1' if kind == DistributedType.FSDP else ''}, which LoRA-GA does not "
        "support. Use one process, DDP, DeepSpeed ZeRO-1/2/3 or FSDP2 (`fsdp_version: 2` in accelerate's configuration)."
    )


def splits_examples(accelerator: Accelerator) -> bool:
    """Whether accelerate's or DeepSpeed's own configuration makes several processes share one example."""
    parallelism, plugin = accelerator.parallelism_config, accelerator.state.deepspeed_plugin
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        return True
    return plugin is not None and plugin.deepspeed_config.get("tensor_parallel", {}).get("autotp_size", 0) > 1


def splits_model(mesh: DeviceMesh) -> bool:
    """Whether parameters on `mesh` are split for tensor or expert parallelism, by transformers' names of its dimensions."""
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
    return sizes.get("tp", 1) * sizes.get("ep", 1) > 1


def launch_has_schedule(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed's configuration sets the learning rate's schedule."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and "scheduler" in plugin.deepspeed_config


def check_checkpointing(launch: Launch, use_reentrant: bool) -> None:
    """Refuse reentrant gradient checkpointing under FSDP2: it cannot run a backward limited to some inputs.

    Raises:
        ValueError: both are on.
    """
    if launch.backend == "FSDP2" and use_reentrant:
        raise ValueError(
            "`gradient_checkpointing_kwargs={'use_reentrant': True}` does not work with LoRA-GA's estimation under FSDP2. "
            "Leave it out: without it checkpointing is not reentrant, which is what PyTorch recommends."
        )


def check_fsdp2(accelerator: Accelerator, torch_compile: bool) -> None:
    """Refuse accelerate 1.15's wrappers for an FSDP2 model that rename its layers, or that are no `PeftModel`.

    PEFT finds an adapter by the names of its layers, and would silently save an empty one.

    Raises:
        ValueError: FSDP's own activation checkpointing, or `torch_compile`.
    """
    if not accelerator.is_fsdp2:
        return
    if accelerator.state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "`fsdp_activation_checkpointing: true` renames the layers, so PEFT would save an empty adapter. Use "
            "`gradient_checkpointing=True` of the training arguments instead."
        )
    if torch_compile:
        raise ValueError(
            "`torch_compile=True` does not work with LoRA-GA under FSDP2, where accelerate compiles the model before training "
            "begins. Leave it out, or launch with DDP or DeepSpeed."
        )


def check_offloading(option: str) -> None:
    """Refuse `option`, which moves activations from the accelerator to the host, if torch finds no accelerator.

    TRL 1.16 and transformers 5.23 then fail with an error that does not say so.

    Raises:
        ValueError: there is none.
    """
    if not torch.accelerator.is_available():
        raise ValueError(
            f"{option} moves activations from a GPU to the host, but torch finds no GPU or other accelerator here. Leave it "
            "out: the activations are already on the host."
        )


def check_shared_embeddings(launch: Launch, model: PeftModel) -> None:
    """Refuse under FSDP2 what accelerate cannot shard: encoder and decoder with one embedding, as in T5 and BART.

    accelerate 1.15 puts the embedding and the head into a group of their own, but torch 2.13 requires all holders of a
    shared weight in one group ("is shared with a parameter already managed by another FSDP group").

    Raises:
        ValueError: more than one embedding module holds the input embedding's weight.
    """
    if launch.backend != "FSDP2":
        return
    weight = input_embedding_weight(model)
    holders = [
        name for name, module in model.named_modules() if isinstance(module, nn.Embedding) and module.weight is weight
    ]
    if len(holders) > 1:
        raise ValueError(
            f"{', '.join(holders)} share one weight, which accelerate cannot shard with FSDP2. Launch with DDP or DeepSpeed "
            "ZeRO (accelerate_configs/zero3.yaml)."
        )


def check_restart(launch: Launch, others: list[str]) -> None:
    """Refuse restarts if the optimizer state of dA, dB cannot be separated from that of the `others` that also train.

    Raises:
        ValueError: under ZeRO-1/2/3 if something else trains; under ZeRO-0, whose optimizers keep their copies differently.
    """
    if launch.backend == "ZeRO-0":
        raise ValueError(
            "`ga_restart_steps` does not work with DeepSpeed's stage 0. Launch with stage 1, 2 or 3, or with DDP."
        )
    if launch.backend.startswith("ZeRO") and others:
        raise ValueError(
            f"`ga_restart_steps` resets the optimizer state of the adapter's factors, but {launch.backend} does not keep it "
            f"separate from that of {others[0]}, which also trains. Leave out `modules_to_save`, `bias` and `lora_bias`, or "
            "launch with DDP or FSDP2."
        )


def check_resumable_launch(saved: Launch, present: Launch) -> None:
    """Whether `present` can read the optimizer state that `saved` wrote.

    Raises:
        ValueError: another backend, or another number of ZeRO processes.
    """
    same_files = saved.backend == present.backend
    if same_files and (saved.backend in ("DDP", "FSDP2") or saved.world_size == present.world_size):
        return
    raise ValueError(
        f"The checkpoint was saved by {saved}, and {present} cannot read its optimizer state. Resume with {saved}, or start "
        "a new run from the exported weights (`lora-ga export --checkpoint_dir ... --out ... --merge`). "
        "Only DDP, one process included, and FSDP2 can resume with another number of processes."
    )


def check_resume_path(present: Launch, directory: Path) -> None:
    """Refuse a checkpoint that DeepSpeed 0.19 would not find: it takes the path for a pattern.

    Raises:
        ValueError: under ZeRO, if the path has a '*', '?' or '['.
    """
    if present.backend.startswith("ZeRO") and glob.escape(str(directory)) != str(directory):
        raise ValueError(
            f"The checkpoint {directory} cannot be resumed under {present.backend}: DeepSpeed treats '*', '?' and '[' in its "
            "path as a pattern and would read other files. Rename the folder."
        )
