"""LoRA-GA for a `Trainer`: the common base of all trainers here, which also adapts any other `Trainer`.

trainer = LoRAGASFTTrainer(model, args, train_dataset=...)    the adapter gets its delta form: zero, like any LoRA
trainer.train()                                               1. sample n training examples
                                                              2. estimate the gradient of every target weight
                                                              3. A0, B0 from its singular vectors
                                                              4. train as usual
trainer.save_model()                                          an ordinary LoRA adapter for the untouched base
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..arguments import LoRAGAArguments, LoRAGATrainingArguments
from ..checkpoint.adapter_files import adapter_directory, adapter_state_dict
from ..checkpoint.completeness import check_can_resume, check_writable, last_complete, mark_complete, remove_former
from ..checkpoint.model_card import TAG, add_lora_ga
from ..compatibility import check_checkpointing_kwargs, check_resuming
from ..distributed.backends import optimizer_learning_rates, rank, world_size
from ..distributed.launches import (
    check_checkpointing,
    check_fsdp2,
    check_offloading,
    check_restart,
    launch_has_schedule,
    launch_of,
)
from ..factors import LearningRates
from ..gradient.objective import items_in
from ..initialization import attach_lora_ga
from ..initialization.initialize import restart_from_gradient, start_from_gradient
from ..report import InitReport
from .data import check_not_empty, draw_examples
from .restarts import check_schedule, restart_is_due, rewarm

logger = logging.getLogger(__name__)


class LoRAGACallback(TrainerCallback):
    """Calls a trainer's `begin` on the prepared model before the first step, and its `begin_step` before every one."""

    def __init__(self, begin: Callable[[TrainerState], None], begin_step: Callable[[TrainerState], None]):
        self.begin, self.begin_step = begin, begin_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin(state)

    def on_step_begin(self, args, state, control, **kwargs):
        # Not at the end of a step: this way its checkpoint precedes the restart, and no restart follows the last step.
        self.begin_step(state)


if TYPE_CHECKING:
    Base = Trainer  # the mixin comes before one
else:
    Base = object


class LoRAGAMixin(Base):
    """LoRA-GA for any `transformers.Trainer`. The mixin must precede it in the bases.

        class MyTrainer(LoRAGAMixin, Trainer): ...

    The trainer's arguments stay the same: `model` is a `PeftModel` with a LoRA adapter, new or trained, or becomes one in the
    trainer's own `__init__`; `args` hold the `ga_*` options, as `LoRAGATrainingArguments` do. The gradient is that of the mean
    of `compute_loss` over the sampled examples. Everything else is as in `LoRAGASFTTrainer`.

    Raises:
        ValueError: on subclassing, if the mixin comes after the `Trainer`; on construction, if `args` have no `ga_*` options or
            the training set is empty, or what `attach_lora_ga` raises; from `train`, what `initialize_lora_ga` raises.
    """

    args: LoRAGATrainingArguments
    model: PeftModel
    optimizer: Optimizer  # None before `train` makes it
    train_dataset: Any

    EMPTY = "has no example"
    """What the error says of a training set that is empty after preparation."""

    adapter_is_default = False
    """Whether the user gave no adapter configuration."""

    unlogged: dict[str, float]
    """Metrics of an initialization or a restart, held for the next log entry."""

    earlier_restarts = 0
    """Restarts made by an earlier call of `train`, which counted its own steps."""

    started: float | None = None
    """When training began, on the clock of `time.perf_counter`."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if Trainer in bases and bases.index(Trainer) < bases.index(LoRAGAMixin):
            raise ValueError(
                f"In the bases of {cls.__name__} `LoRAGAMixin` comes after a `Trainer`, which would silently train plain "
                f"LoRA. Write `class {cls.__name__}(LoRAGAMixin, ...)`."
            )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, LoRAGAArguments):
            kind = type(self.args).__name__
            raise ValueError(
                f"`args` is a {kind}, but must hold the `ga_*` options. Pass `LoRAGATrainingArguments(...)`, or your own "
                f"dataclass: `class MyArguments(LoRAGAArguments, {kind})`."
            )
        self.unlogged = {}
        if self.model_init is not None:
            raise ValueError(
                "`model_init` would make a new model when training begins, without the adapter that is attached now. Pass "
                "`model`; for a hyperparameter search, make a trainer for each trial."
            )
        self.get_ready()

    def get_ready(self) -> None:
        """Check the arguments and attach LoRA-GA. TRL's trainers prepare their datasets afterwards."""
        if self.train_dataset is None:
            raise ValueError(
                "`train_dataset` is None, but LoRA-GA draws its sample from it, even if `get_train_dataloader` makes the "
                "training batches. Pass the dataset that they are made from, and its `data_collator`."
            )
        check_not_empty(self.train_dataset, self.EMPTY)
        self.attach_adapter()

    def attach_adapter(self) -> None:
        """Give the adapter its delta form; its factors come when training begins.

        Raises:
            ValueError: LoRA-GA does not support the launch, `output_dir` is not writable, or what
                `initialization.attach_lora_ga` raises.
        """
        if self.args.should_save:
            check_writable(self.output_path)
        launch = launch_of(self.accelerator, self.model)
        # TrainingArguments has parsed a JSON string into a dict
        how: Any = (self.args.gradient_checkpointing_kwargs or {}) if self.args.gradient_checkpointing else {}
        check_checkpointing(launch, use_reentrant=how.get("use_reentrant", False))
        check_fsdp2(self.accelerator, self.args.torch_compile)
        check_checkpointing_kwargs(how)
        if how.get("offload"):
            check_offloading("`gradient_checkpointing_kwargs={'offload': True}`")
        try:
            adapter = attach_lora_ga(self.model, self.args)
        except ValueError as error:
            if not self.adapter_is_default:
                raise
            raise ValueError(
                f"{error} (No `peft_config` was passed, so the adapter is the paper's. To use another, pass "
                "`peft_config=LoraConfig(...)`.)"
            ) from error
        if self.args.ga_restart_steps is not None:
            check_schedule(self.args, self.lr_scheduler, launch_has_schedule(self.accelerator))
            restarted = {id(half.trainable) for half in adapter.halves.values()}
            check_restart(
                launch,
                [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in restarted],
            )
        adapter.state.launch = launch
        if isinstance(self.model.get_base_model(), PreTrainedModel):
            self.model.add_model_tags(TAG)
        # Trainer sets it at each step, but the initialization runs before the first
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        # first, so that all others see the run as it starts
        self.callback_handler.callbacks.insert(0, LoRAGACallback(self.begin, self.begin_step))

    @property
    def output_path(self) -> Path:
        return Path(self.args.output_dir)  # type: ignore[arg-type]  # TrainingArguments has filled it in

    @property
    def lora_ga_report(self) -> InitReport | None:
        """The result of the initialization; None before it."""
        return self.model.lora_ga.state.report

    def begin(self, state: TrainerState) -> None:
        """Initialize the adapter, unless there is a report already: from the checkpoint of a resumed run, or from before
        `auto_find_batch_size` started the run again or `train` was called a second time."""
        self.start_clock()
        if self.lora_ga_report is None:
            self.initialize_adapter()
        restarts = self.model.lora_ga.state.restarts
        last = [self.lora_ga_report, *restarts][-1].metrics()
        if not any(last.items() <= entry.items() for entry in state.log_history):  # that of a resumed run may have it
            self.unlogged = last
        if 0 < state.max_steps <= state.global_step and state.is_world_process_zero:
            logger.warning(
                f"The checkpoint's run has finished: {state.global_step:,} of {state.max_steps:,} steps. Nothing is trained. "
                "To train further, raise `max_steps` or `num_train_epochs`."
            )
        if self.args.ga_restart_steps is not None:
            self.earlier_restarts = max(0, len(restarts) - state.global_step // self.args.ga_restart_steps)

    def begin_step(self, state: TrainerState) -> None:
        """Restart from a fresh gradient if one is due."""
        made = len(self.model.lora_ga.state.restarts) - self.earlier_restarts
        if restart_is_due(self.args, state.global_step, made):
            self.restart_adapter()

    def initialize_adapter(self) -> None:
        """Sample, estimate, factor, write; see `initialize_lora_ga`."""
        with self.estimating(seed=self.args.ga_seed) as (batches, disable_tqdm):
            start_from_gradient(
                self.model.lora_ga, batches, self.args, self.estimation_loss, disable_tqdm, self.learning_rates()
            )

    def restart_adapter(self) -> None:
        """The same at the current function, from other examples, on top of what was trained so far; see `restart_lora_ga`."""
        seed = self.args.ga_seed + 1 + len(self.model.lora_ga.state.restarts)
        with self.estimating(seed) as (batches, disable_tqdm):
            report = restart_from_gradient(
                self.model.lora_ga,
                batches,
                self.args,
                self.optimizer,
                self.estimation_loss,
                disable_tqdm,
                self.learning_rates(),
            )
        self.unlogged = report.metrics()

    def learning_rates(self) -> dict[str, LearningRates] | None:
        """The peak rates at which each weight's A and B train, by name; 0 of a matrix that the optimizer does not hold. None
        before there is an optimizer."""
        if self.optimizer is None:
            return None
        rates = optimizer_learning_rates(self.optimizer, self.lr_scheduler)
        return {
            name: LearningRates(*(rates.get(matrix, 0.0) for matrix in weight.trained))
            for name, weight in self.model.lora_ga.weights.items()
        }

    @contextmanager
    def estimating(self, seed: int) -> Iterator[tuple[Iterator[dict[str, Tensor]], bool]]:
        """Yields the batches to estimate on and whether to hide the progress bar; training sees no change."""
        with self.unchanged_metrics(), self.plain_batch_mean():
            yield self.sample_batches(seed), self.args.disable_tqdm or not self.is_world_process_zero()

    def sample_batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """This process's share of `ga_num_samples` examples of the prepared training set, through the trainer's collator.

        All processes draw the same examples with `seed` and take every n-th of them, each from its own start.
        """
        wanted = self.args.ga_num_samples
        examples, drawn = draw_examples(self.train_dataset, wanted, seed, slice(rank(), None, world_size()))
        is_restart = self.lora_ga_report is not None  # do not warn again
        if drawn < wanted and not is_restart and self.is_world_process_zero():
            logger.warning(
                f"`ga_num_samples` is {wanted}, but the training set has only {drawn} examples. LoRA-GA uses all of them; "
                "lower `ga_num_samples` to silence this warning."
            )
        collate = self._get_collator_with_removed_columns(self.data_collator, description="LoRA-GA")
        size = self.estimation_batch_size
        for start in range(0, len(examples), size):
            yield collate(examples[start : start + size])

    @property
    def estimation_batch_size(self) -> int:
        """`ga_batch_size`, or half of what training takes at once (`auto_find_batch_size` lowers it): fewer activations make
        room for the sketch."""
        # With gradient checkpointing and small batches, this saves too little; see docs/how_it_works.md, "Its memory".
        # The estimation runs on one device, even if `nn.DataParallel` trains on several.
        training: Any = self._train_batch_size  # set before training begins
        return self.args.ga_batch_size or max(1, training // (2 * max(1, self.args.n_gpu)))

    def estimation_loss(self, model: nn.Module, batch: dict[str, Tensor], num_items_in_batch: int) -> Tensor:
        """The training loss, as this batch's share of the mean over all sampled examples.

        Some losses divide by `num_items_in_batch`; others, such as those of DPO, reward models and many encoders, ignore it and
        average over the batch. Given the number of items of this batch alone, both are the batch mean.
        """
        inputs = self.estimation_inputs(batch)
        items = items_in(model, inputs)
        divisor = torch.tensor(max(items, 1), device="cpu") if "labels" in inputs else None
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=divisor)
        if items == 0:  # a mean over no labels is NaN
            loss = loss.nan_to_num()
        return loss * (items / num_items_in_batch)

    def estimation_inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What `compute_loss` takes, of a batch of `sample_batches`."""
        return self._prepare_inputs(batch)

    @contextmanager
    def plain_batch_mean(self) -> Iterator[None]:
        """While inside, `compute_loss` treats its batch as the only one of a step, on the only process.

        Otherwise, `average_tokens_across_devices` would multiply the loss by the number of processes, to undo DDP's averaging
        of gradients, and TRL would divide the auxiliary loss of a mixture of experts by the number of batches in a step.
        """
        averages, steps = self.args.average_tokens_across_devices, self.current_gradient_accumulation_steps
        try:
            self.args.average_tokens_across_devices, self.current_gradient_accumulation_steps = False, 1
            yield
        finally:
            self.args.average_tokens_across_devices, self.current_gradient_accumulation_steps = averages, steps

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new and self.args.ga_restart_steps is not None and self.args.ga_restart_warmup_steps:
            rewarm(scheduler, self.args)
        return scheduler

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`; a checkpoint is checked before anything is loaded, and `True` means the last complete one.

        Raises:
            ValueError: the checkpoint is incomplete, or not one of this run, or the installed versions cannot resume; the
                training set can be read only once; also what `initialize_lora_ga` raises.
        """
        if resume_from_checkpoint:
            is_last = resume_from_checkpoint is True
            directory = last_complete(self.output_path) if is_last else Path(resume_from_checkpoint)  # type: ignore[arg-type]  # not True
            launch = self.model.lora_ga.state.launch
            check_can_resume(self.model.lora_ga, directory, launch)
            check_resuming(launch, self.args.device)
            resume_from_checkpoint = str(directory)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if output.global_step == 0 and self.state.max_steps > 0:  # Trainer only warns of this
            raise ValueError(
                f"None of {self.state.max_steps:,} steps was trained: the training set gave no example after LoRA-GA had "
                "drawn its sample from it. A stream must start over each time it is read: give "
                "`IterableDataset.from_generator` a function that makes a new generator."
            )
        return output

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs):
        epochs_trained, steps_trained_in_current_epoch = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        if self.state.global_step >= max_steps:
            # Trainer would train one more step each time a finished job is restarted (transformers 5.23). No epoch is left.
            epochs_trained, steps_trained_in_current_epoch = num_train_epochs, 0
        return epochs_trained, steps_trained_in_current_epoch

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            # Trainer restores the optimizer and, from DeepSpeed's and FSDP's own files, the trained parameters. None of those
            # holds A0, B0 and the report; the adapter's files hold all of it, in every backend.
            name = self.model.lora_ga.name
            self.model.load_adapter(adapter_directory(resume_from_checkpoint, name), name, is_trainable=True)
        return prepared

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        # As in resuming: DeepSpeed's and FSDP's own files hold neither A0, B0 nor the history. Without these backends, Trainer
        # would load from the folder of "default", even if the adapter has another name.
        name = self.model.lora_ga.name
        best = self.state.best_model_checkpoint
        assert best is not None  # Trainer checks before calling this
        self.model.load_adapter(adapter_directory(best, name), name, is_trainable=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole adapter, wherever its parts are; the base model is neither gathered nor written.

        Every process must call it; only those that write hold the whole adapter.
        """
        state_dict = adapter_state_dict(self.model, keep=self.args.should_save)
        if self.args.should_save:  # transformers before 5.23: any process that calls `_save` writes
            self._save(output_dir or self.args.output_dir, state_dict=state_dict)
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
        # This is the last file that every process writes. `trainer_state.json` and the removal of older checkpoints follow.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(Path(output_dir))

    def create_model_card(self, *args, **kwargs) -> None:
        """The base trainer's card, with a section on LoRA-GA."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_lora_ga(self.model, self.output_path / "README.md")

    def start_clock(self) -> None:
        """Start `ga/seconds` now or, in a resumed run, from its last logged value."""
        logged = [entry["ga/seconds"] for entry in self.state.log_history if "ga/seconds" in entry]
        self.started = time.perf_counter() - max(logged, default=0.0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with `ga/seconds`: wall time since training began, including initialization, evaluations and saving.

        Trainer logs only steps, and time only at the end, so runs could not be compared over time. The metrics of an
        initialization or a restart go into the entry that follows it. They are not left in `logs`, from which `train` and
        `evaluate` build their results.
        """
        ours, self.unlogged = self.unlogged, {}
        if self.started is not None:
            ours = ours | {"ga/seconds": time.perf_counter() - self.started}
        entry = logs | ours
        super().log(entry, start_time)
        logs.clear()  # callbacks also remove entries
        logs.update((name, value) for name, value in entry.items() if name not in ours)

    @contextmanager
    def unchanged_metrics(self) -> Iterator[None]:
        """Estimation is not training: trainers that keep metrics between log entries restore them afterwards. A plain one keeps
        none."""
        yield
