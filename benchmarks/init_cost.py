"""What an initialization costs and how good it is: ours against PEFT's own LoRA-GA, on the same samples, side by side.

    python benchmarks/init_cost.py --model smollm2
    python benchmarks/init_cost.py --model llama2-7b-shapes --layers 1

Every measurement is a process of its own.

Seconds: from the loaded base model to the initialized adapter, wrapping included, in rounds in which the variants take turns,
so that whatever else changes on the machine changes for all; the ratio to PEFT's is the median over rounds. Where others use
the machine too, the ratio of the seconds that the processor's cores were busy says more ("CPU"; nothing on a GPU).
Memory: the peak above the resting model, and what of it an ordinary LoRA forward and backward on the same batches does not
take ("added"); in one more process, which gives freed memory back at once, and so is slower.
Alignment: that of the factors with the exact gradient, cos(G, BBᵀG + GAᵀA), as a share of the best that any factors of rank r
reach, √(σ₁² + … + σ₂ᵣ²) / ‖G‖; mean and minimum over the layers.

Finished measurements are in `results/init_cost.jsonl` and not made again. Draws `plots/init_cost_MODEL.png` (needs the extra
`plot`).
"""

import statistics
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from costs.initialization import OURS, PEFTS, RANK, measure_gradient, measure_training, measure_variant
from costs.models import add_model_arguments
from measuring.hardware import device_name
from measuring.processes import MALLOC, add_variant_arguments, report, run_variant
from measuring.results import PLOTS, Results, markdown_table

TRAINING, GRADIENT = "a LoRA step", "the exact gradient"


def measure_all(args: Namespace, results: Results) -> dict[str, dict[str, Any]]:
    """Whatever is missing, then: by variant its rounds, and the references."""
    names = ("model", "samples", "batch_size", "max_length")
    settings = {name: getattr(args, name) for name in names} | {"r": RANK, "hardware": device_name()}
    settings |= {} if args.model == "smollm2" else {"layers": args.layers}
    settings |= {} if args.dtype == "float32" else {"dtype": args.dtype}
    wanted = [{"variant": variant, "round": "memory"} for variant in (TRAINING, *args.variants)]
    wanted += [{"variant": variant, "round": number} for number in range(args.rounds) for variant in args.variants]
    gradient = results.find(settings | {"variant": GRADIENT})
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        measure = partial(run_variant, __file__, arguments=sys.argv[1:], work=work)
        if gradient is None or any(results.find(settings | key) is None for key in wanted):
            fresh = measure(GRADIENT)  # its files are needed for every alignment
            gradient = results.measure(settings | {"variant": GRADIENT}, lambda: fresh)
        for key in wanted:
            environment = MALLOC if key["round"] == "memory" else {}
            run = results.measure(settings | key, partial(measure, key["variant"], environment=environment))
            found.setdefault(key["variant"], {})[key["round"]] = run
    return found | {GRADIENT: gradient}


def summary(found: dict[str, dict[str, Any]], variants: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """The numbers of every row: medians over rounds, ratios within a round."""
    full, training = found[GRADIENT]["bytes"], found[TRAINING]["memory"]["peak"]
    rows = {}
    for variant in variants:
        seconds = [found[variant][number]["seconds"] for number in range(rounds)]
        memory = found[variant]["memory"]
        rows[variant] = {
            "seconds": statistics.median(seconds),
            "peak": memory["peak"],
            "added_share": max(0, memory["peak"] - training) / full,
            "alignment_mean": memory["alignment_mean"],
            "alignment_min": memory["alignment_min"],
        }
        if PEFTS in variants:
            theirs = [found[PEFTS][number]["seconds"] for number in range(rounds)]
            rows[variant]["ratio"] = statistics.median(a / b for a, b in zip(seconds, theirs, strict=True))
            pairs = [(found[variant][number], found[PEFTS][number]) for number in range(rounds)]
            if all("cpu_seconds" in run for pair in pairs for run in pair):
                ratios = [ours["cpu_seconds"] / peft["cpu_seconds"] for ours, peft in pairs]
                rows[variant]["cpu_ratio"] = statistics.median(ratios)
    return rows


def plot(rows: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """Bars: seconds, added memory, alignment."""
    import matplotlib.pyplot as plt  # here, so that the workers start without matplotlib

    panels = {
        "seconds": ("seconds (median)", 1, "{:.1f}"),
        "added_share": ("memory added to a LoRA step's,\n% of the float32 gradients", 100, "{:.1f} %"),
        "alignment_mean": ("alignment, share of the best possible\n(mean over layers; | minimum)", 1, "{:.4f}"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 0.5 * len(rows) + 2), layout="constrained", sharey=True)
    names = list(rows)[::-1]
    colours = ["#D55E00" if name == PEFTS else "#0072B2" for name in names]  # Okabe & Ito
    for axis, (key, (label, factor, text)) in zip(axes, panels.items(), strict=True):
        values = [factor * rows[name][key] for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [text.format(value) for value in values], padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.25)
    axes[2].plot([rows[name]["alignment_min"] for name in names], names, "|", color="black", markersize=14)
    axes[2].set_xlim(min(row["alignment_min"] for row in rows.values()) - 0.02, 1.03)
    figure.suptitle(title)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser, layers=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=[*OURS, PEFTS], default=[*OURS, PEFTS])
    add_variant_arguments(parser)
    args = parser.parse_args()
    if args.variant:
        workers = {TRAINING: measure_training, GRADIENT: measure_gradient}
        worker = workers.get(args.variant, lambda args: measure_variant(args.variant, args))
        return report(args.work, worker(args))

    found = measure_all(args, Results("init_cost"))
    rows = summary(found, args.variants, args.rounds)
    mib = 2**20
    gradient = found[GRADIENT]
    print(f"\n`python benchmarks/init_cost.py {' '.join(sys.argv[1:])}` ({gradient['on']})\n")
    print(
        f"{gradient['layers']} layers, r = {RANK}, {args.samples} samples in batches of {args.batch_size}, {args.rounds} "
        f"rounds. The full float32 gradients take {gradient['bytes'] / mib:,.0f} MiB; a LoRA forward and backward peaks "
        f"{found[TRAINING]['memory']['peak'] / mib:,.0f} MiB above the model.\n"
    )
    header = [
        "initialization",
        "seconds",
        "/ PEFT's",
        "CPU / PEFT's",
        "peak, MiB",
        "/ LoRA step's",
        "added / gradients",
        "alignment",
        "min",
    ]
    cells = [
        [
            variant,
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            f"{row['cpu_ratio']:.2f}" if "cpu_ratio" in row else "",
            f"{row['peak'] / mib:,.0f}",
            f"{row['peak'] / found[TRAINING]['memory']['peak']:.2f}",
            f"{row['added_share']:.1%}",
            f"{row['alignment_mean']:.4f}",
            f"{row['alignment_min']:.4f}",
        ]
        for variant, row in rows.items()
    ]
    print(markdown_table(header, cells))
    path = PLOTS / f"init_cost_{args.model}.png"
    plot(rows, path, f"{args.model}: {args.samples} samples, r = {RANK}")
    print(f"\n![what an initialization costs on {args.model}]({path.relative_to(path.parents[1])})")


if __name__ == "__main__":
    main()
