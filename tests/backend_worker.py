"""One process of a launched run: trains a tiny model and writes down all that the tests and the README's table compare.

    accelerate launch --config_file accelerate_configs/cpu/zero3.yaml tests/backend_worker.py OUT

OUT/runs.json is a list of `Run`s, done one after another; rank 0 writes OUT/<name>.pt. `execute` is the same in one process.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny import lora_config, sft_arguments, tiny_batches, word_problems, word_tokenizer
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from lora_ga_trainer import LoRAGASFTConfig, LoRAGASFTTrainer, backends
from lora_ga_trainer.checkpoint.adapter_files import adapter_state_dict
from lora_ga_trainer.delta import delta_layers

GLOBAL_BATCH = 4
INPUTS = tiny_batches(seed=9)[0]["input_ids"]


@dataclass
class Run:
    name: str
    model: str
    """Folder of the base model."""
    options: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    resume: str | bool | None = None
    examples: int = 24


def fsdp2_on_cpu() -> None:
    """accelerate knows FSDP on accelerators only and silently runs DDP on CPUs, while torch's FSDP2 itself runs on them.

    To go when `AcceleratorState` takes `MULTI_CPU` for FSDP (accelerate 1.15: state.py, the list before `ACCELERATE_USE_FSDP`).
    """
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp


class Observer(TrainerCallback):
    """Looks at the initialized model before its first step."""

    def __init__(self, trainer: LoRAGASFTTrainer):
        self.trainer = trainer
        self.seen = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step:
            return
        model, was_training = self.trainer.model, self.trainer.model.training
        with torch.no_grad():
            logits = model.eval()(INPUTS.to(args.device)).logits.cpu()
        model.train(was_training)
        parts = {name: p for name, p in model.named_parameters() if "lora_" in name}
        self.seen = {
            "init_logits": logits,
            "gradients": [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()],
            "local_share": {
                name: (p.ds_tensor if backends.is_zero3(p) else p.to_local() if isinstance(p, DTensor) else p).numel()
                / backends.full_shape(p).numel()
                for name, p in parts.items()
            },
            "available_after_init": [
                n for n, p in model.named_parameters() if backends.is_zero3(p) and p.numel() and not p.ds_persist
            ],
            "requires_grad": [name for name, p in model.named_parameters() if p.requires_grad],
        }


def execute(run: Run, output_dir: Path) -> dict:
    """Train as `run` says; what came of it, whole tensors on the CPU."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    options = {"max_steps": 6, "per_device_train_batch_size": GLOBAL_BATCH // world, "ga_estimator": "exact", "seed": 3}
    options |= {"model_init_kwargs": {"dtype": "float32"}}
    options |= {"ddp_backend": "gloo", "use_cpu": not deepspeed} if world > 1 else {}
    args = LoRAGASFTConfig(**sft_arguments(output_dir, **options | run.options))
    trainer = LoRAGASFTTrainer(
        model=run.model,
        args=args,
        train_dataset=word_problems().select(range(run.examples)),
        processing_class=word_tokenizer(),
        peft_config=lora_config(**run.lora),
    )
    observer = Observer(trainer)
    trainer.add_callback(observer)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=run.resume)
    seconds = time.perf_counter() - started
    adapter = adapter_state_dict(trainer.model)
    factors = {name: value for name, value in adapter.items() if name.endswith(".frozen")}
    digests = backends.gather_objects(sum(value.view(torch.int32).long().sum().item() for value in factors.values()))
    trainer.save_model(str(output_dir / "final"))
    return {
        "launch": trainer.model.lora_ga.launch,
        "dist_backend": dist.get_backend() if dist.is_initialized() else None,
        "wrapped": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "report": trainer.lora_ga_report,
        "adapter": adapter,
        "layers": list(delta_layers(trainer.model, "default")),
        "digests": digests,
        "seconds": seconds,
        **observer.seen,
    }


def main(out: Path, runs: list[Run]) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp2_on_cpu()
    for run in runs:
        torch.manual_seed(0)
        found = execute(run, out / run.name)
        if int(os.environ["RANK"]) == 0:
            torch.save(found, out / f"{run.name}.pt")
        print(f"{run.name}: done on rank {os.environ['RANK']}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    main(out, [Run(**values) for values in json.loads((out / "runs.json").read_text())])
