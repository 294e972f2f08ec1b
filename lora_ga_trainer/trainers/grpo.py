"""`LoRAGAGRPOTrainer`: group relative policy optimization, reinforcement learning on the model's own completions."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice
from math import ceil
from typing import Any

from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from ..distributed.backends import gather_objects, rank, world_size
from .configs import LoRAGAGRPOConfig
from .data import draw_examples
from .trl import LoRAGATRLMixin

TOUCHED = (
    "_metrics",
    "_logs",
    "_pending_metrics",
    "_pending_extra_logs",
    "entropy_coef",
    "_last_world_entropy",
    "_entropy_window_stats",
)
"""What generating, scoring and the loss write to in a `GRPOTrainer`, beside the state's count of tokens. Some are newer than
TRL 1.0."""


class LoRAGAGRPOTrainer(LoRAGATRLMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` with the LoRA-GA initialization (arXiv 2407.05000); takes the same arguments.

    The gradient is that of GRPO's own loss, advantages and all, on completions that the model generates and the reward
    functions score before training begins: as many generation batches as hold `ga_num_samples` completions, with prompts drawn
    by `ga_seed`. Afterwards everything is as before, random state and metrics included, so that training generates what it
    would have. Reward functions that keep a state of their own see these completions too. The reference of `beta` is the base
    model, or the start of the stage, as in `LoRAGADPOTrainer`. Everything else is as in `LoRAGASFTTrainer`.

    Raises:
        ValueError: as `LoRAGASFTTrainer`; `use_vllm` is on; from `train`, the completions of every prompt were rewarded alike.
    """

    config_class = LoRAGAGRPOConfig
    args: LoRAGAGRPOConfig  # type: ignore[assignment]  # one of the mixin's, and TRL's
    maybe_activation_offload_context = nullcontext()  # TRL has none here

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: GRPOConfig | TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: LoraConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
    ):
        model, args, peft_config = self.before_init(
            model, args, train_dataset, eval_dataset, quantization_config, peft_config
        )
        if args.use_vllm:  # type: ignore[union-attr]  # `before_init` has made it a `LoRAGAGRPOConfig`
            raise ValueError(
                "`use_vllm` is True, but LoRA-GA's delta form has not been tried with the weights that TRL sends to vLLM. "
                "Leave it out: the model generates by itself."
            )
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self.drop_copy_of_new_adapter()

    def sample_batches(self, seed: int) -> Iterator[dict[str, Any]]:
        """This process's completions, scored, in batches for the loss.

        They are generated as in training: the same number at once, and each prompt's one after the other, over all processes.
        """
        together: Any = self.args.generation_batch_size  # GRPOConfig has filled it in
        times: int = self.num_generations  # type: ignore[assignment]  # as above
        wanted = ceil(self.args.ga_num_samples / together) * together // times
        drawn, _ = draw_examples(self.train_dataset, wanted, seed, slice(None))
        prompts = list(islice(cycle(drawn), wanted))
        rows = [prompt for prompt in prompts for _ in range(times)]
        mine = together // world_size()
        fewest = ceil(mine / self.estimation_batch_size)
        parts = next(parts for parts in range(fewest, mine + 1) if mine % parts == 0)  # TRL splits evenly
        is_training, batches = self.model.training, []
        self.model.train()  # by which TRL tells training from evaluation
        for start in range(rank() * mine, len(rows), together):
            scored: Any = self._generate_and_score_completions(rows[start : start + mine])
            whole: Any = split_pixel_values_by_grid(scored)
            split: Any = split_tensor_dict(whole, parts)
            batches += [unsplit_pixel_values_by_grid(batch) for batch in split]
        self.model.train(is_training)
        if not any(gather_objects(any(bool(batch["advantages"].any()) for batch in batches))):
            raise ValueError(
                f"The completions of each of {len(prompts)} prompts for LoRA-GA were rewarded alike, so there is no advantage "
                "and no gradient. Estimate on more completions (`ga_num_samples`), generate more per prompt "
                "(`num_generations`), or use prompts or rewards that tell completions apart."
            )
        yield from batches

    def estimation_inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return batch  # `_prepare_inputs` would generate

    @contextmanager
    def unchanged_metrics(self) -> Iterator[None]:
        kept = {name: copy.deepcopy(vars(self)[name]) for name in TOUCHED if name in vars(self)}
        tokens = self.state.num_input_tokens_seen
        try:
            yield
        finally:
            vars(self).update(kept)
            self.state.num_input_tokens_seen = tokens
