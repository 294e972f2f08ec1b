"""lora-ga inspect CHECKPOINT_OR_RUN [--out DIR]"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from .parsing import errors_as_messages


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="lora-ga inspect",
        allow_abbrev=False,
        description="Write one HTML page, and its pictures as PNGs: the alignment and gradient spectrum that the "
        "initialization found in every layer, the norms of the factors over the run's checkpoints, and the losses.",
    )
    parser.add_argument("path", metavar="CHECKPOINT_OR_RUN", type=Path, help="a `checkpoint-N`, or a run's output_dir")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder for index.html and the PNGs; default: CHECKPOINT_OR_RUN"
    )
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with errors_as_messages():
        from ..inspection.run_page import inspect

        page = inspect(arguments.path, arguments.out or arguments.path)
    print(f"{page} shows {arguments.path}. Open it in a browser.")


if __name__ == "__main__":
    main()
