"""Every backend against one process: factors, losses, resuming, bytes, seconds. Makes the table in docs/distributed.md.

    python benchmarks/backends.py

Each row is two real processes, started by `accelerate launch` with the configuration in `accelerate_configs/cpu`, training the
tests' tiny Llama on the CPU; the resumed half is done by two new processes. `tests/test_backends.py` holds all of it to bounds.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from measuring.hardware import hardware_line
from measuring.results import markdown_table

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also where there is a GPU: the configurations are for CPUs
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from backend_worker import STEPS, Run, execute, factor_error
from launching import launch
from tiny import tiny_model

BACKENDS = {
    "DDP": "ddp",
    "ZeRO-1": "zero1",
    "ZeRO-2": "zero2",
    "ZeRO-3": "zero3",
    "ZeRO-3, CPU offload": "zero3_offload",
    "FSDP2": "fsdp2",
}
SAVING = {"save_strategy": "steps", "save_steps": STEPS // 2}


def runs(model: str) -> list[Run]:
    return [
        Run("exact", model, SAVING, {"r": 2}),
        Run("sketch", model, {"ga_estimator": "sketch", "ga_sketch_size": 10, "max_steps": 1}, {"r": 2}),
    ]


def row(name: str, found: dict[str, dict], reference: dict[str, dict]) -> list[str]:
    exact, resumed = found["exact"], found["resumed"]
    errors = [factor_error(found[run]["adapter"], reference[run]["adapter"]) for run in ("exact", "sketch")]
    loss = max(
        abs(ours - theirs) for ours, theirs in zip(exact["losses"][:5], reference["exact"]["losses"][:5], strict=True)
    )
    resumed_loss = max(abs(ours - theirs) for ours, theirs in zip(resumed["losses"], exact["losses"], strict=True))
    resumed_weights = max(
        (resumed["adapter"][key] - value).abs().max().item() for key, value in exact["adapter"].items()
    )
    report = found["sketch"]["report"]
    return [
        name,
        str(exact["launch"].world_size),
        *(f"{error:.1e}" for error in errors),
        f"{loss:.1e}",
        f"{resumed_loss:g} / {resumed_weights:g}",
        " + ".join(f"{count:,}" for count in report.all_reduced_bytes),
        f"{report.seconds:.2f}",
    ]


def main() -> None:
    torch.set_num_threads(1)  # as in the launched processes
    folder = Path(tempfile.mkdtemp())
    model = str(folder / "base")
    tiny_model().save_pretrained(model)
    reference = {run.name: execute(run, folder / "one_process" / run.name) for run in runs(model)}
    rows = []
    for name, config in BACKENDS.items():
        out = folder / config
        found = launch(config, runs(model), out)
        checkpoint = str(out / f"exact/checkpoint-{STEPS // 2}")
        found |= launch(config, [Run("resumed", model, SAVING, {"r": 2}, resume=checkpoint)], out)
        rows.append(row(name, found, reference))

    print("\n`python benchmarks/backends.py`\n")
    header = [
        "backend", "processes", "factor error, exact", "factor error, sketch", "loss-curve difference, 5 steps",
        "resume difference, loss / weights", "bytes all-reduced per process, by pass", "init seconds",
    ]  # fmt: skip
    print(markdown_table(header, rows))
    print(f"\n{hardware_line()}. One process: {reference['sketch']['report'].seconds:.2f} s.")


if __name__ == "__main__":
    main()
