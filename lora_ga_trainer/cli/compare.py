"""lora-ga compare RUN... --out DIR"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from .parsing import errors_as_messages


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="lora-ga compare",
        allow_abbrev=False,
        description="Overlay the losses of several runs, and print a table. Any run of a transformers or TRL trainer works; "
        "those of LoRA-GA trainers are also drawn over seconds (their logs have a clock).",
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="a run's output_dir, or one of its checkpoints"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for losses.png")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with errors_as_messages():
        from ..inspection.comparison import compare

        table, plot = compare(arguments.runs, arguments.out)
    print(f"{table}\n\n{plot} shows the losses.")


if __name__ == "__main__":
    main()
