"""Trainers for the methods that TRL and PEFT implement only in part: LoRA+, PiSSA, AdaLoRA.

Each is a mixin for a `transformers.Trainer` and comes before it in the bases.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from lora_ga_trainer import LoRAGAMixin
from lora_ga_trainer.trainers.seq2seq import TokenMeanSeq2SeqTrainer

LORA_PLUS_RATIO = 16
"""λ of LoRA+ (arXiv 2402.12354): the ratio of B's learning rate to A's."""

ORTHOGONALITY = 0.5
"""γ of AdaLoRA (arXiv 2303.10512): the weight of its regularizer; PEFT's default."""


class LoRAPlus:
    """LoRA+ for a `Trainer`: the optimizer of the arguments, with B's learning rate `LORA_PLUS_RATIO` times A's."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = create_loraplus_optimizer(
                model,
                optimizer_class,
                loraplus_lr_ratio=LORA_PLUS_RATIO,
                loraplus_weight_decay=self.args.weight_decay,
                **options,
            )
            # PEFT makes groups for embeddings and biases too; DeepSpeed cannot flatten an empty one
            groups = self.optimizer.param_groups
            groups[:] = [group for group in groups if group["params"]]
        return self.optimizer


class PiSSA:
    """PiSSA for a `Trainer`: what is saved is an ordinary LoRA of rank 2r for the untouched base model.

    PiSSA moves the first r singular triplets of each weight into the adapter, so its adapter alone fits only the rest.
    PEFT subtracts the untrained adapter, which is kept in `pissa_init`. Checkpoints keep the training form, for resuming.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_whole_parameters(self, "PiSSA")
        self.saves_checkpoint = False
        self.initial = Path(self.args.output_dir, "pissa_init")
        if self.args.should_save:
            self.model.save_pretrained(self.initial)

    def _save_checkpoint(self, model, trial):
        self.saves_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.saves_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None):
        super()._save(output_dir, state_dict)
        if self.args.should_save and not self.saves_checkpoint:
            self.model.save_pretrained(
                output_dir or self.args.output_dir, path_initial_model_for_weight_conversion=str(self.initial)
            )


class AdaLoRA:
    """AdaLoRA for a `Trainer`: the schedule of ranks from the real number of steps, and the regularizer in the loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_whole_parameters(self, "AdaLoRA")
        self.add_callback(AllocateRanks())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint:
            raise ValueError(
                "`resume_from_checkpoint` is set, but AdaLoRA cannot be resumed: PEFT does not save the importance of the "
                "ranks. Leave it out to start from the beginning."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs):
        found = super().compute_loss(model, inputs, return_outputs, **kwargs)
        if not self.model.training:
            return found  # so that the held-out loss is comparable with the other methods'
        # TRL takes the log-probabilities and ignores the model's own loss, to which PEFT adds the regularizer. Trainer sums
        # over the accumulation steps.
        penalty = ORTHOGONALITY * orthogonality(self.model) / self.current_gradient_accumulation_steps
        return (found[0] + penalty, found[1]) if return_outputs else found + penalty


def orthogonality(model: nn.Module) -> Tensor:
    """The mean over all P (A's rows, B's columns) of ‖P Pᵀ − I‖, without AdaLoRA's square, as in PEFT."""
    norms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram_RR = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            norms.append(torch.dist(gram_RR, torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)))
    return torch.stack(norms).mean()


class AllocateRanks(TrainerCallback):
    """Tells AdaLoRA how many steps there are, and lets it prune ranks after every one of them.

    A tenth of the steps before pruning, half of them after it, about as in AdaLoRA's own runs.
    """

    def on_train_begin(self, args, state, control, model, **kwargs):
        if state.max_steps < 2:
            raise ValueError(
                f"AdaLoRA prunes while it trains, which takes 2 steps, but this run has {state.max_steps}."
            )
        schedule = model.peft_config["default"]
        schedule.total_step = state.max_steps
        schedule.tinit = state.max_steps // 10
        schedule.tfinal = min(state.max_steps // 2, state.max_steps - 2)  # the first step only measures

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        # after the step, while gradients still exist; PEFT's schedule counts from 1, and Trainer has not counted this step yet
        model.base_model.update_and_allocate(state.global_step + 1)


def check_whole_parameters(trainer: Trainer, name: str) -> None:
    """
    Raises:
        ValueError: the launch shards parameters or hides gradients.
    """
    if trainer.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ValueError(
            f"{name} in PEFT needs whole parameters and gradients, but this is a {trainer.accelerator.distributed_type.value} "
            "launch. Launch it in one process or with DDP (accelerate_configs/ddp.yaml)."
        )


def check_saves_whole(trainer: Trainer) -> None:
    """LoRA-GA's trainers gather what they save. By default, `Trainer` saves the pieces of a sharded model separately.

    Raises:
        ValueError: the launch would leave nothing that `from_pretrained` can load.
    """
    state, option = trainer.accelerator.state, None
    if isinstance(trainer, LoRAGAMixin):
        return
    if state.distributed_type == DistributedType.FSDP:
        if "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
            option = "--fsdp_state_dict_type FULL_STATE_DICT"
    elif state.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3:
        gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if not isinstance(trainer.model, PeftModel) and not state.deepspeed_plugin.hf_ds_config.is_true(gathers):
            option = "--zero3_save_16bit_model true"
    if option is not None:
        raise ValueError(
            "This launch shards the trained parameters and would save them in pieces, which `from_pretrained` cannot load. "
            f"Launch it with `accelerate launch {option}`, or set the same in its configuration file."
        )


class LoRAPlusSFTTrainer(LoRAPlus, SFTTrainer): ...


class LoRAPlusSeq2SeqTrainer(LoRAPlus, TokenMeanSeq2SeqTrainer): ...


class PiSSASFTTrainer(PiSSA, SFTTrainer): ...


class PiSSASeq2SeqTrainer(PiSSA, TokenMeanSeq2SeqTrainer): ...


class AdaLoRASFTTrainer(AdaLoRA, SFTTrainer): ...


class AdaLoRASeq2SeqTrainer(AdaLoRA, TokenMeanSeq2SeqTrainer): ...
