"""LoRA-GA for a `Trainer`: what all trainers here have in common, and what makes one of any other `Trainer`.

trainer = LoRAGASFTTrainer(model, args, train_dataset=...)    the adapter gets its delta form: zero, like any LoRA
trainer.train()                                               1. sample n training examples
                                                              2. estimate the gradient of every target weight
                                                              3. A0, B0 from its singular vectors
                                                              4. train as always
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
        # Not at the end of a step: its checkpoint then comes before the restart, and the last step is followed by none.
        self.begin_step(state)


if TYPE_CHECKING:
    Base = Trainer  # the mixin comes before one
else:
    Base = object


class LoRAGAMixin(Base):
    """LoRA-GA for any `transformers.Trainer`, before which it comes in the bases.

        class MyTrainer(LoRAGAMixin, Trainer): ...

    The trainer takes what it took before: `model` is a `PeftModel` with an untrained LoRA adapter, or becomes one in the
    trainer's own `__init__`; `args` hold the `ga_*` options, as `LoRAGATrainingArguments` do. The gradient is that of the mean
    of `compute_loss` over the sampled examples. All else is as with `LoRAGASFTTrainer`.

    Raises:
        ValueError: on deriving, the mixin comes after the `Trainer`; on construction, `args` have no `ga_*` options, the
            training set is empty, or what `attach_lora_ga` raises; from `train`, what `initialize_lora_ga` raises.
    """

    args: LoRAGATrainingArguments
    model: PeftModel
    optimizer: Optimizer
    """Since `create_optimizer`, which comes before any restart."""
    train_dataset: Any

    EMPTY = "has no example"
    """What is wrong with the training set if it is empty once the trainer has prepared it."""

    adapter_is_default = False
    """Whether the adapter's configuration is not the user's."""

    unlogged: dict[str, float]
    """Metrics of an initialization or a restart that wait for the next entry of the log."""

    earlier_restarts = 0
    """Those of an earlier call of `train`, whose steps count for themselves."""

    started: float | None = None
    """When training began, on the clock of `time.perf_counter`."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if Trainer in bases and bases.index(Trainer) < bases.index(LoRAGAMixin):
            raise ValueError(
                f"In the bases of {cls.__name__} `LoRAGAMixin` comes after a `Trainer`, which would train plain LoRA without a "
                f"word. Write `class {cls.__name__}(LoRAGAMixin, ...)`."
            )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, LoRAGAArguments):
            kind = type(self.args).__name__
            raise ValueError(
                f"`args` is a {kind}, but must hold the `ga_*` options. Pass `LoRAGATrainingArguments(...)`, or a dataclass of "
                f"your own: `class MyArguments(LoRAGAArguments, {kind})`."
            )
        self.unlogged = {}
        if self.model_init is not None:
            raise ValueError(
                "`model_init` would make another model when training begins, without the adapter that is attached now. Pass "
                "`model`; for a search over hyperparameters make a trainer for each trial."
            )
        self.get_ready()

    def get_ready(self) -> None:
        """Refuse what can be refused, and attach LoRA-GA. TRL's trainers prepare their datasets after it."""
        if self.train_dataset is None:
            raise ValueError(
                "`train_dataset` is None, but LoRA-GA draws its sample from it, also where `get_train_dataloader` makes the "
                "batches of training. Pass the dataset that they are made of, and its `data_collator`."
            )
        check_not_empty(self.train_dataset, self.EMPTY)
        self.attach_adapter()

    def attach_adapter(self) -> None:
        """The adapter gets its delta form now, and its factors when training begins.

        Raises:
            ValueError: a launch that LoRA-GA does not support, an `output_dir` that cannot be written to, or what
                `initialization.attach_lora_ga` raises.
        """
        if self.args.should_save:
            check_writable(self.output_path)
        launch = launch_of(self.accelerator, self.model)
        # a string has been parsed
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
                f"{error} (No `peft_config` was passed, so the adapter is the paper's. Say otherwise with "
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
        # Trainer sets it with each step, and the initialization comes before the first
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        # before all others, so that they see the run as it starts
        self.callback_handler.callbacks.insert(0, LoRAGACallback(self.begin, self.begin_step))

    @property
    def output_path(self) -> Path:
        return Path(self.args.output_dir)  # type: ignore[arg-type]  # TrainingArguments has filled it in

    @property
    def lora_ga_report(self) -> InitReport | None:
        """What the initialization found, None before it."""
        return self.model.lora_ga.state.report

    def begin(self, state: TrainerState) -> None:
        """Initialize the adapter, unless it has been: a resumed run has its report from the checkpoint; one that
        `auto_find_batch_size` starts again, or a second call of `train`, has one already."""
        self.start_clock()
        if self.lora_ga_report is None:
            self.initialize_adapter()
        restarts = self.model.lora_ga.state.restarts
        last = [self.lora_ga_report, *restarts][-1].metrics()
        if not any(last.items() <= entry.items() for entry in state.log_history):
            self.unlogged = last
        if 0 < state.max_steps <= state.global_step and state.is_world_process_zero:
            logger.warning(
                f"The checkpoint's run has finished: {state.global_step:,} of {state.max_steps:,} steps. Nothing is trained. "
                "To train on, raise `max_steps` or `num_train_epochs`."
            )
        if self.args.ga_restart_steps is not None:
            self.earlier_restarts = max(0, len(restarts) - state.global_step // self.args.ga_restart_steps)

    def begin_step(self, state: TrainerState) -> None:
        """Restart from a fresh gradient if it is time."""
        made = len(self.model.lora_ga.state.restarts) - self.earlier_restarts
        if restart_is_due(self.args, state.global_step, made):
            self.restart_adapter()

    def initialize_adapter(self) -> None:
        """Sample, estimate, factor, write; see `initialize_lora_ga`."""
        with self.estimating(seed=self.args.ga_seed) as (batches, disable_tqdm):
            start_from_gradient(self.model.lora_ga, batches, self.args, self.estimation_loss, disable_tqdm)

    def restart_adapter(self) -> None:
        """The same at the current function, from other examples, behind what was trained so far; see `restart_lora_ga`."""
        seed = self.args.ga_seed + 1 + len(self.model.lora_ga.state.restarts)
        with self.estimating(seed) as (batches, disable_tqdm):
            report = restart_from_gradient(
                self.model.lora_ga, batches, self.args, self.optimizer, self.estimation_loss, disable_tqdm
            )
        self.unlogged = report.metrics()

    @contextmanager
    def estimating(self, seed: int) -> Iterator[tuple[Iterator[dict[str, Tensor]], bool]]:
        """Yields the batches to estimate on and whether to hide the progress bar; nothing that training reads is changed."""
        with self.unchanged_metrics(), self.plain_batch_mean():
            yield self.sample_batches(seed), self.args.disable_tqdm or not self.is_world_process_zero()

    def sample_batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """This process's share of `ga_num_samples` examples of the prepared training set, through the trainer's collator.

        All processes draw the same examples with `seed` and take every n-th of them, each from its own start.
        """
        wanted = self.args.ga_num_samples
        examples, drawn = draw_examples(self.train_dataset, wanted, seed, slice(rank(), None, world_size()))
        is_restart = self.lora_ga_report is not None  # which need not say it again
        if drawn < wanted and not is_restart and self.is_world_process_zero():
            logger.warning(
                f"`ga_num_samples` is {wanted}, but the training set has only {drawn} examples. LoRA-GA uses all of them; "
                "lower `ga_num_samples` to be rid of this warning."
            )
        collate = self._get_collator_with_removed_columns(self.data_collator, description="LoRA-GA")
        # Half of what training takes at once (`auto_find_batch_size` lowers it): fewer activations make room for the sketch.
        # With gradient checkpointing and small batches too few are saved; see docs/how_it_works.md, "Its memory".
        # The estimation runs on one device, also where `nn.DataParallel` trains on several.
        size = self.args.ga_batch_size or max(1, self._train_batch_size // (2 * max(1, self.args.n_gpu)))
        for start in range(0, len(examples), size):
            yield collate(examples[start : start + size])

    def estimation_loss(self, model: nn.Module, batch: dict[str, Tensor], num_items_in_batch: int) -> Tensor:
        """The loss that will be trained on, as this batch's share of the mean over all sampled examples.

        Some losses divide by `num_items_in_batch`; others, as those of DPO, of reward models and of many encoders, are means
        over the batch whatever it says. With the items of this batch alone both are its mean.
        """
        inputs = self._prepare_inputs(batch)
        items = items_in(model, inputs)
        divisor = torch.tensor(max(items, 1), device="cpu") if "labels" in inputs else None
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=divisor)
        if items == 0:  # the mean over no label is no number
            loss = loss.nan_to_num()
        return loss * (items / num_items_in_batch)

    @contextmanager
    def plain_batch_mean(self) -> Iterator[None]:
        """While inside, `compute_loss` takes its batch for the only one of a step, on the only process.

        Otherwise `average_tokens_across_devices` would multiply it by the number of processes, to undo DDP's averaging of
        gradients, and TRL divide the auxiliary loss of a Mixture-of-Experts model by the number of batches in a step.
        """
        averages, steps = self.args.average_tokens_across_devices, self.current_gradient_accumulation_steps
        try:
            self.args.average_tokens_across_devices, self.current_gradient_accumulation_steps = False, 1
            yield
        finally:
            self.args.average_tokens_across_devices, self.current_gradient_accumulation_steps = averages, steps

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        optimizer = super().create_optimizer(model)
        weights = self.model.lora_ga.weights
        rates = optimizer_learning_rates(
            optimizer, [matrix for weight in weights.values() for matrix in weight.trained]
        )
        if rates is not None:
            pairs = zip(rates[::2], rates[1::2], strict=True)
            self.model.lora_ga.learning_rates = dict(zip(weights, map(LearningRates._make, pairs), strict=True))
        return optimizer

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
                training set could be read only once; also what `initialize_lora_ga` raises.
        """
        if resume_from_checkpoint:
            is_last = resume_from_checkpoint is True
            directory = last_complete(self.output_path) if is_last else Path(resume_from_checkpoint)  # type: ignore[arg-type]  # not True
            launch = self.model.lora_ga.state.launch
            check_can_resume(self.model.lora_ga, directory, launch)
            check_resuming(launch, self.args.device)
            resume_from_checkpoint = str(directory)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if output.global_step == 0 < self.state.max_steps:  # of which Trainer only warns
            raise ValueError(
                f"Not one of {self.state.max_steps:,} steps was trained: the training set gave no example, after "
                "LoRA-GA had drawn its sample from it. A stream has to begin anew each time it is read: give "
                "`IterableDataset.from_generator` a function that makes a new generator."
            )
        return output

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs):
        epochs_trained, steps_trained_in_current_epoch = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        if self.state.global_step >= max_steps:
            # Trainer would train one more step each time that a job is started again (transformers 5.23). No epoch is left.
            epochs_trained, steps_trained_in_current_epoch = num_train_epochs, 0
        return epochs_trained, steps_trained_in_current_epoch

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            # Trainer restores the optimizer, and from DeepSpeed's and FSDP's own files what trains. A0, B0 and the report
            # are in none of those; the adapter's files have all of it, in every backend.
            name = self.model.lora_ga.name
            self.model.load_adapter(adapter_directory(resume_from_checkpoint, name), name, is_trainable=True)
        return prepared

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        # As in resuming: DeepSpeed's and FSDP's own files hold neither A0, B0 nor the history. Without them Trainer would look
        # for the adapter where "default" is, also if that is another one.
        name = self.model.lora_ga.name
        best = self.state.best_model_checkpoint
        assert best is not None  # Trainer asks before it calls this
        self.model.load_adapter(adapter_directory(best, name), name, is_trainable=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, whole, from wherever its parts are; the base model is neither gathered nor written.

        Every process has to call it; only those that write hold the whole adapter.
        """
        state_dict = adapter_state_dict(self.model, keep=self.args.should_save)
        if self.args.should_save:  # transformers before 5.23 takes whoever calls `_save` for the writer
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
        # The last that every process writes. After it come `trainer_state.json` and the removal of older checkpoints.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(Path(output_dir))

    def create_model_card(self, *args, **kwargs) -> None:
        """The card of the trainer that this one derives from, with what there is to say of LoRA-GA."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_lora_ga(self.model, self.output_path / "README.md")

    def start_clock(self) -> None:
        """Let `ga/seconds` run from now, or in a resumed run from where the last entry of its log left it."""
        logged = [entry["ga/seconds"] for entry in self.state.log_history if "ga/seconds" in entry]
        self.started = time.perf_counter() - max(logged, default=0.0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with `ga/seconds`: wall time since training began, initialization, evaluations and saving included.

        Trainer's log has steps only, and time not until the end; runs could not be compared over time. What an initialization
        or a restart found goes into the entry that follows it. None of this is in `logs` afterwards, of which `train` and
        `evaluate` make their results.
        """
        ours, self.unlogged = self.unlogged, {}
        if self.started is not None:
            ours = ours | {"ga/seconds": time.perf_counter() - self.started}
        entry = logs | ours
        super().log(entry, start_time)
        logs.clear()  # callbacks take entries out, too
        logs.update((name, value) for name, value in entry.items() if name not in ours)

    @contextmanager
    def unchanged_metrics(self) -> Iterator[None]:
        """Estimation is no training: while inside, metrics start from none, and come out as they were."""
        yield
