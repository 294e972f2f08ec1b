"""What a recipe has to say, and all the options that one run of it reads."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar, NamedTuple

from data import DataArguments
from datasets import Dataset
from methods import MethodConfig
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from lora_ga_trainer.evaluation.arguments import EvaluationArguments


@dataclass
class RunArguments:
    """Options of the run that are no one else's."""

    evaluate: bool = field(default=False, metadata={"help": "Run the recipe's benchmark on the trained model."})


class Options(NamedTuple):
    """Everything that `finetune.parse` reads, one dataclass each."""

    data: DataArguments
    training: TrainingArguments
    model: MethodConfig
    run: RunArguments
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
    benchmark: ModuleType
    """A module of `lora_ga_trainer.evaluation`."""
    benchmark_arguments: type[EvaluationArguments]

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
