"""Where items come from: local JSONL, JSON, Parquet or CSV, or the hub; with named columns."""

from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def local_items(path: str | Path, columns: tuple[str, ...]) -> Dataset:
    """The rows of a local file, if it has all of `columns`.

    Raises:
        ValueError: no such file, another kind of file, or a column is missing; the message names it and the columns found.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}, which tells how to read it.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Check the path.")
    items = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    check_columns(items, columns, str(path))
    return items


def hub_items(name: str, config: str, split: str, columns: tuple[str, ...], remedy: str) -> Dataset:
    """The rows of a data set on the hub, if it can be reached and has all of `columns`.

    Raises:
        ValueError: it cannot, ending in `remedy`; or a column is missing.
    """
    try:
        items = load_dataset(name, config, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ValueError(f"The data set {name} cannot be loaded from the hub ({error}). {remedy}") from error
    check_columns(items, columns, f"{name} {config}")
    return items


def check_columns(items: Dataset, columns: tuple[str, ...], source: str) -> None:
    """
    Raises:
        ValueError: naming the first column that is missing, and those found.
    """
    for column in columns:
        if column not in items.column_names:
            raise ValueError(
                f"{source} has no column {column!r}, only {', '.join(items.column_names)}. Rename or add it."
            )
