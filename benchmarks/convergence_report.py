"""Tables and plots of what `convergence.py` has measured so far.

    python benchmarks/convergence_report.py benchmarks/sweeps/cpu.yaml

For each task: the loss of every method at its own best learning rate, at the learning rates that people use, and how wide the
range of rates is that come within 5 % and 25 % of the best. The plots go to `plots/`
(needs the extra `plot`).
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from measuring.results import PLOTS, Results, markdown_table
from sweeps.analysis import Arm, final_loss, near_best, steps_to
from sweeps.grids import arm_of, grid_runs

RUNS = Results("convergence")
USUAL_RATES = (1e-4, 2e-4)
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]  # Okabe & Ito
MARKERS = "osD^vP*X"
BASELINES = ("lora", "rslora")
"""Whose final loss the others' steps are counted to."""
TOLERANCES = (0.05, 0.25)
"""How far from its best a method may be at a learning rate that counts as a good one. Two runs that differ in nothing but
rounding may end several percent apart, so the second says more."""


def arms(sweep: dict[str, Any]) -> dict[str, list[Arm]]:
    """By task, what has been measured of every arm of the sweep, the grid's own seed first."""
    found: dict[str, dict[tuple, list]] = {}
    for settings in grid_runs(sweep):
        task = f"{settings['recipe']}_r{settings['r']}_{settings['max_steps']}steps"
        found.setdefault(task, {}).setdefault(arm_of(settings), [])
    for run in sorted(RUNS.runs(), key=lambda run: run["settings"]["seed"]):
        for by_arm in found.values():
            if arm_of(run["settings"]) in by_arm:
                by_arm[arm_of(run["settings"])].append(run)
    measured = {task: [arm for arm in labelled(by_arm) if arm.runs] for task, by_arm in found.items()}
    return {task: task_arms for task, task_arms in measured.items() if task_arms}


def labelled(by_arm: dict[tuple, list]) -> list[Arm]:
    """Arms named by what tells them apart: the method, and options that differ between arms of the same method."""
    options = [dict(arm) for arm in by_arm]
    result = []
    for arm, runs in zip(options, by_arm.values(), strict=True):
        same = [other for other in options if other["method"] == arm["method"]]
        differing = [name for name in arm if any(other.get(name) != arm[name] for other in same)]
        result.append(
            Arm(" ".join([arm["method"], *(f"{name.removeprefix('ga_')}={arm[name]}" for name in differing)]), runs)
        )
    return result


def number(value: float | None) -> str:
    return "" if value is None else "diverged" if value == float("inf") else f"{value:.3f}"


def table(task_arms: list[Arm]) -> str:
    """One row an arm: the three numbers, and steps to the baselines' final losses."""
    baselines = [arm for name in BASELINES for arm in task_arms if arm.label == name]
    answered = any("score" in run for arm in task_arms for run in arm.runs)
    rows = []
    for arm in task_arms:
        losses = arm.losses()
        at_best = arm.seeds_at_best()
        seeds = (
            "; ".join(f"{seed}: {number(loss)}" for seed, loss in at_best.items())
            if len(at_best) > 1
            else number(*at_best.values())
        )
        cells = [arm.label, f"{arm.best_rate:g}", seeds, *(number(losses.get(rate)) for rate in USUAL_RATES)]
        cells += [str(near_best(losses, tolerance)) if len(losses) > 2 else "" for tolerance in TOLERANCES]
        cells += [speed(arm, baseline, rate) for baseline in baselines for rate in (None, USUAL_RATES[-1])]
        cells += [solved(arm)] if answered else []
        rows.append(cells)
    header = [
        "method", "best lr", "loss there (seed: loss)", *(f"at {rate:g}" for rate in USUAL_RATES),
        *(f"decades of lr within {tolerance:.0%}" for tolerance in TOLERANCES),
        *(f"fewer steps than {arm.label}, {at}" for arm in baselines for at in ("best to best", f"at {USUAL_RATES[-1]:g}")),
        *(["solved (lr)"] if answered else []),
    ]  # fmt: skip
    return markdown_table(header, rows)


def table_by_rate(task_arms: list[Arm]) -> str:
    """Final loss, a row an arm and a column a learning rate."""
    rates = sorted({rate for arm in task_arms for rate in arm.losses()})
    rows = [[arm.label, *(number(arm.losses().get(rate)) for rate in rates)] for arm in task_arms]
    return markdown_table(["held-out loss at the learning rate", *(f"{rate:g}" for rate in rates)], rows)


def solved(arm: Arm) -> str:
    """How many of the benchmark's items each run got right, by learning rate, with one standard error."""
    found = []
    for run in sorted(arm.runs, key=lambda run: run["settings"]["learning_rate"]):
        if "score" not in run:
            continue
        share, items = run["score"], run["items"]
        error = (share * (1 - share) / items) ** 0.5
        found.append(f"{100 * share:.0f} ± {100 * error:.0f} % ({run['settings']['learning_rate']:g})")
    return "; ".join(found)


def speed(arm: Arm, baseline: Arm, rate: float | None) -> str:
    """How many times fewer steps than all of the baseline's the arm takes to the baseline's final loss, seed by seed."""
    ratios = []
    for theirs in baseline.at(rate or baseline.best_rate):
        same_seed = [
            run for run in arm.at(rate or arm.best_rate) if run["settings"]["seed"] == theirs["settings"]["seed"]
        ]
        for ours in same_seed:
            steps = steps_to(ours, final_loss(theirs))
            found = "not reached" if steps is None else f"{theirs['held_out'][-1]['step'] / steps:.1f}×"
            ratios.append((theirs["settings"]["seed"], found))
    return ratios[0][1] if len(ratios) == 1 else "; ".join(f"{seed}: {found}" for seed, found in sorted(ratios))


def style(index: int) -> dict[str, Any]:
    """Other for every arm: with the second round of colours the markers shift by one."""
    shift = index // len(COLOURS)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + shift) % len(MARKERS)]}


def plot(name: str, task: str, task_arms: list[Arm]) -> Path:
    """Final loss against learning rate; held-out loss against steps and seconds at each arm's best rate, and at a usual one."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 11), layout="constrained")
    by_rate, usual, steps, seconds = axes.flat
    for index, arm in enumerate(task_arms):
        look, losses = style(index), arm.losses()
        rates = sorted(losses)
        label = f"{arm.label}, best lr {arm.best_rate:g}"
        by_rate.plot(rates, [losses[rate] for rate in rates], label=label, **look)
        for axis, rate, along in (
            (steps, arm.best_rate, "step"), (seconds, arm.best_rate, "seconds"), (usual, USUAL_RATES[-1], "step")
        ):  # fmt: skip
            for run in arm.at(rate)[:1]:  # the grid's own seed: others have other data
                curve = run["held_out"]
                offset = run["init"].get("ga/init_seconds", 0.0) if along == "seconds" else 0
                axis.plot([offset + point[along] for point in curve], [point["loss"] for point in curve], **look)
    by_rate.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss after the last step, nats/token")
    by_rate.set_title("Final loss by learning rate")
    usual.set(xlabel="steps", ylabel="held-out loss, nats/token", title=f"At the learning rate {USUAL_RATES[-1]:g}")
    steps.set(xlabel="steps", ylabel="held-out loss, nats/token", title="At each method's own best learning rate")
    seconds.set(
        xlabel="seconds of initialization and training steps", ylabel="held-out loss, nats/token",
        title="The same, by the clock",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(task)
    path = PLOTS / f"{name}_{task}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def plot_numbers(name: str, task: str, task_arms: list[Arm]) -> Path:
    """The three numbers of every arm as bars: loss at its best rate, at the usual ones, decades of rates near the best."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 1.5 + 0.45 * len(task_arms)), layout="constrained", sharey=True)
    best, usual, width = axes
    labels, rows = [arm.label for arm in task_arms], range(len(task_arms))
    losses = [arm.losses() for arm in task_arms]
    bars = best.barh(rows, [min(of_arm.values()) for of_arm in losses], color=COLOURS[0])
    best.bar_label(
        bars, [f" {min(x.values()):.3f} (lr {a.best_rate:g})" for x, a in zip(losses, task_arms, strict=True)]
    )
    thickness = 0.8 / len(USUAL_RATES)
    for index, rate in enumerate(USUAL_RATES):
        known = {row + (index - 0.5) * thickness: of_arm[rate] for row, of_arm in enumerate(losses) if rate in of_arm}
        bars = usual.barh(list(known), list(known.values()), thickness, color=COLOURS[1 + index], label=f"lr {rate:g}")
        usual.bar_label(bars, fmt=" %.3f")
    for index, tolerance in enumerate(TOLERANCES):
        ranges = [(row, near_best(of_arm, tolerance)) for row, of_arm in enumerate(losses) if len(of_arm) > 2]
        at = [row + (index - 0.5) * 0.4 for row, _ in ranges]
        bars = width.barh(
            at, [near.decades for _, near in ranges], 0.4, color=COLOURS[3 + index], label=f"{tolerance:.0%}"
        )
        width.bar_label(bars, [f" {near}" for _, near in ranges], fontsize=8)
    width.legend(title="of its best loss")
    best.set(title="At each method's own best learning rate", xlabel="held-out loss, nats/token")
    usual.set(title="At the learning rates that people use", xlabel="held-out loss, nats/token")
    width.set(title="Learning rates near the best", xlabel="decades")
    best.set_yticks(rows, labels)
    best.invert_yaxis()
    usual.legend()
    for axis in axes:
        axis.margins(x=0.65)
    figure.suptitle(task)
    path = PLOTS / f"{name}_{task}_numbers.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    args = parser.parse_args()
    sweep = yaml.safe_load(args.sweep.read_text(encoding="utf-8"))
    PLOTS.mkdir(exist_ok=True)
    name = sweep.get("plots", "convergence")
    print(f"`python benchmarks/convergence.py {args.sweep}`\n")
    for task, task_arms in arms(sweep).items():
        print(f"### {task}\n\n{table_by_rate(task_arms)}\n\n{table(task_arms)}\n")
        for path in (plot_numbers(name, task, task_arms), plot(name, task, task_arms)):
            print(f"![{path.stem}]({path.relative_to(PLOTS.parent)})\n")
    print("; ".join(sorted({run["on"] for run in RUNS.runs()})))


if __name__ == "__main__":
    main()
