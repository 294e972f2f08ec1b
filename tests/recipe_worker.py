"""recipes/metamath.py as one process of a launch, FSDP2 on a CPU included; nothing of the training is left for the evaluation.

accelerate launch --config_file accelerate_configs/cpu/fsdp2.yaml tests/recipe_worker.py OPTION …
"""

import gc
import os

import metamath
import torch
from backend_worker import fsdp2_on_cpu
from finetuning import run
from torch.distributed.tensor import DTensor


def standing() -> int:
    """The bytes of all tensors on this process."""
    gc.collect()
    found = gc.get_objects()
    tensors = [one for one in found if isinstance(one, torch.Tensor) and not isinstance(one, DTensor)]  # but its part
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def evaluate(recipe, options):
    assert standing() < 10_000, standing()  # constants; this process's half of the tiny model would be 70 kB
    evaluated(recipe, options)


evaluated, run.evaluate = run.evaluate, evaluate
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    fsdp2_on_cpu()
run.run(metamath.RECIPE)
