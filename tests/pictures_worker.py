"""Vision-language models under DDP on two processes, whose rows have one picture, two, or none.

torchrun --nproc_per_node 2 tests/pictures_worker.py OUT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_vision_language import data, trainer_of

from lora_ga_trainer.report import InitReport

FAMILIES = ("llava", "qwen2_5_vl", "gemma3")


def found_by(family: str, out: Path, **options) -> InitReport:
    """What the initialization of a run found in the gradient over all rows."""
    sizes = {"ga_num_samples": 8, "ga_batch_size": 2, "ga_estimator": "exact"}
    trainer = trainer_of(family, out, data(family), **sizes, **options)
    trainer.train()
    assert trainer.state.global_step == 2
    return trainer.lora_ga_report


def main(out: Path) -> None:
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 2}
    found = {family: found_by(family, out / family, **options) for family in FAMILIES}
    torch.save(found, out / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
