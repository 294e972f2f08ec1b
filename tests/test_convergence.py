"""The convergence benchmark: what it reads from a learning-rate sweep, and a small real sweep from its command to its plot."""

import importlib
import math
from pathlib import Path
from unittest.mock import patch

import convergence
import convergence_report
import pytest
import yaml
from finetuning.run import parse
from measuring.results import Results
from methods.table import METHODS
from recipe_cases import options, write
from sweeps import training
from sweeps.analysis import Arm, near_best, steps_to
from sweeps.grids import arm_of, grid_runs
from sweeps.peft_lora_ga import PEFTS

TASK = {"recipe": "metamath", "r": 8, "max_steps": 60}


def finished(rate, *losses, seed=1, **settings):
    """A run with evaluations every 10 steps."""
    return {
        "settings": TASK | {"method": "lora", "learning_rate": rate, "seed": seed} | settings,
        "held_out": [{"step": 10 * i, "seconds": float(i), "loss": loss} for i, loss in enumerate(losses)],
        "init": {},
        "on": "here",
    }


def test_the_range_is_interpolated_in_the_logarithm_of_the_rate():
    found = near_best({1e-4: 2.0, 1e-3: 1.0, 1e-2: 3.0}, tolerance=0.5)
    assert found.low == pytest.approx(10**-3.5)
    assert found.high == pytest.approx(10**-2.75)
    assert found.decades == pytest.approx(0.75)
    assert not found.open_low and not found.open_high


def test_a_range_that_the_sweep_does_not_leave_is_open():
    found = near_best({1e-4: 1.01, 1e-3: 1.0, 1e-2: 3.0})
    assert found.open_low and not found.open_high
    assert str(found).startswith("≥ ")


def test_a_diverged_run_ends_the_range_at_the_last_rate_that_did_not():
    found = near_best({1e-4: 2.0, 1e-3: 1.0, 1e-2: math.inf})
    assert found.high == 1e-3 and not found.open_high


def test_a_second_dip_beyond_a_worse_rate_is_not_in_the_range():
    assert near_best({1e-4: 1.0, 1e-3: 9.0, 1e-2: 1.0, 1e-1: 0.99}).low > 1e-3


def test_steps_to_a_loss_are_linear_between_evaluations():
    run = finished(1e-3, 3.0, 2.0, 1.0)
    assert steps_to(run, 1.5) == pytest.approx(15)
    assert steps_to(run, 3.0) == 0
    assert steps_to(run, 0.5) is None
    assert steps_to(finished(1e-3, 3.0, None, 1.0), 1.0) == 20, "a diverged evaluation is not one to interpolate from"


def test_other_seeds_do_not_choose_the_best_rate():
    """They ran at one rate only, on other data."""
    arm = Arm("lora", [finished(1e-3, 3, 2), finished(1e-2, 3, 1), finished(1e-2, 3, 1.4, seed=2)])
    assert arm.losses() == {1e-3: 2, 1e-2: 1}
    assert arm.seeds_at_best() == {1: 1, 2: 1.4}


def test_a_grid_is_every_combination_of_its_lists():
    sweep = {
        "common": {"r": 8},
        "grids": [{"method": ["lora", "full"], "learning_rate": [0.1, 0.2]}, {"method": "pissa"}],
    }
    runs = grid_runs(sweep)
    assert runs[1] == {"r": 8, "method": "lora", "learning_rate": 0.2}
    assert len(runs) == 5 and runs[-1] == {"r": 8, "method": "pissa"}


def test_every_run_is_in_one_share():
    sweep = {"common": {"r": 8}, "grids": [{"seed": list(range(40))}]}
    shares = [convergence.share_of(settings, 3) for settings in grid_runs(sweep)]
    assert set(shares) == {1, 2, 3} and min(shares.count(share) for share in (1, 2, 3)) > 5
    assert convergence.share_of({"b": 1, "a": 2}, 3) == convergence.share_of({"a": 2, "b": 1}, 3)


def test_only_finished_arms_get_more_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence, "RUNS", Results("convergence", tmp_path))
    sweep = {
        "common": TASK | {"seed": 1},
        "best_seeds": [2, 3],
        "grids": [{"method": ["lora", "full"], "learning_rate": [1e-3, 1e-2]}],
    }
    for run in (finished(1e-3, 3, 2), finished(1e-2, 3, 1), finished(1e-3, 3, 2, method="full")):
        convergence.RUNS.append(run)
    extra = convergence.best_runs(sweep)
    assert [(run["method"], run["learning_rate"], run["seed"]) for run in extra] == [
        ("lora", 1e-2, 2),
        ("lora", 1e-2, 3),
    ]


def test_a_report_has_what_was_measured_of_unfinished_arms(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence_report, "RUNS", Results("convergence", tmp_path))
    sweep = {
        "common": TASK | {"seed": 1},
        "grids": [{"method": ["lora", "full"], "learning_rate": [1e-3, 1e-2]}],
    }
    for run in (finished(1e-3, 3, 1.5, seed=2), finished(1e-3, 3, 2), finished(1e-3, 3, 2, r=32)):
        convergence_report.RUNS.append(run)
    (arm,) = convergence_report.arms(sweep)["metamath_r8_60steps"]
    assert arm.label == "lora"
    assert arm.losses() == {1e-3: 2}, "the grid's own seed, in whatever order they were run"
    assert arm.seeds_at_best() == {1: 2, 2: 1.5}


def test_arms_of_one_method_are_told_apart_by_what_differs():
    arms = convergence_report.labelled(
        {
            (("method", "lora"), ("r", 8)): [],
            (("method", "lora_ga"), ("r", 8), ("ga_gamma", 16)): [],
            (("method", "lora_ga"), ("r", 8), ("ga_gamma", 64)): [],
        }
    )
    assert [arm.label for arm in arms] == ["lora", "lora_ga gamma=16", "lora_ga gamma=64"]


def test_answers_stand_in_the_table_where_there_are_some():
    low, high = (finished(rate, 3, 2) | {"score": score, "items": 100} for rate, score in ((1e-3, 0.5), (1e-2, 0.1)))
    header, _, row = convergence_report.table([Arm("lora", [high, low])]).splitlines()
    assert header.endswith("| solved (lr) |")
    assert row.endswith("| 50 ± 5 % (0.001); 10 ± 3 % (0.01) |"), "√(p·(1 − p)/n)"
    unanswered = Arm("lora", [finished(1e-3, 3, 2)])
    assert "solved" not in convergence_report.table([unanswered])
    assert convergence_report.table([unanswered, Arm("full", [high])]).splitlines()[2].endswith("|  |")


def test_a_sweep_from_its_command_to_its_table_and_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    flags = options("metamath", tmp_path, max_steps=4, max_length=60)
    common = dict(zip([flag.removeprefix("--") for flag in flags[::2]], flags[1::2], strict=True))
    del common["output_dir"], common["learning_rate"], common["r"]
    sweep = {
        "common": common | {"recipe": "metamath", "threads": 1, "r": 4, "seed": 1, "eval_steps": 2},
        "best_seeds": [2],
        "grids": [{"method": ["lora", "lora_ga", "peft_lora_ga"], "learning_rate": [0.001, 0.01]}],
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    monkeypatch.setattr(convergence, "RUNS", Results("convergence", tmp_path))
    monkeypatch.setattr(convergence_report, "RUNS", convergence.RUNS)
    monkeypatch.setattr(convergence_report, "PLOTS", tmp_path / "plots")
    monkeypatch.chdir(tmp_path)
    for share in ("1/2", "2/2", "1/1"):
        monkeypatch.setattr("sys.argv", ["convergence.py", str(path), "--share", share])
        convergence.main()
    runs = convergence.RUNS.runs()
    assert len(runs) == 9, "3 methods at 2 rates, and each again with another seed at its best"
    for run in runs:
        assert [point["step"] for point in run["held_out"]] == [0, 2, 4]
        assert run["held_out"][-1]["loss"] < run["held_out"][0]["loss"], "it learned something"
        assert ("ga/init_seconds" in run["init"]) == (run["settings"]["method"] == "lora_ga")
    before = {run["held_out"][0]["loss"] for run in runs if run["settings"]["seed"] == 1}
    assert max(before) - min(before) < 0.01, "the same held-out rows; PEFT's LoRA-GA alone rounds the base weights"

    monkeypatch.setattr("sys.argv", ["convergence_report.py", str(path)])
    convergence_report.main()
    out = capsys.readouterr().out
    assert all(f"| {method} |" in out for method in ("lora", "lora_ga", "peft_lora_ga"))
    for name in ("convergence_metamath_r4_4steps", "convergence_metamath_r4_4steps_numbers"):
        assert Path(tmp_path, f"plots/{name}.png").stat().st_size > 10_000
        assert f"](plots/{name}.png)" in out


def test_a_run_answers_its_benchmark_where_it_is_asked_to(tmp_path, monkeypatch):
    items = write([{"question": "w1 w2", "answer": "w3 #### 1"}] * 3, tmp_path / "items.jsonl")
    flags = options("metamath", tmp_path, evaluate="true", evaluation_file=items, max_new_tokens=4)
    settings = dict(zip([flag.removeprefix("--") for flag in flags[::2]], flags[1::2], strict=True))
    del settings["output_dir"]
    monkeypatch.chdir(tmp_path)
    found = training.run(settings | {"recipe": "metamath", "method": "lora", "threads": 1, "eval_steps": 3})
    assert found["items"] == 3
    assert 0 <= found["score"] <= 1


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_run_of_the_sweeps_at_hand_is_one_that_its_recipe_takes(name):
    sweep = yaml.safe_load((Path(convergence.__file__).parent / f"sweeps/{name}.yaml").read_text())
    runs = grid_runs(sweep)
    for settings in {arm_of(run): run for run in runs}.values():
        recipe = importlib.import_module(settings["recipe"]).RECIPE
        argv = [
            text
            for key, value in settings.items()
            if key not in ("recipe", "threads")
            for text in (f"--{key}", str(value))
        ]
        with patch.dict(METHODS, PEFTS):
            parsed = parse(recipe, [*argv, "--bf16", "false"])  # bf16 wants the hardware
        assert parsed.model.method == settings["method"]
    by_arm = {}
    for run in runs:
        if "evaluate" not in run:
            by_arm.setdefault(arm_of(run), []).append(run["learning_rate"])
    assert max(len(rates) for rates in by_arm.values()) >= 6
    assert sweep["best_seeds"]
