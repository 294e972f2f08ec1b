"""Every family of `test_families` under FSDP2 on two processes, beside the same model whole on each of them.

    torchrun --nproc_per_node 2 tests/families_worker.py OUT

Each writes OUT/<rank>.pt: for each family how far the factors of the two are apart, and whether the logits are the base's.
"""

import copy
import sys
from pathlib import Path

import test_families
import torch
import torch.distributed as dist
from backend_worker import factor_error
from test_families import CONFIG, FAMILIES
from tiny import tiny_batches
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_ga_trainer import initialize_lora_ga
from lora_ga_trainer.checkpoint.adapter_files import adapter_state_dict
from lora_ga_trainer.initialization import attach_lora_ga


def factors(model) -> dict[str, torch.Tensor]:
    initialize_lora_ga(model, [tiny_batches((4, 4))[dist.get_rank()]], CONFIG, disable_tqdm=True)
    return {name: value for name, value in adapter_state_dict(model).items() if name.endswith("frozen")}


def compared(family: str) -> tuple[float, bool]:
    """(how far the factors under FSDP2 are from those of the whole model, whether the logits are the base's)."""
    model, base = test_families.pair(family)
    whole = factors(copy.deepcopy(model))
    attach_lora_ga(model, CONFIG)
    sharded_in: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(sharded_in):
            sharded_in = (*sharded_in, f"{name}.")
            for layer in module:
                fully_shard(layer)
    sharded = factors(fully_shard(model))
    is_base = torch.equal(test_families.logits(model), test_families.logits(base))
    return factor_error(sharded, whole), is_base


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.save({family: compared(family) for family in FAMILIES}, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
