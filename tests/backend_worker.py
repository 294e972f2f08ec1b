"""One process of a launched run: trains a tiny model and writes down all that is compared by tests and docs/distributed.md.

    accelerate launch --config_file accelerate_configs/cpu/zero3.yaml tests/backend_worker.py OUT

OUT/runs.json is a list of `Run`s, done one after another; rank 0 writes OUT/<name>.pt. `execute` is the same in one process.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from peft import peft_model as peft_model_module
from peft.tuners.trainable_tokens import layer as token_layer
from tiny import lora_config, seq2seq_problems, sft_arguments, tiny_batches, word_problems, word_tokenizer
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    TrainerCallback,
    TrainerState,
    training_args,
)

from lora_ga_trainer import (
    LoRAGASeq2SeqConfig,
    LoRAGASeq2SeqTrainer,
    LoRAGASFTConfig,
    LoRAGASFTTrainer,
)
from lora_ga_trainer.adapter.weight import AdaptedWeight
from lora_ga_trainer.checkpoint.adapter_files import adapter_state_dict, histories
from lora_ga_trainer.distributed import backends
from lora_ga_trainer.gradient import accumulator
from lora_ga_trainer.trainers import mixin as mixin_module

INPUTS = tiny_batches(seed=9)[0]["input_ids"]
STEPS = 6


@dataclass
class Run:
    name: str
    model: str
    """Folder of the base model."""
    options: dict = field(default_factory=dict)
    """Of `LoRAGASFTConfig`."""
    lora: dict = field(default_factory=dict)
    resume: str | bool | None = None
    streaming: bool = False
    """Whether they come as an `IterableDataset`."""
    seq2seq: bool = False
    """Whether the model is a T5, trained by `LoRAGASeq2SeqTrainer`."""
    adapter: str | None = None
    """Folder of a trained adapter that this stage starts from."""
    ratio: float | None = None
    """B's learning rate to A's, as in LoRA+."""
    out_of_memory_in: str | None = None
    """`estimation` or `training`, where more than one example on a process fails as on a GPU."""
    dies: str | None = None
    """A key of `DEATHS`: the process kills itself there, as with `kill -9`."""
    error: bool = False
    """Whether a `ValueError` is expected; its text is the result."""


def fsdp2_on_cpu() -> None:
    """accelerate knows FSDP on accelerators only and silently runs DDP on CPUs, while torch's FSDP2 itself runs on them.

    To go when `AcceleratorState` takes `MULTI_CPU` for FSDP (accelerate 1.15: state.py, the list before `ACCELERATE_USE_FSDP`).
    """
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp


def bf16_with_deepspeed_on_cpu() -> None:
    """transformers wants a GPU for bf16 or `use_cpu`, and `use_cpu` leaves out DeepSpeed, which itself has bf16 on CPUs."""
    training_args.is_torch_bf16_gpu_available = lambda: True


def trainable_tokens_on_cpu() -> None:
    """PEFT 0.21 collects the embedding's rows from ZeRO-3 through CUDA only."""

    def collect(self, weight: torch.Tensor, rows: torch.Tensor, embed_dim: int) -> torch.Tensor:
        with token_layer.gather_params_ctx([weight], modifier_rank=None):
            found = (
                weight[rows].clone() if dist.get_rank() == 0 else torch.empty(len(rows), embed_dim, dtype=weight.dtype)
            )
        dist.broadcast(found, src=0)
        return found

    token_layer.TrainableTokensLayer._collect_token_weights = collect


# --- watching -------------------------------------------------------------------------------------------------------


def standing_whole(model: torch.nn.Module) -> int:
    """How many numbers of sharded parameters stand whole on this process right now.

    A ZeRO-3 parameter is empty, and an FSDP2 parameter a `DTensor`, but while it is gathered.
    """
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if not isinstance(parameter, DTensor)  # with DDP and ZeRO-1/2: everything, always
    )


class TwoRates(LoRAGASFTTrainer):
    """Makes its optimizer without the help of any base class, as transformers documents."""

    ratio: float

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        A, B = zip(*(weight.trained for weight in self.model.lora_ga.weights.values()), strict=True)
        rate = self.args.learning_rate
        self.optimizer = torch.optim.AdamW(
            [{"params": A, "lr": rate}, {"params": B, "lr": self.ratio * rate}], weight_decay=0.0
        )
        return self.optimizer


class Observer(TrainerCallback):
    """Looks at the model while it estimates, before its first step, and while it trains."""

    def __init__(self, trainer: LoRAGASFTTrainer, run: Run):
        self.trainer, self.run = trainer, run
        self.phase, self.most_whole = "estimation", {"estimation": 0, "training": 0}
        self.seen, self.factorizations, self.factors_digest = {}, 0, hashlib.sha256()
        for weight in trainer.model.lora_ga.weights.values():
            weight.layer.register_forward_hook(lambda *_: self.look())
        before(trainer, "compute_loss", self.look)
        self.undo = [before(AdaptedWeight, "write_factors", self.digest_factors)]
        for kind in (accumulator.ExactGradient, accumulator.GradientSketch):
            self.undo.append(before(kind, "add", self.look))  # called in the backward
            self.undo.append(before(kind, "triplets", self.count_factorization))

    def look(self, *args, **kwargs) -> None:
        if self.phase == "estimation":
            self.run_out_of_memory("estimation")
        self.most_whole[self.phase] = max(self.most_whole[self.phase], standing_whole(self.trainer.model))

    def digest_factors(self, weight, a_RI, b_OR) -> None:
        """What this process writes, before any sharding."""
        for factor in (a_RI, b_OR):
            self.factors_digest.update(factor.contiguous().numpy().tobytes())

    def count_factorization(self, *args) -> None:
        self.factorizations += 1

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            return
        model, was_training = self.trainer.model, self.trainer.model.training
        layers = [weight.layer for weight in model.lora_ga.weights.values()]
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            logits = logits_of(model)
            for layer in layers:
                layer._disable_adapters = True  # not `disable_adapter()`, which switches `requires_grad` too
            base_logits = logits_of(model)
            for layer in layers:
                layer._disable_adapters = False
        model.train(was_training)
        self.phase = "training"
        self.seen = {
            "init_logits": logits,
            "base_logits": base_logits,
            "gradients": [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()],
            "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
            "own_share": {
                name: own_part(p).numel() / backends.full_shape(p).numel()
                for name, p in model.named_parameters()
                if "lora_" in name
            },
        }

    def on_step_begin(self, args, state, control, **kwargs):
        self.run_out_of_memory("training")

    def run_out_of_memory(self, phase: str) -> None:
        if self.run.out_of_memory_in == phase and self.trainer._train_batch_size > 1:
            raise RuntimeError("CUDA out of memory. (simulated)")


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    inputs = {"input_ids": INPUTS.to(backends.compute_device(next(model.parameters())))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model.eval()(**inputs).logits.cpu()


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of it."""
    if backends.is_zero3(parameter):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# --- dying ----------------------------------------------------------------------------------------------------------


def before(owner: object, name: str, act) -> Callable[[], None]:
    """Call `act` with the arguments of every call of `owner.name` before that goes on; returns what undoes it."""
    function = getattr(owner, name)

    def acting_first(*args, **kwargs):
        act(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, acting_first)
    return lambda: setattr(owner, name, function)


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half_and_die(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    die()


def die_while_writing(owner: object, name: str, path_of) -> None:
    """`owner.name` writes the file `path_of(args)`; in `checkpoint-4` half of it, then the process is gone."""
    function = getattr(owner, name)

    def writing(*args, **kwargs):
        result = function(*args, **kwargs)
        if "checkpoint-4" in str(path_of(args)):
            write_half_and_die(path_of(args))
        return result

    setattr(owner, name, writing)


def in_estimation() -> None:
    calls = []
    before(accumulator.ExactGradient, "add", lambda *_: calls.append(1) if len(calls) < 20 else die())


def in_training() -> None:
    before(LoRAGASFTTrainer, "training_step", lambda self, *_, **__: die() if self.state.global_step == 3 else None)


def on_another_process() -> None:
    """Only rank 1 dies, and its random state in `checkpoint-4` is missing."""
    before(
        LoRAGASFTTrainer,
        "_save_rng_state",
        lambda self, path: die() if backends.rank() == 1 and "checkpoint-4" in path else None,
    )


DEATHS = {
    "in the estimation": in_estimation,
    "in training": in_training,
    "in the adapter file": lambda: die_while_writing(peft_model_module, "safe_save_file", lambda args: args[1]),
    "in the optimizer file": lambda: die_while_writing(torch, "save", lambda args: args[1]),
    "before the list of files": lambda: before(
        mixin_module, "mark_complete", lambda path: die() if "checkpoint-4" in str(path) else None
    ),
    "after the list of files": lambda: before(
        TrainerState, "save_to_json", lambda self, path: die() if "checkpoint-4" in path else None
    ),
    "in the list of files": lambda: before(
        os, "replace", lambda part, to: write_half_and_die(part) if "checkpoint-4" in str(part) else None
    ),
    "in removing the older checkpoint": lambda: before(
        shutil,
        "rmtree",
        lambda path, **_: (Path(path, "optimizer.pt").unlink(), die()) if "checkpoint-2" in str(path) else None,
    ),
    "on another process": on_another_process,
}


# --- running --------------------------------------------------------------------------------------------------------


def sft_trainer(run: Run, options: dict) -> LoRAGASFTTrainer:
    examples = word_problems()
    trainer_class = LoRAGASFTTrainer if run.ratio is None else type("Own", (TwoRates,), {"ratio": run.ratio})
    args = LoRAGASFTConfig(**{"model_init_kwargs": None if run.adapter else {"dtype": "float32"}} | options)
    model: str | PeftModel = run.model
    if run.adapter:  # after the arguments: ZeRO-3 shards the base as it is loaded
        base = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, run.adapter, is_trainable=True)
    return trainer_class(
        model=model,
        args=args,
        train_dataset=examples.to_iterable_dataset() if run.streaming else examples,
        eval_dataset=word_problems().select(range(4)),
        processing_class=word_tokenizer(),
        peft_config=None if run.adapter else lora_config(**run.lora),
    )


def seq2seq_trainer(run: Run, options: dict) -> LoRAGASeq2SeqTrainer:
    args = LoRAGASeq2SeqConfig(**options)  # before the model: ZeRO-3 shards it as it is loaded
    model = AutoModelForSeq2SeqLM.from_pretrained(run.model)
    return LoRAGASeq2SeqTrainer(
        model,
        args,
        data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
        train_dataset=seq2seq_problems(),
        peft_config=lora_config(task_type="SEQ_2_SEQ_LM", **run.lora),
    )


def execute(run: Run, output_dir: Path) -> dict:
    """Train as `run` says; what came of it, whole tensors on the CPU."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    options = {"max_steps": STEPS, "per_device_train_batch_size": 4 // world, "ga_estimator": "exact", "seed": 3}
    # DeepSpeed takes the CPU because it finds no GPU; told to use it, accelerate would leave out DeepSpeed
    options |= {"ddp_backend": "gloo", "use_cpu": not deepspeed} if world > 1 else {}
    trainer = (seq2seq_trainer if run.seq2seq else sft_trainer)(run, sft_arguments(output_dir, **options | run.options))
    if run.dies:
        DEATHS[run.dies]()
    observer = Observer(trainer, run)
    trainer.add_callback(observer)
    try:
        trainer.train(resume_from_checkpoint=run.resume)
    finally:
        for undo in observer.undo:
            undo()

    adapter = adapter_state_dict(trainer.model) | histories(trainer.model.lora_ga)
    trainer.save_model(str(output_dir / "final"))
    with torch.no_grad():
        final_logits = logits_of(trainer.model)
    return {
        "launch": trainer.model.lora_ga.state.launch,
        "communication": dist.get_backend() if dist.is_initialized() else None,
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "initializations": sum("ga/alignment_mean" in entry for entry in trainer.state.log_history),
        "report": trainer.lora_ga_report,
        "adapter": adapter,
        "factorizations": backends.gather_objects(observer.factorizations),
        "factor_digests": backends.gather_objects(observer.factors_digest.hexdigest()),
        "most_whole": observer.most_whole,
        "final_logits": final_logits,
        "batch_size": trainer._train_batch_size,
        "output_dir": str(output_dir),
        **observer.seen,
    }


def factor_error(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """‖A0, B0 of all layers − reference‖ / ‖reference‖, up to the sign of each singular vector."""
    difference = norm = 0.0
    for name, value in reference.items():
        if name.endswith(".frozen"):
            # vectors as rows
            ours, theirs = (found[name].T, value.T) if ".lora_B." in name else (found[name], value)
            sign = (ours * theirs).sum(dim=-1, keepdim=True).sign()
            difference += (ours - sign * theirs).square().sum().item()
            norm += theirs.square().sum().item()
    return (difference / norm) ** 0.5


def main(out: Path) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp2_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        bf16_with_deepspeed_on_cpu()
        trainable_tokens_on_cpu()
    for values in json.loads((out / "runs.json").read_text()):
        run = Run(**values)
        try:
            found = execute(run, out / run.name)
        except ValueError as error:
            if not run.error:
                raise
            found = {"error": str(error)}
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(found, out / f"{run.name}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # Not the interpreter's own end: with gloo it aborts now and then ("terminate called without an active exception"),
        # when all is done.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
