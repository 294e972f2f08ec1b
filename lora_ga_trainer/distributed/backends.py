"""The differences between one process, DDP, DeepSpeed ZeRO-1/2/3 and FSDP2.

Only this folder imports deepspeed or torch.distributed.

What LoRA-GA communicates, beyond every forward and backward of the backend:

    1. counts        how many batches and label tokens each process has, and what went wrong there (small objects)
    2. sketches      all-reduced after each pass over the samples, in buckets: `sum_over_processes`
    3. factors       every process factors its share of the layers and broadcasts A0, B0: `owners_by_cost`, `broadcast`

Most rules look at the parameter, not at the launcher, so they also hold in a custom training loop: a ZeRO-3 parameter is
partitioned by DeepSpeed, an FSDP2 parameter is a `DTensor`, and any other is whole on every process (plain, DDP, ZeRO-1/2).
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.integrations import unset_hf_deepspeed_config

# --- processes ------------------------------------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every process, by rank. Only for small objects: they are pickled."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """Make an error inside, on one process, stop all of them: otherwise the others would wait forever.

    Every process must enter it; nothing inside may communicate.

    Raises:
        ValueError, RuntimeError: as raised inside; on the other processes with the same text, so that all of them recognize
            an "out of memory" and can retry with a smaller batch (`auto_find_batch_size`).
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        gather_objects(kind(str(error)))
        raise
    for found in gather_objects(None):
        if found is not None:
            raise found


BUCKET_BYTES = 64 * 2**20
"""How much `sum_over_processes` copies at once: enough to keep a network busy, and little compared with the sums."""


def sum_over_processes(tensors: Iterable[Tensor]) -> int:
    """Sum each tensor over all processes, in place. Small ones are joined, up to `BUCKET_BYTES`; large ones are not copied.

    Args:
        tensors: contiguous, of one dtype, on one device, of the same shapes on every process.

    Returns:
        the bytes that this process put into the all-reduces; 0 for a single process.
    """
    if world_size() == 1:
        return 0
    tensors = list(tensors)
    for bucket in _buckets(tensors):
        if len(bucket) == 1:
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
        del flat, part  # otherwise two of them would exist at once
    return sum(tensor.nbytes for tensor in tensors)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in order, in groups of up to `BUCKET_BYTES`; a larger one is its own group."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.nbytes
    if bucket:
        yield bucket


def owners_by_cost(costs: dict[str, int]) -> dict[str, int]:
    """The rank that does each task, so as to minimize the largest load: greedily, largest task first."""
    loads = [0] * world_size()
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def broadcast(tensor: Tensor, source: int) -> None:
    """Overwrite `tensor` with that of rank `source`, so that all processes hold the same bits."""
    if world_size() > 1:
        dist.broadcast(tensor, src=source)


# --- parameters -----------------------------------------------------------------------------------------------------


def is_zero3(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned `parameter`, which is then empty unless gathered."""
    if "deepspeed" not in sys.modules:  # then nothing is partitioned, and importing it would take seconds
        return False
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    return is_zero_param(parameter)


def exclude_from_ddp_broadcast(model: nn.Module, buffers: list[str]) -> None:
    """Exclude `buffers` from those that DDP broadcasts before every forward: they are the same on all processes, and as large
    as an adapter."""
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds only a part of `parameter`."""
    return is_zero3(parameter) or isinstance(parameter, DTensor)


def input_embedding_weight(model: PeftModel) -> nn.Parameter:
    """The weight of the input embedding itself. PEFT's wrappers (`trainable_token_indices`) compute theirs from it at each
    call, for which it must be whole.

    Raises:
        NotImplementedError: by transformers, if the model has several or none, like CLIP.
    """
    embedding = model.get_input_embeddings()
    while isinstance(embedding, AuxiliaryTrainingWrapper):
        embedding = embedding.original_module
    return embedding.weight


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter; a ZeRO-3 process holds only a flat part."""
    if is_zero3(parameter):
        return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]  # DeepSpeed puts it there
    return parameter.shape


def leading_rows(parameter: Tensor) -> Tensor:
    """The first rows of a parameter, detached: all of them, or for ZeRO-3 those that the first process holds."""
    if not is_zero3(parameter):
        return parameter.detach()
    shape, part = full_shape(parameter), parameter.ds_tensor.detach().flatten()  # type: ignore[attr-defined]  # as above
    width = shape[1:].numel()
    held = min(shape[0], part.numel() // width)
    return part[: held * width].view(held, *shape[1:])


def full_tensor(parameter: Tensor) -> Tensor:
    """One whole parameter, detached, where the forward pass uses it. Every process must call it, in the same order.

    A sharded or offloaded parameter comes as a copy, which every process holds until it is dropped.
    """
    if is_zero3(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    value = parameter.detach().to(compute_device(parameter))  # for an offloaded shard: NCCL cannot send from the host
    return value.full_tensor() if isinstance(value, DTensor) else value


def write_parameter(parameter: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into `parameter`, cast to its dtype and sharded as it is.

    Every process must call it, with equal values, in the same order.

    ZeRO's fp32 copies of *trainable* parameters are not refreshed. LoRA-GA writes frozen parameters, which have none, and on
    resuming the values with which the restored optimizer state was saved; after a restart, `forget_optimizer_state` refreshes
    the copies.
    """
    with torch.no_grad():
        if is_zero3(parameter):
            from deepspeed.runtime.zero import GatheredParameters

            # On leaving, rank 0's value goes to every process's part.
            # Not `safe_set_full_fp32_param`: it does not change the weights of the forward pass.
            with GatheredParameters([parameter], modifier_rank=0):
                if rank() == 0:
                    parameter.copy_(value)
            return
        if isinstance(parameter, DTensor):
            # Every process has the value: with `src_data_rank=None` it cuts its own shard, and nothing is sent.
            value = value.to(parameter.device_mesh.device_type, parameter.dtype)
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def compute_device(parameter: Tensor) -> torch.device:
    """Where the forward pass uses `parameter`, even if offloading keeps it elsewhere."""
    if is_zero3(parameter):
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().current_device_name())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != parameter.device.type:
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
    return parameter.device


def batch_device(model: nn.Module) -> torch.device:
    """The device for the batches of `model`, which may be split over several: where its first parameter is used.

    Parameters that accelerate's `device_map` offloads are empty, on "meta", and do not count; its hooks move the inputs.
    """
    devices = (compute_device(parameter) for parameter in model.parameters())
    return next(device for device in devices if device.type != "meta")


def may_freeze_while_probing(model: nn.Module) -> bool:
    """Whether parameters may be frozen during the estimation. They should be, except under FSDP2, where they must not.

    ZeRO: if a backward that the engine did not start reaches a trainable parameter, its gradient fails an assertion in stages
    2 and 3, or leaks into the first training step. The hooks of a frozen parameter stay silent.
    FSDP2: at the first forward, each group of parameters takes the dtype of its gradients from the trainable ones. If there
    are none, training with mixed precision fails later ("attempting to assign a gradient with dtype"). There, `probe` instead
    keeps backward from computing any parameter's gradient.
    """
    return not any(isinstance(parameter, DTensor) for parameter in model.parameters())


# --- optimizers -----------------------------------------------------------------------------------------------------


def optimizer_learning_rates(optimizer: Optimizer, scheduler: Any) -> dict[Tensor, float]:
    """The peak rate at which each parameter of the model trains, of the two as accelerate prepared them.

    A schedule keeps the rate that it starts from in "initial_lr", and one that climbs further its peak in "max_lr" (OneCycleLR)
    or in its own `max_lrs` (CyclicLR, DeepSpeed's). What a function of one's own makes of the rate (LambdaLR) is not known.
    """
    optimizer, scheduler = unwrapped(optimizer), unwrapped(scheduler)
    peaks = vars(scheduler).get("max_lrs", [])
    rates: dict[Tensor, float] = {}
    for index, (group, parameters) in enumerate(zip(optimizer.param_groups, trained_groups(optimizer), strict=True)):
        # Adafactor without a rate has None
        known = [group.get(key) or 0.0 for key in ("lr", "initial_lr", "max_lr")] + peaks[index : index + 1]
        rates |= dict.fromkeys(parameters, max(map(float, known)))
    return rates


def unwrapped(prepared: Any) -> Any:
    """The optimizer or the schedule inside of accelerate's wrappers."""
    while isinstance(prepared, AcceleratedOptimizer):  # so is DeepSpeed's wrapper
        prepared = prepared.optimizer
    while isinstance(prepared, AcceleratedScheduler):
        prepared = prepared.scheduler
    return prepared


def trained_groups(optimizer: Optimizer) -> list[list[Tensor]]:
    """The model's own parameters in each group of an unwrapped optimizer; DeepSpeed's groups hold flat copies of them."""
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            groups: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
            for index, part in enumerate(optimizer.fp16_groups):
                groups[optimizer.sub_group_to_group_id[index]] += part
            return groups
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            return optimizer.bit16_groups
        if isinstance(optimizer, BF16_Optimizer):  # of ZeRO-0 and of ZeRO-1 with sums in float32
            return optimizer.bf16_groups
    return [group["params"] for group in optimizer.param_groups]


def forget_optimizer_state(optimizer: Optimizer, parameters: list[Tensor]) -> None:
    """Drop momenta and step counts of the trainable `parameters`, whose values have just been written.

    ZeRO keeps one flat fp32 copy and one state for many parameters, so all states are dropped and all copies refreshed;
    `check_restart` ensures that nothing else trains.
    """
    inner = unwrapped(optimizer)  # accelerate's and DeepSpeed's wrappers have their own attributes
    if is_zero_optimizer(inner):
        inner.refresh_fp32_params()
        inner.optimizer.state.clear()
        for group in inner.optimizer.param_groups:
            group.pop("step", None)  # where DeepSpeed's FusedAdam counts
        return
    for parameter in parameters:
        inner.state.pop(parameter, None)


def is_zero_optimizer(optimizer: Optimizer) -> bool:
    """Whether DeepSpeed's ZeRO, stage 1 to 3, wraps the real optimizer."""
    if "deepspeed" not in sys.modules:
        return False
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    return isinstance(optimizer, ZeROOptimizer)


# --- after a training -----------------------------------------------------------------------------------------------


def end_sharding(trained: nn.Module) -> None:
    """Undo ZeRO-3 after training, so that `from_pretrained` loads a whole model on every process again.

    Hooks and a list in DeepSpeed 0.19 keep the engine alive even after it is destroyed, so its tensors are dropped here.

    Args:
        trained: the trainer's `model_wrapped`, which must not be used again.
    """
    unset_hf_deepspeed_config()
    if "deepspeed" in sys.modules:
        from deepspeed import DeepSpeedEngine
        from deepspeed.runtime.zero import parameter_offload

        parameter_offload.FWD_MODULE_STACK.clear()
        if isinstance(trained, DeepSpeedEngine):
            for parameter in trained.module.parameters():
                if is_zero3(parameter):
                    parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)
                parameter.data = parameter.new_empty(0)
            vars(trained.optimizer).clear()
            vars(trained).clear()
