"""The committed launch configurations: accelerate reads every one, and as what it says it is."""

import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

FOLDER = Path(__file__).resolve().parents[1] / "accelerate_configs"
ON_GPUS = {
    # file: (use_deepspeed, use_fsdp, ZeRO stage)
    "ddp": (False, False, None),
    "zero1": (True, False, 1),
    "zero2": (True, False, 2),
    "zero3": (True, False, 3),
    "zero3_offload": (True, False, 3),
    "fsdp2": (False, True, None),
    "zero3_multinode": (True, False, 3),
}


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(ON_GPUS)


@pytest.mark.parametrize("name", ON_GPUS)
def test_what_accelerate_makes_of_it(name):
    path = FOLDER / f"{name}.yaml"
    options = launch_command_parser().parse_args(["--config_file", str(path), "recipes/metamath.py"])
    args, *_ = _validate_launch_command(options)
    use_deepspeed, use_fsdp, stage = ON_GPUS[name]
    # the precision is the recipe's to say (`bf16: true`): said here too, DeepSpeed refuses a recipe that says otherwise
    assert (args.use_deepspeed, args.use_fsdp, args.mixed_precision) == (use_deepspeed, use_fsdp, "no")
    if use_deepspeed:
        assert args.zero_stage == stage
        assert (args.offload_param_device == "cpu") == (name == "zero3_offload")
        assert not args.zero3_save_16bit_model or args.zero3_save_16bit_model == "false"
    elif use_fsdp:
        assert int(args.fsdp_version) == 2
    else:
        assert args.multi_gpu
    assert args.num_processes == (16 if name == "zero3_multinode" else 8)
    assert args.num_machines == (2 if name == "zero3_multinode" else 1)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_key_is_one_of_accelerates(path):
    load_config_from_file(str(path))  # an unknown key is an error
    assert set(yaml.safe_load(path.read_text())) >= {"distributed_type", "num_processes"}


def test_the_launch_line_in_the_header():
    for name in set(ON_GPUS) - {"zero3_multinode"}:
        head = (FOLDER / f"{name}.yaml").read_text().splitlines()[:2]
        assert f"accelerate launch --config_file accelerate_configs/{name}.yaml recipes/metamath.py" in head[1]


def test_the_slurm_script(tmp_path):
    """bash reads it, and each machine launches with its own rank: `srun` and `scontrol` are stood in for."""
    (tmp_path / "scontrol").write_text("#!/bin/bash\nprintf 'node-a\\nnode-b\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/bash\nfor id in 0 1; do SLURM_NODEID=$id "$@"; done\n')
    (tmp_path / "accelerate").write_text('#!/bin/bash\nprintf "%s|" "$@"; echo\n')
    for program in ("scontrol", "srun", "accelerate"):
        (tmp_path / program).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_ID": "12345",
    }
    done = subprocess.run(
        ["bash", str(FOLDER / "zero3_multinode.slurm"), "--config", "my config.yaml"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for rank, line in enumerate(done.stdout.splitlines()):
        assert f"|--num_machines|2|--num_processes|8|--machine_rank|{rank}|--main_process_ip|node-a|" in line
        assert line.endswith("|recipes/metamath.py|--config|my config.yaml|")
    assert len(done.stdout.splitlines()) == 2
