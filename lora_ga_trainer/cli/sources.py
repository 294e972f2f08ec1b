"""Sources of items: local JSONL, JSON, Parquet or CSV files, or the hub; with named columns."""

import glob
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import set_seed
from trl import DatasetMixtureConfig, get_dataset

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def local_items(path: str | Path, columns: tuple[str, ...]) -> Dataset:
    """The rows of a local file, if it has all of `columns`.

    Raises:
        ValueError: the file is missing, empty, damaged or of an unknown kind, `datasets` cannot open its name, or a column is
            missing; the message names it and the columns found.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}, which determines how it is read.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Check the path.")
    if "::" in str(path):
        raise ValueError(f"{path} has '::' in its name, which `datasets` takes for a chain of archives. Rename it.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Check that it was written to the end.")
    if FORMATS[path.suffix] != "parquet":
        _check_utf8(path)
    try:
        # `datasets` treats names as patterns
        items = load_dataset(FORMATS[path.suffix], data_files=glob.escape(str(path)), split="train")
    except DatasetGenerationError as error:  # it only says that there was one
        raise ValueError(
            f"{path} cannot be read as {FORMATS[path.suffix]} ({error.__cause__}). Repair the file."
        ) from error
    check_columns(items, columns, str(path))
    return items


def _check_utf8(path: Path) -> None:
    """`datasets` would accept other bytes as text, and fail only when they are read."""
    line = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line, _ in enumerate(file, start=1):  # noqa: B007 (used below)
                pass
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 near line {line + 1} ({error}). Convert it, for example with `iconv -f latin1 -t utf-8`."
        ) from error


def hub_items(name: str, config: str | None, split: str, columns: tuple[str, ...], remedy: str) -> Dataset:
    """The rows of a data set on the hub, or in a folder, if it can be loaded and has all of `columns`.

    Raises:
        ValueError: it cannot be loaded, ending in `remedy`; or a column is missing.
    """
    items = load_named(name, remedy, name=config, split=split)
    check_columns(items, columns, f"{name} {config}" if config else name)
    return items


def load_named(dataset_name: str, remedy: str, **options: Any) -> Any:
    """`datasets.load_dataset` of a name on the hub or a folder.

    Raises:
        ValueError: it cannot be loaded, ending in `remedy`; or it is a file, or a folder whose name would be read as a pattern.
    """
    if Path(dataset_name).is_file():
        raise ValueError(
            f"`dataset_name` is {dataset_name!r}, which is a file, but must be a name on the hub or a folder. Pass the file as "
            "`dataset_path`."
        )
    if Path(dataset_name).is_dir() and ("::" in dataset_name or glob.escape(dataset_name) != dataset_name):
        raise ValueError(
            f"`dataset_name` is {dataset_name!r}, but `datasets` treats '*', '?', '[' and '::' in a folder's name as a "
            "pattern and would read other folders. Rename it, or pass its file as `dataset_path`."
        )
    try:
        return load_dataset(dataset_name, **options)
    except (OSError, DatasetGenerationError) as error:
        # a `DatasetGenerationError` only says that there was one
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        where = "" if Path(dataset_name).is_dir() else " from the hub"
        raise ValueError(f"The data set {dataset_name} cannot be loaded{where} ({reason}). {remedy}") from error


def load_mixture(mixture: DatasetMixtureConfig, seed: int) -> Any:
    """The data sets of TRL's `datasets`, one after the other, by split.

    Raises:
        ValueError: one cannot be loaded, or they have different columns.
    """
    set_seed(seed)  # TRL holds a random part out, which must be the same on all processes and on resuming
    try:
        return get_dataset(mixture)
    except (OSError, DatasetGenerationError, ValueError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        names = ", ".join(dataset.path for dataset in mixture.datasets)
        raise ValueError(
            f"The mixture `datasets` ({names}) cannot be loaded ({reason}). Each needs what `datasets.load_dataset` takes, "
            "such as `path: json` with `data_files: FILE` and `split: train`; `columns` selects those that all have."
        ) from error


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
