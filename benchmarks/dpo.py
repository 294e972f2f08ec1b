"""Direct preference optimization: held-out loss and accuracy, LoRA beside LoRA-GA.

    python benchmarks/dpo.py [--steps 40] [--rates 1e-5 1e-4]

SmolLM2-135M learns to prefer the solutions of word problems to the same ones with one number wrong. η_f is the rate of full
fine-tuning that LoRA-GA's first step is matched to.
"""

from measuring.results import Results, markdown_table
from sweeps.beside_lora import all_settings, arguments, cells
from sweeps.preferences import run

RUNS = Results("dpo")


def main() -> None:
    rows = []
    for settings in all_settings(arguments(__doc__.splitlines()[0], steps=40)):
        found = RUNS.measure(settings, lambda settings=settings: run(settings))
        rows.append([*cells(settings), *(f"{found[name]:.3f}" for name in ("loss", "accuracy", "chosen", "rejected"))])
    print(
        markdown_table(["method", "rate", "seed", "loss", "accuracy", "reward of the chosen", "of the rejected"], rows)
    )


if __name__ == "__main__":
    main()
