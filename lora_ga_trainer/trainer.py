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
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from trl import SFTTrainer

from .arguments import LoRAGASFTConfig, check_lora_config, paper_lora_config
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
            NotImplementedError: the run is distributed.
        """
        if self.accelerator.distributed_type != DistributedType.NO:
            raise NotImplementedError(
                f"This run is distributed ({self.accelerator.distributed_type.value}), but this version of LoRA-GA estimates "
                "its gradient in one process only. Launch it with `accelerate launch --num_processes 1`."
            )
        attach_lora_ga(self.model, self.args)
        self.add_callback(InitializeOnTrainBegin(self))

    @property
    def lora_ga_report(self) -> InitReport | None:
        """What the initialization found, None before it."""
        return self.model.lora_ga.report

    def initialize_lora_ga(self) -> None:
        """Sample, estimate, factor, write; see `initialize_lora_ga`."""
        with preserved_rng(), self.unchanged_metrics():
            batches = self.sample_batches()
            # TRL divides the per-batch auxiliary loss of a Mixture-of-Experts model by this; Trainer sets it at each step
            self.current_gradient_accumulation_steps = len(batches)
            report = initialize_lora_ga(
                self.model,
                batches,
                self.args,
                self.estimation_loss,
                disable_tqdm=self.args.disable_tqdm or not self.is_world_process_zero(),
            )
        self.log(report.metrics())

    def sample_batches(self) -> list[dict[str, Tensor]]:
        """`ga_num_samples` examples of the prepared training set, drawn with `ga_seed`, through the trainer's collator."""
        wanted = self.args.ga_num_samples
        if isinstance(self.train_dataset, Dataset):
            order = torch.randperm(len(self.train_dataset), generator=torch.Generator().manual_seed(self.args.ga_seed))
            examples = [self.train_dataset[index] for index in order[:wanted].tolist()]
        else:
            shuffled = self.train_dataset.shuffle(seed=self.args.ga_seed, buffer_size=max(wanted, SHUFFLE_BUFFER))
            examples = list(shuffled.take(wanted))
        if len(examples) < wanted:
            logger.warning(
                f"`ga_num_samples` is {wanted}, but the training set has only {len(examples)} examples. LoRA-GA uses all of "
                "them."
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
