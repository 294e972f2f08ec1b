"""The model under evaluation, as lm-evaluation-harness expects it."""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lora_ga_trainer.distributed.backends import gather_objects, rank, world_size


class HarnessModel(HFLM):
    """The harness's `--model hf`: a whole model on every process of the launch; the processes share the items.

    The harness itself (0.4.13) shares them only among the GPUs of one machine. An answer ends with the tokenizer's token, as a
    training example does, or with one of the base model's.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        own = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        self.model.generation_config.eos_token_id = sorted(ends - {None})

    @property
    def rank(self) -> int:
        return rank()

    @property
    def world_size(self) -> int:
        return world_size()

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([part.reshape(-1) for part in gather_objects(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        found = gather_objects(obj)
        return found if rank() == dst else None

    def barrier(self) -> None:
        gather_objects(None)
