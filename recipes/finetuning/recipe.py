"""What a recipe has to say, and all the options that one run of it reads."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from data.selection import DataArguments
from datasets import Dataset
from evaluation.arguments import EvaluationArguments
from methods.table import MethodConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import get_quantization_config


class Options(NamedTuple):
    """Everything that `run.parse` reads, one dataclass each."""

    data: DataArguments
    training: TrainingArguments
    model: MethodConfig
    evaluation: EvaluationArguments


@dataclass(frozen=True)
class Recipe(ABC):
    """What makes one recipe different from the others; `causal` and `seq2seq` have the two kinds."""

    config: ClassVar[type[TrainingArguments]]
    """With the `ga_*` options."""
    auto_class: ClassVar[type]
    """Of transformers, that loads the base model."""

    name: str
    """Of its file, and of its configurations `configs/{name}_*.yaml`."""
    data_arguments: type[DataArguments]
    benchmark: str
    """What `--evaluate` by itself asks: `mt_bench` or a task of `evaluation/`, with data arguments in braces."""

    def asked(self, options: Options) -> tuple[list[str], dict[str, Any]]:
        """(the tasks of `--evaluate`, what lm-evaluation-harness calls the base model's `model_args`)."""
        source = {"pretrained": options.model.model_name_or_path, "revision": options.model.model_revision}
        return options.evaluation.tasks(self.benchmark.format(**vars(options.data))), source

    def base_model(self, args: MethodConfig, path: str | None = None) -> PreTrainedModel:
        """The untouched base model, or what was saved of all its weights at `path`, as the options have it loaded."""
        return self.auto_class.from_pretrained(
            path or args.model_name_or_path,
            revision=args.model_revision,
            attn_implementation=args.attn_implementation,
            dtype=args.dtype,
            quantization_config=get_quantization_config(args),
        )

    @abstractmethod
    def demo_model(self) -> str:
        """A folder with a base model that needs no hub."""

    @abstractmethod
    def datasets(self, options: Options, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
        """(to train on, held out)."""

    @abstractmethod
    def trainer(
        self, options: Options, tokenizer: PreTrainedTokenizerBase, train: Dataset, held_out: Dataset
    ) -> Trainer:
        """That of the method, with the base model and its adapter."""
