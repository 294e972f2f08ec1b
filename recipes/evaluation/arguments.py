"""The options of `--evaluate`. Importing them does not need lm-evaluation-harness."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class JudgeArguments:
    """The judge and its endpoint. The key comes from the environment variable OPENAI_API_KEY and is never written.

    Raises:
        ValueError: a number is out of its range, or there is a `judge_url` but no `judge_model`.
    """

    judge_model: str | None = field(
        default=None, metadata={"help": "Model that rates the answers, such as gpt-4. Default: no rating."}
    )
    judge_url: str | None = field(
        default=None,
        metadata={
            "help": "Any endpoint that speaks OpenAI's protocol, such as http://localhost:8000/v1. Default: OpenAI's."
        },
    )
    judge_parallel: int = field(default=4, metadata={"help": "Parallel requests to the judge."})
    judge_retries: int = field(
        default=10, metadata={"help": "How often a request is repeated after status 429 or 5xx, or without a reply."}
    )
    judge_timeout: float = field(default=600.0, metadata={"help": "Seconds to wait for one reply."})

    def __post_init__(self):
        for name, least in (("judge_parallel", 1), ("judge_retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least {least}.")
        if self.judge_timeout <= 0:
            raise ValueError(f"`judge_timeout` is {self.judge_timeout}, but must be more than 0 seconds.")
        if self.judge_url and not self.judge_model:
            raise ValueError(f"`judge_url` is {self.judge_url}, but no `judge_model` is named. Name the model to ask.")


@dataclass
class MTBenchArguments(JudgeArguments):
    """A file needs the columns `question_id`, `category` and `turns`, as FastChat's question.jsonl.

    Without `judge_model`, the answers are written but not rated; naming one later rates the existing answers.

    Raises:
        ValueError: an option is out of its range.
    """

    evaluation_file: str | None = field(
        default=None, metadata={"help": "Local file with the benchmark's items, instead of its own source."}
    )
    evaluation_limit: int | None = field(
        default=None, metadata={"help": "Only this many items, the first ones, for a quick look. Default: all."}
    )
    evaluation_batch_size: int = field(default=8, metadata={"help": "Items per batch on each process."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Maximum tokens per answer. Default: the task's; MT-Bench's is 1024."}
    )
    model_id: str = field(default="model", metadata={"help": "The model's name in MT-Bench's files."})
    reference_file: str | None = field(
        default=None,
        metadata={
            "help": "MT-Bench's reference answers for math, reasoning and coding, in FastChat's format. Default: gpt-4's, "
            "published."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("evaluation_limit", "evaluation_batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}, but must be at least 1.")
        if self.model_id in ("", ".", "..") or Path(self.model_id).name != self.model_id:
            raise ValueError(f"`model_id` is {self.model_id!r}, but names a file: leave out any '/'.")


@dataclass
class EvaluationArguments(MTBenchArguments):
    """What a recipe evaluates after training."""

    evaluate: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate the saved adapter or model: on the recipe's benchmark, or on the named tasks of "
            "lm-evaluation-harness, separated by commas.",
            "nargs": "?",
            "const": "true",
        },
    )
    max_prompt_tokens: int = field(
        default=128, metadata={"help": "Longer prompts of GLUE are cut; 128 is the paper's."}
    )
    confirm_run_unsafe_code: bool = field(
        default=False,
        metadata={"help": "Allow running the programs that the model writes, each in its own sandboxed process."},
    )

    def tasks(self, benchmark: str) -> list[str]:
        """The tasks to evaluate, where `benchmark` is the recipe's own; [] for none."""
        chosen = str(self.evaluate).lower()  # a YAML file may have a boolean
        if chosen in ("true", "false", "none"):
            return [benchmark] if chosen == "true" else []
        return str(self.evaluate).split(",")
