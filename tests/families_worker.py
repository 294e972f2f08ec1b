"""Every family of `test_families` and `tiny_vision` under FSDP2 on two processes, beside the same model whole on each of them.

    torchrun --nproc_per_node 2 tests/families_worker.py OUT

OUT/pictures.pt has a batch for each process of those that see pictures, by family. Each process writes OUT/<rank>.pt: for each
family how far the factors of the two are apart, and whether the logits are the base's.
"""

import copy
import sys
from pathlib import Path

import test_families
import torch
import torch.distributed as dist
from backend_worker import factor_error
from peft import get_peft_model
from test_families import CONFIG, FAMILIES
from tiny import lora_config, tiny_batches
from tiny_vision import vision_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_ga_trainer import initialize_lora_ga
from lora_ga_trainer.checkpoint.adapter_files import adapter_state_dict
from lora_ga_trainer.initialization import attach_lora_ga

Batch = dict[str, torch.Tensor]


def factors(model: nn.Module, batch: Batch) -> Batch:
    initialize_lora_ga(model, [batch], CONFIG, disable_tqdm=True)
    return {name: value for name, value in adapter_state_dict(model).items() if name.endswith("frozen")}


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def compared(model: nn.Module, base: nn.Module, batch: Batch) -> tuple[float, bool]:
    """(how far the factors under FSDP2 are from those of the whole model, whether the logits are the base's)."""
    whole = factors(copy.deepcopy(model), batch)
    attach_lora_ga(model, CONFIG)
    sharded_in: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(sharded_in):
            sharded_in = (*sharded_in, f"{name}.")
            for layer in module:
                fully_shard(layer)
    sharded = factors(fully_shard(model), batch)
    return factor_error(sharded, whole), torch.equal(logits(model, batch), logits(base, batch))


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    batch = tiny_batches((4, 4))[dist.get_rank()]
    found = {family: compared(*test_families.pair(family), batch) for family in FAMILIES}
    for family, batches in torch.load(out / "pictures.pt").items():
        base, _ = vision_model(family)
        config = lora_config(r=2, target_modules="all-linear", task_type=None)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        found[f"{family} with pictures"] = compared(model, base, batches[dist.get_rank()])
    torch.save(found, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
