"""What a `Trainer` has to do otherwise to save and resume a LoRA-GA adapter; one half of `LoRAGAMixin`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..compatibility import check_resuming
from .adapter_files import adapter_directory, adapter_state_dict
from .completeness import check_can_resume, last_complete, mark_complete, remove_former
from .model_card import add_lora_ga

if TYPE_CHECKING:
    Base = Trainer  # the mixin comes before one
else:
    Base = object


class AdapterCheckpointsMixin(Base):
    """Checkpoints are ordinary adapters, complete or absent, and resume to the bit."""

    model: PeftModel

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`; a checkpoint is checked before anything is loaded, and `True` means the last complete one.

        Raises:
            ValueError: the checkpoint is not complete, or not one of this run, or the installed versions cannot resume.
        """
        if resume_from_checkpoint:
            directory = (
                last_complete(Path(self.args.output_dir))  # type: ignore[arg-type]  # TrainingArguments has filled it in
                if resume_from_checkpoint is True
                else Path(resume_from_checkpoint)
            )
            check_can_resume(self.model.lora_ga, directory, self.model.lora_ga.state.launch)
            check_resuming(self.model.lora_ga.state.launch, self.args.device)
            resume_from_checkpoint = str(directory)
        return super().train(resume_from_checkpoint, *args, **kwargs)

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
        directory = adapter_directory(best, name)
        self.model.load_adapter(directory, name, is_trainable=True)

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
            add_lora_ga(self.model, Path(self.args.output_dir, "README.md"))  # type: ignore[arg-type]  # as above
