"""`initialize_lora_ga` in a loop of one's own, on two processes: no Trainer, no accelerate, torchrun alone.

torchrun --nproc_per_node 2 tests/own_loop_worker.py OUT
"""

import json
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils.memory import should_reduce_batch_size
from forked_python import import_deepspeed
from tiny import peft_pair, tiny_batches
from torch.distributed.fsdp import fully_shard

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.checkpoint.adapter_files import adapter_state_dict
from lora_ga_trainer.distributed import backends
from lora_ga_trainer.distributed.backends import full_tensor
from lora_ga_trainer.gradient import accumulator
from lora_ga_trainer.gradient.objective import language_model_loss
from lora_ga_trainer.initialization import attach_lora_ga, factorization

deepspeed = import_deepspeed()
CONFIG = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact")
ZERO3 = Path(__file__).resolve().parents[1] / "accelerate_configs/cpu/zero3.json"


def batches_of(rank: int) -> list[dict[str, torch.Tensor]]:
    """8 examples, dealt out unevenly: 3 batches here, 1 there."""
    first, second, third, fourth = tiny_batches((1, 2, 3, 2))
    return [[first, second, third], [fourth]][rank]


def initialized(model, batches, **kwargs) -> dict[str, torch.Tensor]:
    initialize_lora_ga(model, batches, CONFIG, disable_tqdm=True, **kwargs)
    return {name: value for name, value in adapter_state_dict(model).items() if name.endswith("frozen")}


def refused(model, batches, **kwargs) -> str:
    """The error, and nothing written."""
    try:
        initialized(model, batches, **kwargs)
    except ValueError as error:
        assert not any(full_tensor(p).any() for n, p in model.named_parameters() if n.endswith("frozen"))
        return str(error)
    raise AssertionError("no error")


def nan_on_the_second(model, batch, num_items):
    loss = language_model_loss(model, batch, num_items)
    return loss * float("nan") if dist.get_rank() == 1 else loss


def no_gradient_on_the_second(model, batch, num_items):
    loss = language_model_loss(model, batch, num_items)
    return loss.detach() if dist.get_rank() == 1 else loss


def in_zero3(rank: int) -> dict[str, torch.Tensor]:
    model, _ = peft_pair()
    attach_lora_ga(model, CONFIG)  # before the engine takes the parameters
    config = json.loads(ZERO3.read_text()) | {
        "bf16": {"enabled": False},
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return initialized(engine.module, batches_of(rank))


def in_fsdp2(rank: int) -> dict[str, torch.Tensor]:
    model, _ = peft_pair()
    attach_lora_ga(model, CONFIG)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    return initialized(model, batches_of(rank))


def kept_by_the_writer(rank: int) -> int:
    """How many tensors of a sharded adapter this process holds to save them."""
    model, _ = peft_pair()
    attach_lora_ga(model, CONFIG)
    fully_shard(model)
    return len(adapter_state_dict(model, keep=rank == 0))


def summed(rank: int) -> dict:
    """Tensors of which some fit into a bucket together, some alone and some not at all; before and after."""
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(size, generator=generator) for size in ((3, 4), (5,), (7, 9), (1,), (), (40,), (2, 2))]
    before = [tensor.clone() for tensor in tensors]
    bucket_bytes, backends.BUCKET_BYTES = backends.BUCKET_BYTES, 100
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor: (calls.append(tensor.numel()), all_reduce(tensor))
    try:
        return {"before": before, "bytes": backends.sum_over_processes(tensors), "after": tensors, "calls": calls}
    finally:
        dist.all_reduce, backends.BUCKET_BYTES = all_reduce, bucket_bytes


def out_of_memory(rank: int, owner: object, name: str) -> str:
    """What this process raises when the second runs out of memory in `owner.name`."""
    function = getattr(owner, name)

    def failing(*args, **kwargs):
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")
        return function(*args, **kwargs)

    config = LoRAGAArguments(ga_sketch_size=10, ga_scale="weight_svd")
    setattr(owner, name, failing)
    try:
        initialize_lora_ga(peft_pair()[0], batches_of(rank), config, disable_tqdm=True)
    except RuntimeError as error:
        return str(error) if should_reduce_batch_size(error) else f"not taken for one: {error}"
    finally:
        setattr(owner, name, function)
    raise AssertionError("no error")


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def main(out: Path) -> None:
    heard = Heard()
    logging.getLogger("lora_ga_trainer").addHandler(heard)
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    nothing: list = []
    found = {
        "world_size": dist.get_world_size(),
        "uneven": initialized(peft_pair()[0], batches_of(rank)),
        "one has none": initialized(peft_pair()[0], tiny_batches((5, 3)) if rank == 1 else nothing),
        "ZeRO-3": in_zero3(rank),
        "FSDP2": in_fsdp2(rank),
        "nan": refused(peft_pair()[0], batches_of(rank), compute_loss=nan_on_the_second),
        "unreached": refused(peft_pair()[0], batches_of(rank), compute_loss=no_gradient_on_the_second),
        "nothing": refused(peft_pair()[0], nothing),
        "warnings": heard.texts,
        "kept": kept_by_the_writer(rank),
        "summed": summed(rank),
        "out of memory": [
            out_of_memory(rank, owner, name)
            for owner, name in (
                (accumulator.GradientSketch, "end_pass"),
                (factorization, "factor_gradient"),
                (factorization, "leading_singular_values"),
            )
        ],
    }
    torch.save(found, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # see backend_worker


if __name__ == "__main__":
    main(Path(sys.argv[1]))
