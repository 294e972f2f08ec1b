"""One initialization of `scaling.py`, measured in processes of its own, which are this script as well:

    [torchrun --standalone --nproc_per_node N] benchmarks/scaling_point.py POINT OUT

POINT is a `Point` in JSON; what was found goes to the file OUT.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from memory_environment import MALLOC
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, set_seed

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.distributed.backends import gather_objects, rank, world_size
from lora_ga_trainer.gradient.estimation import Accumulator, make_accumulator

VOCABULARY = 1000
"""Small: the head is no target, and its logits should not decide the memory."""
HEAD_WIDTH = 64
OPTIONS = LoRAGAArguments()


@dataclass(frozen=True)
class Point:
    """One initialization."""

    samples: int
    width: int
    layers: int
    rank: int
    batch_size: int
    length: int
    """Tokens per sample."""
    processes: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        return (
            f"{self.samples} samples of {self.length} tokens in batches of {self.batch_size}, width {self.width}, "
            f"{self.layers} layers, rank {self.rank}, processes {self.processes}, {self.device}"
        )


def random_llama(point: Point, device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=point.width,
        intermediate_size=round(11 / 4 * point.width / 64) * 64,  # Llama-2-7B's ratio
        num_attention_heads=point.width // HEAD_WIDTH,
        num_hidden_layers=point.layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=point.length,
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def random_batches(point: Point, device: torch.device) -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, VOCABULARY, (point.samples, point.length)).to(device)
    return [{"input_ids": ids, "labels": ids} for ids in tokens.split(point.batch_size)]


def with_lora(model: PreTrainedModel, point: Point) -> PeftModel:
    targets = "all-linear"  # but the head
    return get_peft_model(
        model,
        LoraConfig(r=point.rank, lora_alpha=16, use_rslora=True, target_modules=targets, task_type="CAUSAL_LM"),
    )


def held_bytes(model: PeftModel) -> dict[str, int]:
    """What the accumulators of all layers hold in the first pass, the largest, and what the gradients would take."""
    weights = model.lora_ga.weights.values()
    accumulators = [make_accumulator(weight, OPTIONS) for weight in weights]
    gradient = sum(weight.layer.get_base_layer().weight.nbytes for weight in weights)  # as large, both float32
    return {"sketch_bytes": bytes_of(accumulators), "gradient_bytes": gradient}


def bytes_of(accumulators: list[Accumulator]) -> int:
    """What they hold; a matrix that sketches share counts once."""
    tensors = [value for acc in accumulators for value in vars(acc).values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def worker(point: Point, out: Path) -> None:
    """Measure `point` in this process, or in this and its siblings under torchrun; the first writes what they found."""
    device = torch.device(point.device, int(os.environ.get("LOCAL_RANK", 0)) if point.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if point.processes > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend)
        assert dist.get_backend() == backend
    assert world_size() == point.processes

    found = measure_here(point, device)
    if rank() == 0:
        out.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)  # with gloo the interpreter's own end aborts now and then, when all is done


def measure_here(point: Point, device: torch.device) -> dict[str, Any]:
    """What this process, together with its siblings, finds."""
    set_seed(0)
    model = random_llama(point, device)
    batches = random_batches(point, device)[rank() :: world_size()]
    # Once before, on one batch: kernels and thread buffers that any first use loads are no cost of an initialization.
    warm = with_lora(model, point)
    initialize_lora_ga(warm, batches[:1], OPTIONS, disable_tqdm=True)
    model = with_lora(warm.unload(), point)
    report = initialize_lora_ga(model, batches, OPTIONS, disable_tqdm=True)

    peaks = gather_objects(report.extra_peak_bytes)
    return {
        "seconds": max(gather_objects(report.seconds)),
        "extra_peak_bytes": None if None in peaks else max(peaks),
        "all_reduced_bytes": report.all_reduced_bytes,
        **held_bytes(model),
    }


def measure(point: Point) -> dict[str, Any]:
    """What the processes of one `point` found.

    Raises:
        RuntimeError: with what they said, if one failed.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(point.processes)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        finished = subprocess.run(
            [
                sys.executable,
                *(torchrun if point.processes > 1 else []),
                __file__,
                json.dumps(asdict(point)),
                str(out),
            ],
            env=os.environ | MALLOC | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if finished.returncode:
            raise RuntimeError(f"{point} failed:\n{finished.stderr}")
        return json.loads(out.read_text())


if __name__ == "__main__":
    worker(Point(**json.loads(sys.argv[1])), Path(sys.argv[2]))
