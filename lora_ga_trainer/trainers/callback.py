"""When a trainer calls the initialization and the restarts."""

import logging
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from .restarts import restart_is_due

if TYPE_CHECKING:
    from .mixin import LoRAGAMixin

logger = logging.getLogger(__name__)


class LoRAGACallback(TrainerCallback):
    """Runs the initialization on the prepared model, before the first step and only then, and the restarts when due."""

    def __init__(self, trainer: "LoRAGAMixin"):
        self.trainer = trainer
        self.earlier_restarts = 0
        """Those of an earlier call of `train`, whose steps count for themselves."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.start_clock()
        # A resumed run has its report from the checkpoint; a run that `auto_find_batch_size` starts again, or a second
        # call of `train`, has one already.
        if self.trainer.lora_ga_report is None:
            self.trainer.initialize_adapter()
        last = [self.trainer.lora_ga_report, *self.trainer.model.lora_ga.state.restarts][-1]
        if not any(last.metrics().items() <= entry.items() for entry in state.log_history):
            self.trainer.unlogged = last.metrics()
        if 0 < state.max_steps <= state.global_step and state.is_world_process_zero:
            logger.warning(
                f"The checkpoint's run has finished: {state.global_step:,} of {state.max_steps:,} steps. Nothing is trained. "
                "To train on, raise `max_steps` or `num_train_epochs`."
            )
        if args.ga_restart_steps is not None:
            due = state.global_step // args.ga_restart_steps
            self.earlier_restarts = max(0, len(self.trainer.model.lora_ga.state.restarts) - due)

    def on_step_begin(self, args, state, control, **kwargs):
        # Not at the end of a step: its checkpoint then comes before the restart, and the last step is followed by none.
        made = len(self.trainer.model.lora_ga.state.restarts) - self.earlier_restarts
        if restart_is_due(args, state.global_step, made):
            self.trainer.restart_adapter()
