"""LoRA-GA as one class swap: `LoRAGASFTTrainer` is TRL's `SFTTrainer` whose LoRA starts from the gradient.

trainer = LoRAGASFTTrainer(model, args, train_dataset=...)    the adapter gets its delta form: zero, like any LoRA
trainer.train()                                               1. sample n training examples
                                                              2. estimate the gradient of every target weight
                                                              3. A0, B0 from its singular vectors
                                                              4. train as always
trainer.save_model()                                          an ordinary LoRA adapter for the untouched base
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl import SFTTrainer

from .arguments import LoRAGASFTConfig, check_lora_config, paper_lora_config
from .backends import check_checkpointing, gather_objects, launch_of, rank, world_size
from .checkpoint.adapter_files import adapter_directory, adapter_state_dict
from .checkpoint.completeness import check_can_resume, last_complete, mark_complete, remove_former
from .initialization import attach_lora_ga, initialize_lora_ga
from .probe import preserved_rng
from .report import InitReport

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000
"""Examples that a streaming dataset holds at once to draw the sample from."""


class InitializeOnTrainBegin(TrainerCallback):
    """Runs the initialization on the prepared model, before the first step and only then."""

    def __init__(self, trainer: "LoRAGAMixin"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run has its report from the checkpoint; a run that `auto_find_batch_size` starts again, or a second
        # call of `train`, has one already.
        if self.trainer.lora_ga_report is None:
            self.trainer.initialize_lora_ga()


class LoRAGAMixin:
    """LoRA-GA for a `transformers.Trainer`; comes before it in the bases. Its `args` hold the `ga_*` options."""

    def attach_lora_ga(self) -> None:
        """To be called at the end of `__init__`: delta form now, factors when training begins.

        Raises:
            ValueError: a launch that LoRA-GA does not support, or what `initialization.attach_lora_ga` raises.
        """
        launch = launch_of(self.accelerator)
        how = (self.args.gradient_checkpointing_kwargs or {}) if self.args.gradient_checkpointing else {}
        check_checkpointing(launch, use_reentrant=how.get("use_reentrant", False))
        attach_lora_ga(self.model, self.args)
        self.model.lora_ga.launch = launch
        self.add_callback(InitializeOnTrainBegin(self))

    @property
    def lora_ga_report(self) -> InitReport | None:
        """What the initialization found, None before it."""
        return self.model.lora_ga.report

    def initialize_lora_ga(self) -> None:
        """Sample, estimate, factor, write; see `initialize_lora_ga`."""
        with preserved_rng(), self.unchanged_metrics(), self.plain_token_mean():
            batches = self.sample_batches()
            # TRL divides the per-batch auxiliary loss of a Mixture-of-Experts model by this; Trainer sets it at each step
            self.current_gradient_accumulation_steps = sum(gather_objects(len(batches)))
            report = initialize_lora_ga(
                self.model,
                batches,
                self.args,
                self.estimation_loss,
                disable_tqdm=self.args.disable_tqdm or not self.is_world_process_zero(),
            )
        self.log(report.metrics())

    def sample_batches(self) -> list[dict[str, Tensor]]:
        """This process's share of `ga_num_samples` examples of the prepared training set, through the trainer's collator.

        All processes draw the same examples with `ga_seed` and take every n-th of them, each from its own start.
        """
        wanted = self.args.ga_num_samples
        mine = slice(rank(), None, world_size())
        if isinstance(self.train_dataset, Dataset):
            order = torch.randperm(len(self.train_dataset), generator=torch.Generator().manual_seed(self.args.ga_seed))
            drawn = order[:wanted].tolist()
            examples = [self.train_dataset[index] for index in drawn[mine]]
        else:
            shuffled = self.train_dataset.shuffle(seed=self.args.ga_seed, buffer_size=max(wanted, SHUFFLE_BUFFER))
            drawn = list(shuffled.take(wanted))
            examples = drawn[mine]
        if len(drawn) < wanted and self.is_world_process_zero():
            logger.warning(
                f"`ga_num_samples` is {wanted}, but the training set has only {len(drawn)} examples. LoRA-GA uses all of them."
            )
        collate = self._get_collator_with_removed_columns(self.data_collator, description="LoRA-GA")
        size = self.args.ga_batch_size or self._train_batch_size  # which `auto_find_batch_size` lowers
        return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]

    def estimation_loss(self, model: nn.Module, batch: dict[str, Tensor], num_items_in_batch: int) -> Tensor:
        """The loss that will be trained on, as a share of the token-weighted mean over all sampled examples."""
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=torch.tensor(num_items_in_batch))

    @contextmanager
    def plain_token_mean(self) -> Iterator[None]:
        """`average_tokens_across_devices` multiplies the loss by the number of processes, to undo DDP's averaging of gradients.

        The estimation sums over processes, so nothing is to be undone.
        """
        value = self.args.average_tokens_across_devices
        try:
            self.args.average_tokens_across_devices = False
            yield
        finally:
            self.args.average_tokens_across_devices = value

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """`Trainer.train`; a checkpoint is checked before anything is loaded, and `True` means the last complete one.

        Raises:
            ValueError: the checkpoint is not complete, or not one of this run; also what `initialize_lora_ga` raises.
        """
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_complete(Path(self.args.output_dir))
            check_can_resume(self.model, Path(resume_from_checkpoint), self.model.lora_ga.launch)
            resume_from_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            # Trainer restores the optimizer, and from DeepSpeed's and FSDP's own files what trains. A0, B0 and the report
            # are in none of those; the adapter's files have all of it, in every backend.
            name = self.model.lora_ga.adapter_name
            self.model.load_adapter(adapter_directory(resume_from_checkpoint, name), name, is_trainable=True)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, whole, from wherever its parts are; the base model is neither gathered nor written.

        Every process has to call it.
        """
        self._save(output_dir or self.args.output_dir, state_dict=adapter_state_dict(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model, trial) -> None:
        directory = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            remove_former(directory)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # so that all processes see the same checkpoints

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last that every process writes. After it come `trainer_state.json` and the removal of older checkpoints.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(Path(output_dir))

    @contextmanager
    def unchanged_metrics(self) -> Iterator[None]:
        """Estimation is no training: what `compute_loss` counts on the side must not show in the logs."""
        yield


class LoRAGASFTTrainer(LoRAGAMixin, SFTTrainer):
    """TRL's `SFTTrainer` with the LoRA-GA initialization (arXiv 2407.05000); takes the same arguments.

    `args` may be a `LoRAGASFTConfig`, or an `SFTConfig` or `TrainingArguments`, which get the default `ga_*` options.
    `peft_config` must be a `LoraConfig`; without one the paper's is used (r 8, α 16, rsLoRA, all linear layers). The
    model may also be a `PeftModel` with an untrained LoRA adapter.

    The initialization runs when `train()` begins, on the model that trains, and is skipped when resuming. The base
    weights are never written. `save_model` and every checkpoint hold an ordinary LoRA adapter of rank 2r that stock PEFT
    loads on the untouched base model.

    Raises:
        ValueError: the `LoraConfig` asks for another initialization or adapter kind, a rank is too large for a layer,
            the adapter has been initialized or trained already, or the dataset is empty; from `train`, what
            `initialize_lora_ga` raises.
    """

    def __init__(self, *args, **kwargs):
        call = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs)
        arguments = call.arguments
        arguments["args"] = _with_ga_options(arguments.get("args"), arguments["model"])
        if not isinstance(arguments["model"], PeftModel):
            if arguments.get("peft_config") is None:
                arguments["peft_config"] = paper_lora_config()
            check_lora_config(arguments["peft_config"])
        _check_not_empty(arguments.get("train_dataset"), "has no example")
        super().__init__(*call.args[1:], **call.kwargs)
        _check_not_empty(
            self.train_dataset,
            "has no example with a completion token left after preparation (are the prompts longer than `max_length`?)",
        )
        self.attach_lora_ga()

    @contextmanager
    def unchanged_metrics(self) -> Iterator[None]:
        metrics = {
            mode: {name: list(values) for name, values in group.items()} for mode, group in self._metrics.items()
        }
        tokens = self._total_train_tokens
        try:
            yield
        finally:
            for mode, group in self._metrics.items():
                group.clear()
                group.update(metrics[mode])
            self._total_train_tokens = tokens


def _with_ga_options(args: TrainingArguments | None, model: Any) -> LoRAGASFTConfig:
    """`args` as a `LoRAGASFTConfig`: itself, or its fields and the default `ga_*` options."""
    if isinstance(args, LoRAGASFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return LoRAGASFTConfig(f"{name.split('/')[-1] or 'model'}-LoRA-GA")
    # `to_dict` would hide every field that ends in "token", `eos_token` too
    values = {option.name: getattr(args, option.name) for option in fields(args) if option.init}
    unknown = values.keys() - {option.name for option in fields(LoRAGASFTConfig)}
    if unknown:
        raise ValueError(
            f"`args` is a {type(args).__name__} with the fields {sorted(unknown)}, which `LoRAGASFTConfig` does not have. "
            "Derive your configuration from `LoRAGASFTConfig` instead of `SFTConfig`."
        )
    return LoRAGASFTConfig(**values)


def _check_not_empty(dataset: Any, problem: str) -> None:
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The training set {problem}, so there is nothing to train on. Pass at least one example.")
