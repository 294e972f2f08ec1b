"""Launches over NCCL: the factors and losses of one process. They start new processes, so they come after the other tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backend_worker import factor_error
from gpu_results import FACTOR_TOLERANCE, LOSS_TOLERANCE, adapter_of, losses
from launching import REPOSITORY, environment, free_port

BACKENDS = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


@pytest.mark.parametrize("config", BACKENDS)
def test_processes_over_nccl(cuda, config, make_trainer, base_model, tmp_path):
    """Two where there are two cards; on one card FSDP2 and ZeRO run with a single process, which takes the same ways."""
    processes = min(2, torch.cuda.device_count())
    if config == "ddp" and processes < 2:
        pytest.skip("DDP over NCCL needs two cards")
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is the extra `deepspeed`")
    found = launched(config, processes, base_model, tmp_path)
    reference = make_trainer(cuda, per_device_train_batch_size=4)
    reference.train()
    assert found["launch"] == [BACKENDS[config], processes]
    assert found["communication"] == "nccl"
    assert found["equal_factors"], "every process holds the same bits"
    assert found["losses"] == pytest.approx(losses(reference), rel=LOSS_TOLERANCE)
    adapter = torch.load(tmp_path / "adapter.pt")
    assert factor_error(adapter, adapter_of(reference)) < FACTOR_TOLERANCE


def launched(config: str, processes: int, model: str, out: Path) -> dict:
    """What `nccl_worker.py` wrote, started by accelerate with a configuration for GPUs."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"accelerate_configs/{config}.yaml",
    ]
    options = ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    worker = [str(Path(__file__).with_name("nccl_worker.py")), model, str(out)]
    finished = subprocess.run(
        [*launcher, *options, *worker],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-6000:]
    return json.loads((out / "found.json").read_text())
