"""Training sets: checks before TRL prepares them, and drawing the examples to estimate the gradient on."""

from collections.abc import Iterable, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset, IterableDataset, Value

if TYPE_CHECKING:
    from trl import SFTConfig

CONVERSATIONS = ("messages", "conversations")
TURNS = ("prompt", "completion", "chosen", "rejected")
"""Columns that may hold text or conversations, but all of one kind in a data set."""
FORMS = 'a "prompt" and a "completion", "messages", or `dataset_text_field`'
SHUFFLE_BUFFER = 1000
"""Buffer size for shuffling a streaming dataset, to draw the sample."""
TEXT = ("string", "large_string", "null")
ROLES = {"training": "to train", "evaluation": "to evaluate"}


def draw_examples(dataset: Any, wanted: int, seed: int, mine: slice) -> tuple[list[Any], int]:
    """`wanted` random examples, or as many as there are: (those at `mine`, how many were drawn in all).

    Every process draws the same ones. If the dataset can be indexed, only those at `mine` are read.
    """
    if isinstance(dataset, IterableDataset):
        drawn = list(dataset.shuffle(seed=seed, buffer_size=max(wanted, SHUFFLE_BUFFER)).take(wanted))
        return drawn[mine], len(drawn)
    if isinstance(dataset, torch.utils.data.IterableDataset):  # it cannot be shuffled
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


def check_examples(dataset: Any, args: "SFTConfig", role: str) -> None:
    """Refuse a "training" or "evaluation" set that TRL's `SFTTrainer` would fail on: an empty stream, other columns, no text,
    malformed conversations.

    Only the first example of a stream is checked. Anything but a `Dataset` is left to TRL.

    Raises:
        ValueError: naming the column and its contents, or the columns found.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)) or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):  # type: ignore[union-attr]  # a string has been parsed
        return
    rows, columns = _rows(dataset, role)
    if "input_ids" in columns:
        return
    read = _columns_read(columns, args.dataset_text_field, role)
    if read[0] in CONVERSATIONS and args.dataset_text_field in columns and isinstance(rows[0][read[0]], str):
        read = [args.dataset_text_field]  # as TRL does
    check_forms(rows, read, role)


def check_turns(dataset: Any, role: str) -> None:
    """Refuse a set for a trainer of preferences or answers whose columns hold no text and no conversations.

    Raises:
        ValueError: see `check_forms`.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    rows, columns = _rows(dataset, role)
    if not any(column.endswith("_ids") for column in columns):  # tokenized already
        check_forms(rows, [column for column in TURNS if column in columns], role)


def _rows(dataset: Dataset | IterableDataset, role: str) -> tuple[Dataset | list[dict[str, Any]], list[str]]:
    """(rows to check, column names): all of `dataset`, or the first row of a stream."""
    if isinstance(dataset, Dataset):
        return dataset.with_format(None), dataset.column_names
    first = next(iter(dataset), None)
    rows = [] if first is None else [first]
    check_not_empty(rows, "is a stream that ends before its first example", role)
    return rows, list(rows[0])


def check_forms(rows: Dataset | list[dict[str, Any]], columns: list[str], role: str) -> None:
    """
    Raises:
        ValueError: a value of `columns` is missing, is neither text nor a conversation, or differs in kind from the others;
            naming the column, the first such row and the expected form.
    """
    if isinstance(rows, Dataset):
        for column in columns:
            _check_text(rows, column, role)
        if _are_well_formed(rows, columns):
            return
        rows = rows.select_columns(columns)
    _check_rows(rows, columns, role)


def _are_well_formed(dataset: Dataset, columns: list[str]) -> bool:
    """Whether a check of whole columns, without a loop over rows, rules out everything that `_check_rows` refuses."""
    if all(isinstance(dataset.features[column], Value) for column in columns):
        return not set(columns) & set(CONVERSATIONS)
    return all(_holds_conversations(dataset.data.column(column), _keys(column)) for column in columns)


def _holds_conversations(values: pyarrow.ChunkedArray, keys: tuple[str, str]) -> bool:
    if not (pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type)):
        return False
    messages = pyarrow.compute.list_flatten(values)
    return (
        pyarrow.types.is_struct(messages.type)
        and {field.name for field in messages.type} >= set(keys)
        and pyarrow.types.is_string(messages.type.field(keys[0]).type)
        and pyarrow.compute.min(pyarrow.compute.list_value_length(values)).as_py() != 0
        and not any(pyarrow.compute.struct_field(messages, key).null_count for key in keys)
    )


def _keys(column: str) -> tuple[str, str]:
    """TRL reads ShareGPT's keys in the column of that name, and nowhere else."""
    return ("from", "value") if column == "conversations" else ("role", "content")


def _check_rows(rows: Iterable[dict[str, Any]], columns: list[str], role: str) -> None:
    """`check_forms`, row by row. TRL expects every row to be of the first one's kind."""
    conversational = False
    for number, row in enumerate(rows):
        if number == 0:
            lists = [column for column in columns if isinstance(row[column], list)]
            conversational = bool({*CONVERSATIONS} & {*columns} or {*TURNS} & {*lists})
        for column in columns:
            problem = _problem(row[column], _keys(column)) if conversational else None
            if not conversational and not isinstance(row[column], str):
                problem = _kind(row[column])
            if problem is not None:
                author, content = _keys(column)
                form = f"a list of messages with {author!r} and {content!r}" if conversational else "text"
                alike = f" ({', '.join(columns)}: all text, or all conversations)" if len(columns) > 1 else ""
                raise ValueError(
                    f"The column {column!r} of the {role} set holds {problem} in row {number}, but must hold {form}{alike}. "
                    "Convert it with `dataset.map`, or leave such rows out with `dataset.filter`."
                )


def _problem(conversation: Any, keys: tuple[str, str]) -> str | None:
    """What keeps `conversation` from being a list of messages with `keys`, or None."""
    if not isinstance(conversation, list):
        return _kind(conversation)
    if not conversation:
        return "an empty list"
    for message in conversation:
        if not isinstance(message, dict):
            return f"a list of {_kind(message)}"
        if not isinstance(message.get(keys[0]), str):
            return f"a message without {keys[0]!r} (it has {sorted(message)})"
        # a message that calls tools may have no content
        if all(value is None for name, value in message.items() if name != keys[0]):
            return f"a message without {keys[1]!r} (it has {sorted(message)})"
    return None


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "JSON text (`json.loads` reads it)" if value.lstrip().startswith(("[", "{")) else "text"
    return {list: "a list", dict: "a dictionary", type(None): "no value"}.get(type(value), f"a {type(value).__name__}")


def _columns_read(columns: list[str], text_field: str, role: str) -> list[str]:
    """Those of `columns` that TRL takes the texts from."""
    if "prompt" in columns and "completion" not in columns:
        raise ValueError(
            f'The {role} set has a column "prompt" but no "completion", only {columns}, so there would be nothing '
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
    if dataset.data.column(column).null_count:  # also counts rows that a selection leaves out
        missing = [row for row, value in enumerate(dataset[column]) if value is None]
        if missing:
            raise ValueError(
                f"The column {column!r} of the {role} set has no value in {len(missing):,} of {len(dataset):,} rows, first "
                f"in row {missing[0]}. Fill them in, or leave them out with `dataset.filter`."
            )
