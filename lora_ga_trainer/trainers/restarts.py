"""When LoRA-GA restarts from a fresh gradient, and how the learning rate recovers: pure functions of the step.

LoRA-GA inside ReLoRA (Lialin et al. 2023, arXiv 2307.05695): every `ga_restart_steps` steps what was trained so far is frozen
into the adapter, and a new pair of factors starts from the gradient at the current function; see `initialization`.
"""

from functools import partial

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..arguments import LoRAGAArguments


def restart_is_due(config: LoRAGAArguments, steps_done: int, restarts_done: int) -> bool:
    """Whether the step after `steps_done` optimizer steps begins with a restart that has not been made yet."""
    every = config.ga_restart_steps
    return every is not None and steps_done % every == 0 and steps_done // every > restarts_done


def rewarmed(step: int, schedule, config: LoRAGAArguments) -> float:
    """The learning-rate factor at `step`: that of `schedule`, climbing back to it linearly after each restart.

    It has recovered before the next restart, even if `ga_restart_warmup_steps` is longer. `step` counts the schedule's steps:
    if fp16 skips the first steps because of overflow, the climb is late by as many steps.
    """
    every = config.ga_restart_steps
    assert every is not None  # otherwise the schedule is not wrapped
    since_restart, warmup = step % every, min(config.ga_restart_warmup_steps, every - 1)
    if step < every or since_restart >= warmup:
        return schedule(step)
    return schedule(step) * (since_restart + 1) / (warmup + 1)


def check_schedule(config: LoRAGAArguments, scheduler: LRScheduler | None, launch_has_one: bool) -> None:
    """Refuse a learning-rate schedule that is not the trainer's, since it cannot be warmed up again after a restart.

    Args:
        scheduler: the user's own, if any.
        launch_has_one: whether DeepSpeed's configuration has a schedule.

    Raises:
        ValueError: there is one, and `ga_restart_warmup_steps` is above 0.
    """
    if config.ga_restart_warmup_steps and (scheduler is not None or launch_has_one):
        source = "DeepSpeed's configuration" if launch_has_one else "`optimizers`"
        raise ValueError(
            f"`ga_restart_warmup_steps` is {config.ga_restart_warmup_steps}, but the learning-rate schedule comes from "
            f"{source}, so it cannot be warmed up again after a restart. Leave the schedule to `lr_scheduler_type`, or "
            "set `ga_restart_warmup_steps=0`."
        )


def rewarm(scheduler: LRScheduler, config: LoRAGAArguments) -> None:
    """Wrap the schedule of `scheduler` in `rewarmed`, in place. It depends only on the step, so nothing more need be saved.

    Raises:
        ValueError: the schedule is not a function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"`ga_restart_steps` warms the learning rate up again after each restart, which {type(scheduler).__name__} does "
            'not allow. Use an `lr_scheduler_type` that depends only on the step, such as "cosine" or "linear".'
        )
    scheduler.lr_lambdas = [partial(rewarmed, schedule=schedule, config=config) for schedule in scheduler.lr_lambdas]
