"""What differs between one process, DDP, DeepSpeed ZeRO-1/2/3 and FSDP2: nothing else imports deepspeed or torch.distributed.

What a run communicates for LoRA-GA, beyond what every forward and backward of its backend does:

    1. counts        how many batches and label tokens each process has, and what went wrong there (small objects)
    2. sketches      all-reduced after each pass over the samples, in buckets: `sum_over_processes`
    3. factors       every process factors its share of the layers and broadcasts A0, B0: `owners_by_cost`, `broadcast`

Most rules go by the parameter, not by the launcher, so that they hold in a loop of one's own as well: a ZeRO-3 parameter is
partitioned by DeepSpeed, an FSDP2 parameter is a `DTensor`, any other is whole on every process (plain, DDP, ZeRO-1/2).
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DummyOptim
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers.integrations import unset_hf_deepspeed_config

# --- processes ------------------------------------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every process, by rank. For small things: it is pickled."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """Let an error inside on one process stop all: one that went on alone would wait for the others for ever.

    Every process has to come through here; nothing inside may communicate.

    Raises:
        ValueError, RuntimeError: as raised inside; on the other processes with the same text, so that all of them take an
            "out of memory" for one and may try again with a smaller batch (`auto_find_batch_size`).
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
"""How much `sum_over_processes` copies at once: enough for a network to be busy, and little beside the sums themselves."""


def sum_over_processes(tensors: Iterable[Tensor]) -> int:
    """Sum each tensor over all processes, in place. Small ones are joined, up to `BUCKET_BYTES`; large ones are not copied.

    Args:
        tensors: contiguous, of one dtype, on one device, of the same shapes on every process.

    Returns:
        the bytes that this process put into the all-reduces; 0 when it is alone.
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
        del flat, part  # or two of them would stand at once
    return sum(tensor.nbytes for tensor in tensors)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in their order, as many together as `BUCKET_BYTES` holds, or one that is larger."""
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
    """The rank that does each task, so that the costliest process has as little as possible: largest task first."""
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
    """Whether DeepSpeed ZeRO-3 has partitioned `parameter`: outside of its gathering it is empty."""
    if "deepspeed" not in sys.modules:  # then nothing is partitioned, and importing it would take seconds
        return False
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    return is_zero_param(parameter)


def exclude_from_ddp_broadcast(model: nn.Module, buffers: list[str]) -> None:
    """Have DDP, which sends all buffers from the first process before every forward, leave out `buffers`: they are the same
    on all processes, and as large as an adapter."""
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds only a part of `parameter`."""
    return is_zero3(parameter) or isinstance(parameter, DTensor)


def input_embedding_weight(model: PeftModel) -> nn.Parameter:
    """The weight of the input embedding itself: that of PEFT's wrappers (`trainable_token_indices`) is computed from it anew at
    each call, which takes a whole one.

    Raises:
        NotImplementedError: by transformers, where a model has several or none, as CLIP.
    """
    embedding = model.get_input_embeddings()
    while isinstance(embedding, AuxiliaryTrainingWrapper):
        embedding = embedding.original_module
    return embedding.weight


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, of which a ZeRO-3 process holds a flat part."""
    if is_zero3(parameter):
        return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]  # DeepSpeed puts it there
    return parameter.shape


def leading_rows(parameter: Tensor) -> Tensor:
    """The first rows of a parameter, detached: all of them, or of a ZeRO-3 parameter those that the first process holds."""
    if not is_zero3(parameter):
        return parameter.detach()
    shape, part = full_shape(parameter), parameter.ds_tensor.detach().flatten()  # type: ignore[attr-defined]  # as above
    width = shape[1:].numel()
    held = min(shape[0], part.numel() // width)
    return part[: held * width].view(held, *shape[1:])


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole of one parameter, detached, where the forward pass uses it. Every process has to call it, in the same order.

    A sharded or offloaded parameter comes as a copy, which stands on every process until it is dropped.
    """
    if is_zero3(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    value = parameter.detach().to(compute_device(parameter))  # an offloaded shard: NCCL sends nothing from the host
    return value.full_tensor() if isinstance(value, DTensor) else value


def write_parameter(parameter: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into `parameter`, cast to its dtype and sharded as it is.

    Every process has to call it, with equal values, in the same order.

    The copies in fp32 that ZeRO keeps of *trainable* parameters are not refreshed. LoRA-GA writes frozen parameters, which
    have none, and on resuming the values that the optimizer's restored state was saved with; after a restart
    `forget_optimizer_state` refreshes them.
    """
    with torch.no_grad():
        if is_zero3(parameter):
            from deepspeed.runtime.zero import GatheredParameters

            # On leaving, rank 0's value goes to every process's part.
            # Not `safe_set_full_fp32_param`: it leaves the weights of the forward pass as they were.
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
    """Where the forward pass uses `parameter`, which offloading may keep elsewhere."""
    if is_zero3(parameter):
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().current_device_name())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != parameter.device.type:
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
    return parameter.device


def batch_device(model: nn.Module) -> torch.device:
    """Where `model`, which may be split over devices, takes its batches: where its first parameter is used.

    Parameters that accelerate's `device_map` offloads are empty ones on "meta" and say nothing; its hooks move what comes in.
    """
    devices = (compute_device(parameter) for parameter in model.parameters())
    return next(device for device in devices if device.type != "meta")


def may_freeze_while_probing(model: nn.Module) -> bool:
    """Whether parameters may be frozen during the estimation. Everywhere they should be, but under FSDP2 they must not.

    ZeRO: a gradient on a trainable parameter, reached by a backward that the engine did not start, is an assertion in
    stages 2 and 3, or slips into the first training step. Frozen, its hooks stay silent.
    FSDP2: at the first forward each group of parameters takes the dtype of its gradients from those that are trainable; if
    none is, training with mixed precision fails later ("attempting to assign a gradient with dtype"). There backward is told
    to compute no parameter's gradient instead, see `probe`.
    """
    return not any(isinstance(parameter, DTensor) for parameter in model.parameters())


# --- optimizers -----------------------------------------------------------------------------------------------------


def optimizer_learning_rates(optimizer: Optimizer, parameters: list[Parameter]) -> list[float] | None:
    """The peak rate at which `optimizer` trains each of the `parameters`; 0 for one that it does not hold.

    To be asked before accelerate prepares the optimizer: ZeRO and FSDP2 put other parameters into it. Where DeepSpeed's
    configuration makes the optimizer there is none yet, and the answer is None.
    """
    if isinstance(optimizer, DummyOptim):
        return None
    # a schedule keeps the rate that it starts from in "initial_lr", and one that climbs further its peak in "max_lr"
    rates = {
        id(parameter): max(float(group.get(key, 0.0)) for key in ("lr", "initial_lr", "max_lr"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return [rates.get(id(parameter), 0.0) for parameter in parameters]


def forget_optimizer_state(optimizer: Optimizer, parameters: list[Tensor]) -> None:
    """Drop momenta and step counts of the trainable `parameters`, whose values have just been written.

    ZeRO keeps one flat fp32 copy and one state for many parameters, so there all of them are dropped and all copies taken
    anew; `check_restart` sees to it that nothing else trains.
    """
    inner: Any = optimizer  # what accelerate and DeepSpeed wrap around an optimizer has attributes of its own
    while isinstance(inner, AcceleratedOptimizer):  # DeepSpeed's wrapper is one, too
        inner = inner.optimizer
    if is_zero_optimizer(inner):
        inner.refresh_fp32_params()
        inner.optimizer.state.clear()
        for group in inner.optimizer.param_groups:
            group.pop("step", None)  # where DeepSpeed's FusedAdam counts
        return
    for parameter in parameters:
        inner.state.pop(parameter, None)


def is_zero_optimizer(optimizer: Optimizer) -> bool:
    """Whether DeepSpeed's ZeRO, of stage 1 to 3, stands around the real optimizer."""
    if "deepspeed" not in sys.modules:
        return False
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    return isinstance(optimizer, ZeROOptimizer)


# --- after a training -----------------------------------------------------------------------------------------------


def end_sharding(trained: nn.Module) -> None:
    """Forget the ZeRO-3 of a training that is over, so that `from_pretrained` loads a whole model on every process again.

    DeepSpeed 0.19 leaves the engine in hooks and a list of its own even when it is destroyed, so its tensors are dropped here.

    Args:
        trained: the trainer's `model_wrapped`, which is not to be used again.
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
