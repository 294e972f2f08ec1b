"""The class swap in TRL's own quick start: `SFTTrainer` and `LoRAGASFTTrainer` with the same default arguments, on three tasks.

    python benchmarks/quickstart.py [--steps 60]

All arguments are the defaults of TRL's `SFTConfig` (rate 2e-5, batches of 8, linear schedule, gradient checkpointing) and of
PEFT's `LoraConfig()` (r 8, α 8, the model's own default targets), but for the number of steps, the length of the examples and
what a CPU needs. The data are those of the recipes. Printed is the held-out loss before and after.
"""

from argparse import ArgumentParser

from measuring.results import Results, markdown_table
from sweeps.quickstart import TRAINERS, run

TASKS = {"metamath": 128, "wizardlm": 128, "code_feedback": 320}
"""Recipe -> tokens of the longest example."""
RUNS = Results("quickstart")


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    rows = []
    for recipe, length in TASKS.items():
        for seed in args.seeds:
            wanted = {"recipe": recipe, "max_length": length, "steps": args.steps, "seed": seed}
            found = [
                RUNS.measure(settings, lambda settings=settings: run(settings))
                for settings in (wanted | {"trainer": name} for name in TRAINERS)
            ]
            losses = [found[0]["before"], *(each["after"] for each in found)]
            rows.append([recipe, str(seed), *(f"{loss:.3f}" for loss in losses)])
    print(markdown_table(["task", "seed", "before", *TRAINERS], rows))


if __name__ == "__main__":
    main()
