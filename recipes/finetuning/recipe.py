"""The definition of a recipe, and all the options of one run."""

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
    """What distinguishes one recipe from another; `causal` and `seq2seq` are the two kinds."""

    config: ClassVar[type[TrainingArguments]]
    """The trainer's configuration, with the `ga_*` options."""
    auto_class: ClassVar[type]
    """The transformers class that loads the base model."""

    name: str
    """The name of its file and of its configurations, `configs/{name}_*.yaml`."""
    data_arguments: type[DataArguments]
    benchmark: str
    """What a bare `--evaluate` runs: `mt_bench` or a task of `evaluation/`, with data arguments in braces."""

    def asked(self, options: Options) -> tuple[list[str], dict[str, Any]]:
        """(the tasks of `--evaluate`, the base model as lm-evaluation-harness's `model_args`)."""
        source = {"pretrained": options.model.model_name_or_path, "revision": options.model.model_revision}
        return options.evaluation.tasks(self.benchmark.format(**vars(options.data))), source

    def base_model(self, args: MethodConfig, path: str | None = None) -> PreTrainedModel:
        """The untouched base model, or the fully trained one saved at `path`, loaded with the options."""
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
        """The method's trainer, with the base model and its adapter."""
