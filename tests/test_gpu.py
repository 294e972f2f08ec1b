"""`make gpu` where there is no GPU: its program at a tenth of the size, and what it leaves where something fails."""

import json
import os
import random
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import gpu
import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def started(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *options],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def table_of(said: str) -> list[list[str]]:
    """The cells of the table's rows, without its header."""
    lines = [line for line in said.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_everything_at_a_tenth_of_the_size(tmp_path):
    done = started("--tenth", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = table_of(done.stdout)
    assert list(dict.fromkeys(row[0] for row in table)) == list(gpu.PIECES)
    assert "failed" not in " ".join(row[2] for row in table).replace("0 failed", "")

    runs = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [[run["settings"]["piece"], run["settings"]["case"], run["says"]] for run in runs] == [
        row[:3] for row in table
    ]
    found = {(run["settings"]["piece"], run["settings"]["case"]): run for run in runs}
    tests = found["tests", "tests/gpu"]
    assert len(tests["passed"]) >= 10 and not tests["failed"]
    assert {name.partition(".py")[0] for name in tests["passed"]} >= {"test_gpu_estimation", "test_gpu_trainer"}
    for model in ("smollm2", "llama2-7b"):
        seconds = [run["seconds"] for (piece, _), run in found.items() if piece == f"step_cost {model}"]
        assert all(len(of_variant) == gpu.TENTH.rounds for run in seconds for of_variant in run.values())
        ours = found[f"init_cost {model}", "ours, 2 passes"]
        assert ours["seconds"] > 0 and ("alignment_mean" in ours) == (model == "smollm2")
    assert {case.split()[0] for piece, case in found if piece == "scaling"} == {"base", *gpu.TENTH.axes}
    losses = [run["held_out"] for (piece, _), run in found.items() if piece == "convergence" and "held_out" in run]
    assert len(losses) == len(gpu.METHODS) * len(gpu.TENTH.rates)
    assert all(held_out[-1]["loss"] < held_out[0]["loss"] for held_out in losses), "it learned something"


def test_without_time_every_piece_is_told_to_be_cut_off(tmp_path):
    done = started("--tenth", "--results", str(tmp_path), "--minutes", "0.34")
    assert done.returncode == 1
    assert [row[0] for row in table_of(done.stdout)] == list(gpu.PIECES)
    assert done.stdout.count("**failed**: cut off") == len(gpu.PIECES)


def test_a_run_that_is_stopped_prints_its_table_and_leaves_no_worker(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--tenth", "--results", str(tmp_path), "--pieces", "scaling"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        while not (workers := psutil.Process(run.pid).children()):
            time.sleep(0.05)
        run.terminate()
        said = run.communicate(timeout=60)[0]
    assert run.returncode == 1
    assert "| piece | case | found | took |" in said
    assert not any(worker.is_running() for worker in workers)


def test_a_piece_that_fails_keeps_its_rows_and_ends_the_worker(tmp_path, monkeypatch, capsys):
    def half_a_piece(sizes, time_left):
        assert time_left() > 0
        yield gpu.Row("first", {"seconds": 1.0}, "1 s")
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setitem(gpu.PIECES, "scaling", (1, half_a_piece))
    read, write = os.pipe()
    args = Namespace(worker=write, pieces=["scaling", "convergence"], tenth=True, results=tmp_path, until=float("inf"))
    with pytest.raises(SystemExit, match="1"):
        gpu.worker(args)
    with os.fdopen(read) as lines:
        begins, row, failure = map(json.loads, lines)
    assert begins == {"begins": "scaling"}
    assert (row["case"], row["says"], row["failed"]) == ("first", "1 s", False)
    assert failure["failed"] and failure["says"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "half_a_piece" in capsys.readouterr().err, "with its traceback"
    (kept,) = (json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert kept["seconds"] == 1.0 and kept["settings"]["case"] == "first"


@pytest.mark.parametrize("make", ["addition", "subtraction"])
def test_the_word_sums_add_up(make):
    from sweeps import word_sums

    tokenizer = word_sums.character_tokenizer()
    for seed in range(50):
        row = getattr(word_sums, make)(random.Random(seed))
        asked = re.findall(r"\d+", row["query"])
        a, b, found, answer = map(int, re.search(r"(\d+) [+-] (\d+) = (\d+) .*\n#### (\d+)$", row["response"]).groups())
        assert asked == [str(a), str(b)]
        assert found == answer == (a + b if make == "addition" else a - b) > 0
        ids = tokenizer(row["query"])["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == row["query"]


def test_the_shares_are_those_of_nine_minutes():
    assert sum(share for share, _ in gpu.PIECES.values()) == 9 * 60 - 20


@pytest.mark.parametrize("sizes", [gpu.FULL, gpu.TENTH], ids=["full", "tenth"])
def test_its_models_and_its_recipe_are_there(sizes):
    from costs.models import SHAPES
    from finetuning.run import parse
    from metamath import RECIPE
    from sweeps.word_sums import Learning

    assert {sizes.smollm2.name, sizes.llama.name, Learning(**sizes.learning).shapes} <= SHAPES.keys()
    for method in gpu.METHODS:
        options = sizes.sweep | {"bf16": False} | method  # bf16 wants the hardware
        argv = [text for name, value in options.items() if name != "threads" for text in (f"--{name}", str(value))]
        assert parse(RECIPE, argv).model.method == method["method"]


def test_the_shapes_of_smollm2_are_those_of_its_weights():
    from costs.models import SMOLLM2
    from data.demo_model import demo_model_path
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_model_path())
    assert {name: getattr(config, name) for name in SMOLLM2} == SMOLLM2
