"""Recipes for encoder-decoder models, with transformers' `Seq2SeqTrainer`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from data.demo_t5 import demo_t5_path
from datasets import Dataset
from methods.table import METHODS, adapter_config
from peft import get_peft_model
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Seq2SeqTrainer

from finetuning.recipe import Options, Recipe
from lora_ga_trainer import LoRAGASeq2SeqConfig


@dataclass(frozen=True)
class Seq2SeqRecipe(Recipe):
    """A recipe whose data have their own held-out split."""

    config: ClassVar = LoRAGASeq2SeqConfig
    auto_class: ClassVar = AutoModelForSeq2SeqLM

    splits: Callable[[Options], tuple[Dataset, Dataset]]
    """Prompts and completions: (to train on, held out)."""

    def demo_model(self) -> str:
        return demo_t5_path()

    def datasets(self, options: Options, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
        train, held_out = self.splits(options)
        limits = {"tokenizer": tokenizer, "max_length": options.evaluation.max_prompt_tokens}

        def tokenized(rows: Dataset) -> Dataset:
            return rows.map(to_ids, batched=True, fn_kwargs=limits, remove_columns=rows.column_names, desc="Tokenizing")

        return tokenized(train), tokenized(held_out)

    def trainer(
        self, options: Options, tokenizer: PreTrainedTokenizerBase, train: Dataset, held_out: Dataset
    ) -> Seq2SeqTrainer:
        args = options.model
        model = self.base_model(args)
        adapter = adapter_config(args, "SEQ_2_SEQ_LM")
        return METHODS[args.method].trainers.seq2seq(
            model=model if adapter is None else get_peft_model(model, adapter),
            args=options.training,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )


def to_ids(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
    """Prompts cut at `max_length`, and completions as labels, ended by the EOS token whether the tokenizer adds it or not."""
    prompts = tokenizer(batch["prompt"], truncation=True, max_length=max_length)
    words = tokenizer(batch["completion"], add_special_tokens=False)["input_ids"]
    return {
        "input_ids": prompts["input_ids"],
        "attention_mask": prompts["attention_mask"],
        "labels": [[*ids, tokenizer.eos_token_id] for ids in words],
    }
