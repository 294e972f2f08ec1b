"""lora-ga export --checkpoint_dir out/checkpoint-500 --out adapter [--merge] [--rank 8] [--fold_scale]"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parsing import errors_as_messages, parse_options

if TYPE_CHECKING:
    from ..inspection.exported import OnData


@dataclass
class ExportArguments:
    checkpoint_dir: str = field(metadata={"help": "A `checkpoint-N`, or the folder that `save_model` wrote."})
    out: str = field(metadata={"help": "Folder to create."})
    merge: bool = field(default=False, metadata={"help": "Write the whole model with the adapter merged into it."})
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "The untouched base, to merge, to measure, or to cut or fold experts. Default: the adapter's."
        },
    )
    rank: int | None = field(
        default=None, metadata={"help": "A smaller rank: the best approximation in every layer. Prints what it loses."}
    )
    fold_scale: bool = field(
        default=False,
        metadata={"help": "Multiply B by the scaling, so that alpha is the rank, for programs that ignore patterns."},
    )
    dataset_path: str | None = field(
        default=None,
        metadata={"help": "Local .jsonl, .json, .parquet or .csv file to measure on what the export loses."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "The same, a data set on the hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str = field(default="test", metadata={"help": "Its split."})
    num_samples: int = field(default=64, metadata={"help": "Rows to measure on: the first ones."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Tokens of a row; longer ones are cut, as in training."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows to measure on at once."})

    def __post_init__(self):
        if self.dataset_name is not None and self.dataset_path is not None:
            raise ValueError(
                f"`dataset_name` is {self.dataset_name!r} and `dataset_path` is {self.dataset_path!r}, but at most one of them "
                "can be set: a data set on the hub, or a local file."
            )
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")


def main(argv: list[str] | None = None) -> None:
    with errors_as_messages():
        (arguments,) = parse_options((ExportArguments,), sys.argv[1:] if argv is None else argv, "lora-ga export")
        from ..checkpoint.exporting import export

        rows = load_rows(arguments)
        base = None if rows is None else measurable_base(arguments)  # before anything is written
        lost = export(
            arguments.checkpoint_dir, arguments.out, arguments.merge,
            base_model=arguments.base_model, rank=arguments.rank, fold_scale=arguments.fold_scale,
        )  # fmt: skip
        found = None if base is None else measure(base, arguments, rows)
    if lost or found:
        from ..inspection.exported import table

        print(f"{table(lost, found)}\n")
    print(f"{arguments.out} holds {'the merged model' if arguments.merge else 'the adapter'}.")


def load_rows(arguments: ExportArguments) -> Any:
    """The rows to measure on, a `Dataset`; None without one.

    Raises:
        ValueError: there is no such file, data set or split.
    """
    from .sources import load_named, local_items

    if arguments.dataset_path is not None:
        rows = local_items(arguments.dataset_path, ())
    elif arguments.dataset_name is not None:
        remedy = "Check the name, the split and the connection, or pass a local file as `dataset_path`."
        rows = load_named(arguments.dataset_name, remedy, name=arguments.dataset_config, split=arguments.dataset_split)
    else:
        return None
    return rows.select(range(min(arguments.num_samples, len(rows))))


def measurable_base(arguments: ExportArguments) -> Path:
    """The folder of the base.

    Raises:
        ValueError: it is not found, or what an export of this adapter loses is not measured.
    """
    from ..checkpoint.exporting import base_of
    from ..inspection.exported import check_measurable

    trained = Path(arguments.checkpoint_dir)
    base = base_of(trained, arguments.base_model)
    check_measurable(base, trained)
    return base


def measure(base: Path, arguments: ExportArguments, rows: Any) -> "OnData":
    from ..inspection.exported import measure

    trained, exported = Path(arguments.checkpoint_dir), Path(arguments.out)
    return measure(base, trained, exported, rows, arguments.max_length, arguments.batch_size)


if __name__ == "__main__":
    main()
