"""A plain `transformers.Trainer`, and no TRL: `examples/plain_trainer.py`, and what the package imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import PYTHON, REPOSITORY, accelerate_command, ended_well, environment, free_port
from safetensors.torch import load_file

WITHOUT_TRL = """
import runpy, sys

class NoTRL:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "trl":
            raise ModuleNotFoundError("No module named 'trl'", name="trl")

sys.meta_path.insert(0, NoTRL())
"""


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_what_needs_no_trl_is_imported_without_it():
    found = run(
        sys.executable, "-c",
        WITHOUT_TRL + """
import lora_ga_trainer
for name in lora_ga_trainer.__all__:
    try:
        getattr(lora_ga_trainer, name)
    except ModuleNotFoundError as error:
        print(name, error.name)
""",
    )  # fmt: skip
    assert ended_well(found), found.stderr
    kinds = ("DPO", "GRPO", "Reward", "SFT")
    assert found.stdout.split("\n")[:-1] == [f"LoRAGA{k}{part} trl" for k in kinds for part in ("Config", "Trainer")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run in one process."""
    out = tmp_path_factory.mktemp("plain")
    script = (
        WITHOUT_TRL
        + f"""
sys.argv = ["plain_trainer.py", "--r", "2", "--out", {str(out)!r}]
runpy.run_path("examples/plain_trainer.py", run_name="__main__")
"""
    )
    done = run(sys.executable, "-c", script)
    assert ended_well(done), done.stderr[-2000:]
    assert "LoRA-GA initialized 14 layers" in done.stdout
    assert "Reloaded with stock PEFT: the same logits." in done.stdout
    return out


def test_it_resumes_from_the_trainers_own_checkpoints(whole, tmp_path):
    out = tmp_path / "out"
    command = [PYTHON, "examples/plain_trainer.py", "--r", "2", "--out", str(out)]
    assert ended_well(run(*command))
    trained = adapter_of(out)
    assert all(torch.equal(value, trained[name]) for name, value in adapter_of(whole).items())
    (out / "checkpoint-12").rename(tmp_path / "later")
    resumed = run(*command, "--resume")
    assert ended_well(resumed) and "LoRA-GA gradient" not in resumed.stderr, "it was estimated again"
    assert all(torch.equal(value, trained[name]) for name, value in adapter_of(out).items())


def test_on_two_processes(whole, tmp_path):
    """ZeRO-2: the factors of one process, and an adapter of the same size."""
    done = run(
        *accelerate_command("zero2", "--main_process_port", str(free_port())),
        "examples/plain_trainer.py", "--r", "2", "--out", str(tmp_path),
    )  # fmt: skip
    assert ended_well(done), done.stderr[-2000:]
    ours, theirs = (load_file(folder / "lora_ga.tensors") for folder in (tmp_path, whole))
    for name, value in theirs.items():  # float32 sums in another order, and 4 of 16 examples less in a batch
        sign = (ours[name] * value).sum(dim=1, keepdim=True).sign()
        assert (ours[name] - sign * value).norm() < 1e-3 * value.norm(), name
    assert adapter_of(tmp_path).keys() == adapter_of(whole).keys()


def test_a_sharded_model_is_not_half_saved(tmp_path):
    done = run(
        *accelerate_command("zero3", "--main_process_port", str(free_port())),
        "examples/plain_trainer.py", "--r", "2", "--out", str(tmp_path),
    )  # fmt: skip
    assert not ended_well(done)
    assert "The `state_dict` to be saved lacks A0 of base_model" in done.stderr and "LoRAGAMixin" in done.stderr
    assert not [*tmp_path.rglob("adapter_model.safetensors")]
