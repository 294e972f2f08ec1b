"""Direct preference optimization: held-out loss and accuracy, LoRA beside LoRA-GA.

    python benchmarks/dpo.py [--steps 40] [--rates 1e-5 1e-4]

SmolLM2-135M learns to prefer the solutions of word problems to the same ones with one number wrong. η_f is the rate of full
fine-tuning that LoRA-GA's first step is matched to.
"""

from argparse import ArgumentParser

from measuring.results import Results, markdown_table
from sweeps.preferences import run

RUNS = Results("dpo")
ARMS = [("LoRA", None), ("LoRA-GA", 1e-6), ("LoRA-GA", 5e-5)]


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        for rate in args.rates:
            for method, eta in ARMS:
                settings = {
                    "method": method, "learning_rate": rate, "full_learning_rate": eta, "steps": args.steps, "seed": seed,
                }  # fmt: skip
                found = RUNS.measure(settings, lambda settings=settings: run(settings))
                print(settings, found, flush=True)
                label = method if eta is None else f"{method}, η_f {eta:g}"
                figures = [f"{found[name]:.3f}" for name in ("loss", "accuracy", "chosen", "rejected")]
                rows.append([label, f"{rate:g}", str(seed), *figures])
    print(
        markdown_table(["method", "rate", "seed", "loss", "accuracy", "reward of the chosen", "of the rejected"], rows)
    )


if __name__ == "__main__":
    main()
