"""From rows to prompts and completions: where rows come from, which are kept, and how many each step drops.

rows                    the hub's, a local file's, or the recipe's stand-in     load_rows
prompts, completions    select, shuffle, split; every step is counted and cached   prepare
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from lora_ga_trainer.cli.sources import check_columns, hub_items, local_items

Row = dict[str, Any]
HUB_REMEDY = (
    "Check the name and the network, download it and pass the file as `--dataset_path`, or leave both out for the demo's "
    "data."
)


@dataclass
class DataArguments:
    """The data: `dataset_name` on the hub, or the file `dataset_path`, or neither for the recipe's offline stand-in.

    Raises:
        ValueError: contradictory options, or a size below 1.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset with the recipe's columns."})
    dataset_path: str | None = field(
        default=None, metadata={"help": "Local .jsonl, .json, .parquet or .csv file with the recipe's columns."}
    )
    train_size: int = field(default=100_000, metadata={"help": "Rows to train on, after filters and shuffle."})
    eval_size: int = field(default=200, metadata={"help": "Rows held out for the loss before and after."})

    def __post_init__(self):
        if self.dataset_name and self.dataset_path:
            raise ValueError("Both `dataset_name` and `dataset_path` are set. Keep one of them.")
        for name in ("train_size", "eval_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")


@dataclass(frozen=True)
class DataDefinition:
    """What a recipe says about its data."""

    columns: tuple[str, ...]
    """Columns of text; a row without a value in one of them is dropped."""
    keep: dict[str, Callable[[Row], bool]]
    """Filters, by the name under which their counts are printed."""
    to_prompt_completion: Callable[[Row], dict[str, str]]
    """Turns a row into `prompt` and `completion`. TRL masks the prompt and ends the completion with the EOS token."""
    stand_in: Callable[[int, int], Dataset]
    """(size, seed) -> rows with the same columns, without a network: `size` of them, or all there are."""


def load_rows(definition: DataDefinition, args: DataArguments, seed: int) -> Dataset:
    """The rows before any selection.

    Raises:
        ValueError: the file is missing, damaged or of an unknown kind, the hub cannot be reached, or a column is missing
            or holds no text.
    """
    if args.dataset_path:
        source, rows = args.dataset_path, local_items(args.dataset_path, definition.columns)
    elif args.dataset_name:
        source, rows = args.dataset_name, hub_items(args.dataset_name, None, "train", definition.columns, HUB_REMEDY)
    else:
        source, rows = "The stand-in", definition.stand_in(args.train_size + args.eval_size, seed)
        rows = rows.select(first_of_each(rows[definition.columns[0]]))  # the templates repeat
    check_columns(rows, definition.columns, source)
    for column in definition.columns:
        feature = rows.features[column]
        if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "null"):
            kind = feature.dtype if isinstance(feature, Value) else "nested values"
            raise ValueError(
                f"The column {column!r} of {source} holds {kind}, but must hold text. Convert it to strings."
            )
    return rows


def prepare(
    rows: Dataset,
    definition: DataDefinition,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    max_length: int | None,
    seed: int,
) -> tuple[Dataset, Dataset]:
    """Select, shuffle and split: (train, held-out), disjoint; the main process prints how many rows each step kept.

    Every step is a `datasets` transform with the same fingerprint in every run, so a second run on rows from a
    file or the hub reads the cache. `max_length` None keeps rows of every length.

    Raises:
        ValueError: no row is left to train on.
    """
    counts = [f"Rows: {len(rows):,} in the dataset"]

    def tell(text: str, left: int) -> None:
        counts.append(text)
        if not left:
            raise ValueError(
                f"No row is left to train on. {'; '.join(counts)}. Undo the selection that drops most: raise `max_length`, "
                "lower `eval_size`, or use other data."
            )

    def keep(rows: Dataset, what: str, predicate: Callable[..., Any], **options: Any) -> Dataset:
        left = rows.filter(predicate, desc=f"Keeping rows {what}", **options)
        tell(f"{len(left):,} {what} ({len(rows) - len(left):,} dropped)", len(left))
        return left

    columns = definition.columns
    rows = keep(rows, f"with a value in {', '.join(columns)}", has_values, fn_kwargs={"columns": columns})
    for what, predicate in definition.keep.items():
        rows = keep(rows, what, predicate)
    rows = rows.map(definition.to_prompt_completion, remove_columns=rows.column_names, desc="Making prompts")
    rows = keep(rows, "with something to complete", has_values, fn_kwargs={"columns": ("completion",)})
    rows = rows.shuffle(seed=seed)
    if max_length is not None:
        limits = {"tokenizer": tokenizer, "max_length": max_length}
        rows = keep(rows, f"of at most {max_length} tokens", fit, batched=True, fn_kwargs=limits)

    held_out = rows.select(range(min(args.eval_size, len(rows))))
    asked = set(held_out["prompt"])  # a question may occur several times, with different answers
    others = [index for index, prompt in enumerate(rows["prompt"]) if prompt not in asked]
    tell(
        f"{len(others):,} with other prompts than the {len(held_out):,} held out "
        f"({len(rows) - len(held_out) - len(others):,} dropped)",
        len(others),
    )
    train = rows.select(others[: args.train_size])
    missing = f", fewer than the {args.train_size:,} asked for" if len(train) < args.train_size else ""
    counts.append(f"{len(train):,} to train on{missing}, {len(others) - len(train):,} left over")
    PartialState().print("\n  ".join(counts))
    return train, held_out


def has_values(row: Row, columns: tuple[str, ...]) -> bool:
    return all(row[column] is not None and row[column].strip() for column in columns)


def first_of_each(values: list[str]) -> list[int]:
    """The index of each value's first occurrence.

    >>> first_of_each(["a", "b", "a", "c"])
    [0, 1, 3]
    """
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        first.setdefault(value, index)
    return list(first.values())


def fit(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[bool]:
    """Whether prompt, completion and EOS, as TRL will join them, are at most `max_length` tokens."""
    texts = [
        prompt + completion + tokenizer.eos_token
        for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)
    ]
    return [len(ids) <= max_length for ids in tokenizer(texts)["input_ids"]]
