"""One process of a launch on GPUs: trains the tiny model, and the first writes down what is compared.

accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 tests/gpu/nccl_worker.py MODEL OUT
"""

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from tiny import lora_config, sft_arguments, word_problems, word_tokenizer

from lora_ga_trainer import LoRAGASFTConfig, LoRAGASFTTrainer
from lora_ga_trainer.checkpoint.adapter_files import adapter_state_dict
from lora_ga_trainer.distributed.backends import gather_objects, rank, world_size


def main(model: str, out: Path) -> None:
    processes, on_gpu = int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    options = {"ga_estimator": "exact", "model_init_kwargs": {"dtype": "float32"}}
    options |= {"use_cpu": not on_gpu, "ddp_backend": "nccl" if on_gpu else "gloo"}
    options |= {"per_device_train_batch_size": 4 // processes}
    trainer = LoRAGASFTTrainer(
        model=model,
        args=LoRAGASFTConfig(**sft_arguments(out / "run", **options)),
        train_dataset=word_problems(),
        processing_class=word_tokenizer(),
        peft_config=lora_config(r=2),
    )
    trainer.train()
    adapter = {name: value.cpu() for name, value in adapter_state_dict(trainer.model).items()}
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in adapter.values())).hexdigest()
    digests = gather_objects(digest)
    trainer.save_model(str(out / "final"))
    if rank() == 0:
        launch = trainer.model.lora_ga.state.launch
        torch.save(adapter, out / "adapter.pt")
        found = {
            "launch": [launch.backend, launch.world_size],
            "communication": dist.get_backend().split(":")[-1] if dist.is_initialized() else None,
            "equal_factors": len(set(digests)) == 1,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }
        (out / "found.json").write_text(json.dumps(found))
    if dist.is_initialized():
        assert world_size() == processes
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
