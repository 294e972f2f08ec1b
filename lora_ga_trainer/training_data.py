"""Training sets: what can be told of them before TRL prepares them, and drawing the examples to estimate the gradient on."""

from collections.abc import Sized
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset, Value
from trl import SFTConfig

CONVERSATIONS = ("messages", "conversations")
FORMS = 'a "prompt" and a "completion", "messages", or `dataset_text_field`'
SHUFFLE_BUFFER = 1000
"""Examples that a streaming dataset holds at once to draw the sample from."""
TEXT = ("string", "large_string", "null")
ROLES = {"training": "to train", "evaluation": "to evaluate"}


def draw_examples(dataset: Any, wanted: int, seed: int, mine: slice) -> tuple[list[Any], int]:
    """`wanted` random examples, or as many as there are: (those at `mine`, how many were drawn in all).

    The same ones on every process. Of what can be indexed only those at `mine` are read.
    """
    if isinstance(dataset, IterableDataset):
        drawn = list(dataset.shuffle(seed=seed, buffer_size=max(wanted, SHUFFLE_BUFFER)).take(wanted))
        return drawn[mine], len(drawn)
    if isinstance(dataset, torch.utils.data.IterableDataset):  # which cannot be shuffled
        drawn = list(islice(dataset, wanted))
        return drawn[mine], len(drawn)
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator, device="cpu")[:wanted].tolist()
    return [dataset[index] for index in order[mine]], len(order)


def check_not_empty(dataset: Any, problem: str, role: str = "training") -> None:
    """
    Raises:
        ValueError: it is empty.
    """
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise ValueError(f"The {role} set {problem}, so there is nothing {ROLES[role]} on. Pass at least one example.")


def check_examples(dataset: Any, args: SFTConfig, role: str) -> None:
    """Refuse a "training" or "evaluation" set that TRL would stumble over: an empty stream, other columns, no text.

    Of a stream only the first example is looked at. What is no `Dataset` is TRL's to refuse.

    Raises:
        ValueError: naming the column, what is in it or what there is instead.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)) or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):  # type: ignore[union-attr]  # a string has been parsed
        return
    if isinstance(dataset, IterableDataset):
        first = next(iter(dataset), None)
        check_not_empty([] if first is None else [first], "is a stream that ends before its first example", role)
        columns = list(first or {})
    else:
        columns = dataset.column_names
    if "input_ids" in columns:
        return
    for column in _columns_read(columns, args.dataset_text_field, role):
        if isinstance(dataset, Dataset):
            _check_text(dataset, column, role)


def _columns_read(columns: list[str], text_field: str, role: str) -> list[str]:
    """The columns that TRL takes the texts from, of those there are."""
    if "prompt" in columns and "completion" not in columns:
        raise ValueError(
            f'The {role} set has a column "prompt" but no "completion", only {columns}, so that there would be nothing '
            f"{ROLES[role]} on. Add or rename it."
        )
    if "completion" in columns and "prompt" in columns:
        return ["prompt", "completion"]
    for column in (*CONVERSATIONS, text_field):
        if column in columns:
            return [column]
    raise ValueError(
        f"The {role} set has the columns {columns}, but needs {FORMS} ({text_field!r}). Rename them "
        "(`dataset.rename_columns`), set `dataset_text_field`, or pass a `formatting_func`."
    )


def _check_text(dataset: Dataset, column: str, role: str) -> None:
    feature = dataset.features[column]
    if isinstance(feature, Value) and feature.dtype not in TEXT:
        raise ValueError(
            f"The column {column!r} of the {role} set holds {feature.dtype}, but must hold text. Convert it to strings."
        )
    if dataset.data.column(column).null_count:  # also counts rows that a selection has left out
        missing = [row for row, value in enumerate(dataset[column]) if value is None]
        if missing:
            raise ValueError(
                f"The column {column!r} of the {role} set has no value in {len(missing):,} of {len(dataset):,} rows, first "
                f"in row {missing[0]}. Fill them in, or leave them out with `dataset.filter`."
            )
