"""Reinforcement learning: the reward over the steps of GRPO, LoRA beside LoRA-GA.

    python benchmarks/grpo.py [--steps 30] [--rates 1e-5 1e-4]

SmolLM2-135M continues "1 + 2 = 3, 5 + 3 = 8, 7 + 6 =" with sums up to 20 + 20, and is rewarded with 1 for the right number.
Each step takes 8 completions of each of 4 prompts. η_f is the rate of full fine-tuning that LoRA-GA's first step is matched to.
"""

from typing import Any

from measuring.results import PLOTS, Results, markdown_table
from sweeps.beside_lora import all_settings, arguments, cells, label
from sweeps.rewards import run

RUNS = Results("grpo")


def draw(runs: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({found["settings"]["learning_rate"] for found in runs})
    figure, panels = pyplot.subplots(1, len(rates), figsize=(11, 3.8), sharey=True, squeeze=False, layout="constrained")
    for axes, rate in zip(panels.flat, rates, strict=True):
        for found in (found for found in runs if found["settings"]["learning_rate"] == rate):
            rewards = found["rewards"]
            smooth = [sum(rewards[max(0, step - 4) : step + 1]) / min(5, step + 1) for step in range(len(rewards))]
            axes.plot(range(1, len(rewards) + 1), smooth, label=label(found["settings"]))
        axes.set_title(f"learning rate {rate:g}")
        axes.set_xlabel("optimizer step")
        axes.grid(True, color="0.9")
    panels[0, 0].set_ylabel("reward, mean of 5 steps")
    panels[0, 0].legend()
    figure.savefig(PLOTS / "grpo.png", dpi=130)


def main() -> None:
    args = arguments(__doc__.splitlines()[0], steps=30)
    rows, runs = [], []
    for settings in all_settings(args):
        found = RUNS.measure(settings, lambda settings=settings: run(settings))
        runs.append(found)
        means = sum(found["rewards"][:5]) / 5, sum(found["rewards"][-10:]) / 10
        rows.append([*cells(settings), *(f"{mean:.3f}" for mean in means)])
    print(markdown_table(["method", "rate", "seed", "reward, first 5 steps", "last 10"], rows))
    draw([found for found in runs if found["settings"]["seed"] == args.seeds[0]])


if __name__ == "__main__":
    main()
