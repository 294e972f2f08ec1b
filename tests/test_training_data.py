"""What the trainers refuse of a data set before TRL prepares it: the column, the first such row, the form that is wanted."""

import json

import pytest
from datasets import Dataset
from tiny import lora_config, sft_arguments, tiny_model, word_problems, word_tokenizer
from transformers import LlamaForSequenceClassification

from lora_ga_trainer import (
    LoRAGADPOConfig,
    LoRAGADPOTrainer,
    LoRAGARewardConfig,
    LoRAGARewardTrainer,
    LoRAGASFTConfig,
    LoRAGASFTTrainer,
)
from lora_ga_trainer.trainers.data import check_examples, check_turns

CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
QUESTION, ANSWER = CHAT[:1], CHAT[1:]
SHAREGPT = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3 w4"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
PAIR = {"chosen": CHAT, "rejected": CHAT}

# rows, and what must be said
MALFORMED = {
    "JSON text": ([{"messages": json.dumps(CHAT)}] * 3, "'messages' .* holds JSON text .* in row 0.*'role' and 'content'"),
    "text": ([{"messages": "w1 w2"}] * 3, "'messages' .* holds text in row 0"),
    "an empty one": ([{"messages": CHAT}] * 2 + [{"messages": []}], "'messages' .* holds an empty list in row 2"),
    "ShareGPT elsewhere": ([{"messages": SHAREGPT}] * 3, "'messages' .* a message without 'role' .*'from', 'value'"),
    "ChatML elsewhere": ([{"conversations": CHAT}] * 3, "'conversations' .* without 'from' .*with 'from' and 'value'"),
    "a list of texts": ([{"messages": ["w1", "w2"]}] * 3, "'messages' .* holds a list of text in row 0"),
    "a message by itself": ([{"messages": CHAT[0]}] * 3, "'messages' .* holds a dictionary in row 0"),
    "no role": ([{"messages": CHAT}, {"messages": [{"role": None, "content": "w"}]}], "without 'role' .*in row 1"),
    "no content": ([{"messages": CHAT}, {"messages": [{"role": "user", "content": None}]}], "without 'content' .*in row 1"),
    "list and text": ([{"prompt": QUESTION, "completion": "w3"}] * 3, "'completion' .* holds text in row 0.*all text, or all"),
    "text and list": ([{"prompt": "w1", "completion": ANSWER}] * 3, "'prompt' .* holds text in row 0"),
    "an empty prompt": ([{"prompt": [], "completion": ANSWER}] * 3, "'prompt' .* holds an empty list in row 0"),
    "a list for text": ([{"text": ["w1", "w2"]}] * 3, "'text' .* holds a list in row 0, but must hold text"),
    "a missing one": ([{"messages": CHAT}, {"messages": None}], "'messages' .* has no value in 1 of 2 rows, first in row 1"),
}  # fmt: skip
WELL_FORMED = {
    "text": [{"prompt": "", "completion": "w3"}, {"prompt": "[not JSON", "completion": ""}],
    "conversations": [{"messages": CHAT}, {"messages": CHAT[:1]}],
    "ShareGPT": [{"conversations": SHAREGPT, "id": 1}],
    "prompt and completion": [{"prompt": QUESTION, "completion": ANSWER}],
    "a call of a tool says nothing": [{"messages": [*QUESTION, CALL]}, {"messages": CHAT}],
    "parts with pictures": [
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}]}
    ],
    "text beside the messages that it was made of": [{"messages": json.dumps(CHAT), "text": "w1"}],
    "tokenized": [{"messages": "w1", "input_ids": [1, 2]}],
}


def check(rows, role="training", stream=False):
    dataset = Dataset.from_list(rows)
    check_examples(
        dataset.to_iterable_dataset() if stream else dataset, LoRAGASFTConfig("out", bf16=False, use_cpu=True), role
    )


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_conversations(name):
    rows, message = MALFORMED[name]
    for role in ("training", "evaluation"):
        with pytest.raises(ValueError, match=f"of the {role} set") as error:
            check(rows, role)
        error.match(message)


@pytest.mark.parametrize("name", [name for name, (rows, message) in MALFORMED.items() if "row 0" in message])
def test_the_first_example_of_a_stream(name):
    rows, message = MALFORMED[name]
    with pytest.raises(ValueError, match=message):
        check(rows, stream=True)


@pytest.mark.parametrize("name", WELL_FORMED)
def test_what_is_well_formed(name):
    check(WELL_FORMED[name])
    check(WELL_FORMED[name], stream=True)


def test_rows_that_a_selection_has_left_out_do_not_count():
    rows = Dataset.from_list([{"messages": []}, {"messages": CHAT}, {"messages": []}])
    args = LoRAGASFTConfig("out", bf16=False, use_cpu=True)
    check_examples(rows.select([1]), args, "training")
    with pytest.raises(ValueError, match="an empty list in row 1"):
        check_examples(rows.select([1, 2]), args, "training")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, PAIR | {"rejected": []}], "'rejected' .* an empty list in row 1"),
        ([{"prompt": QUESTION, "chosen": "w3", "rejected": "w4"}], "'chosen' .* holds text in row 0"),
        ([{"prompt": "w1", "chosen": ANSWER, "rejected": ANSWER}], "'prompt' .* holds text in row 0"),
        ([{"chosen": SHAREGPT, "rejected": SHAREGPT}], "'chosen' .* without 'role'"),
    ],
)
def test_preferences(rows, message):
    for stream in (False, True):
        dataset = Dataset.from_list(rows if "row 1" not in message else rows[::-1] if stream else rows)
        with pytest.raises(ValueError, match=message.replace("row 1", "row 0") if stream else message):
            check_turns(dataset.to_iterable_dataset() if stream else dataset, "training")
    check_turns(Dataset.from_list([PAIR, {"chosen": CHAT, "rejected": CHAT}]), "training")
    check_turns(Dataset.from_list([{"prompt": "w1", "chosen": "w2", "rejected": ""}]), "training")


def reward_model():
    return LlamaForSequenceClassification(tiny_model().config)


@pytest.mark.parametrize("role", ["training", "evaluation", "named evaluation"])
@pytest.mark.parametrize(
    ("trainer", "config", "model", "good", "bad"),
    [
        (LoRAGASFTTrainer, LoRAGASFTConfig, tiny_model, {"messages": CHAT}, {"messages": []}),
        (LoRAGADPOTrainer, LoRAGADPOConfig, tiny_model, {"prompt": QUESTION, "chosen": ANSWER, "rejected": ANSWER},
         {"prompt": QUESTION, "chosen": ANSWER, "rejected": []}),
        (LoRAGARewardTrainer, LoRAGARewardConfig, reward_model, PAIR, PAIR | {"rejected": []}),
    ],
    ids=["SFT", "DPO", "reward"],
)  # fmt: skip
def test_every_trainer_checks_both_of_its_sets(trainer, config, model, good, bad, role, tmp_path):
    fine, malformed = Dataset.from_list([good] * 4), Dataset.from_list([good] * 4 + [bad])
    held_out = {"a": fine, "b": malformed} if role == "named evaluation" else malformed
    sets = {"train_dataset": malformed} if role == "training" else {"train_dataset": fine, "eval_dataset": held_out}
    with pytest.raises(ValueError, match=rf"of the {role.split()[-1]} set holds an empty list in row 4"):
        trainer(
            model(),
            args=config(**sft_arguments(tmp_path)),
            processing_class=word_tokenizer(),
            peft_config=lora_config(),
            **sets,
        )


def test_a_formatting_function_takes_rows_of_any_form(tmp_path):
    rows = (
        word_problems().rename_columns({"prompt": "asked", "completion": "said"}).map(lambda row: {"messages": "none"})
    )
    trainer = LoRAGASFTTrainer(
        tiny_model(), LoRAGASFTConfig(**sft_arguments(tmp_path)), train_dataset=rows, processing_class=word_tokenizer(),
        peft_config=lora_config(), formatting_func=lambda row: row["asked"] + row["said"],
    )  # fmt: skip
    assert len(trainer.train_dataset) == len(rows)
