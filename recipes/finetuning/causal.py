"""Recipes for decoder-only models, with TRL."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from data.demo_model import demo_model_path
from data.selection import DataDefinition, load_rows, prepare
from datasets import Dataset
from methods.table import METHODS, adapter_config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import SFTTrainer, get_quantization_config

from finetuning.recipe import Options, Recipe
from lora_ga_trainer import LoRAGASFTConfig


@dataclass(frozen=True)
class CausalRecipe(Recipe):
    """A recipe whose data are prompts and completions."""

    config: ClassVar = LoRAGASFTConfig
    auto_class: ClassVar = AutoModelForCausalLM

    definition: Callable[[Any], DataDefinition]
    """The data, given the recipe's data arguments."""

    def demo_model(self) -> str:
        return demo_model_path()

    def datasets(self, options: Options, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
        args, training, definition = options.data, options.training, self.definition(options.data)
        rows = load_rows(definition, args, training.seed)
        return prepare(rows, definition, tokenizer, args, training.max_length, training.seed)

    def trainer(
        self, options: Options, tokenizer: PreTrainedTokenizerBase, train: Dataset, held_out: Dataset
    ) -> SFTTrainer:
        training, model = options.training, options.model
        training.model_init_kwargs = {
            "revision": model.model_revision,
            "attn_implementation": model.attn_implementation,
            "dtype": model.dtype,
        } | (training.model_init_kwargs or {})
        return METHODS[model.method].trainers.causal(
            model=model.model_name_or_path,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model),
            peft_config=adapter_config(model, "CAUSAL_LM"),
        )
