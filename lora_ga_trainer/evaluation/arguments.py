"""The options that every benchmark has."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class EvaluationArguments:
    """Options of a benchmark; each benchmark adds its own.

    Raises:
        ValueError: a number is out of its range.
    """

    NO_ANSWER_DEPENDS_ON: ClassVar[tuple[str, ...]] = ("evaluation_batch_size",)
    """Options (rounding aside) with another value of which an evaluation goes on, instead of beginning anew."""

    evaluation_file: str | None = field(
        default=None, metadata={"help": "Local file with the benchmark's items, instead of its own source."}
    )
    evaluation_limit: int | None = field(
        default=None, metadata={"help": "Only the first so many items, for a quick look. Default: all."}
    )
    evaluation_batch_size: int = field(default=8, metadata={"help": "Items at a time on each process."})
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens that an answer may take."})

    def __post_init__(self):
        for name in ("evaluation_limit", "evaluation_batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}, but must be at least 1.")
