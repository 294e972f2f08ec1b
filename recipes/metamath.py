"""Fine-tune on grade-school mathematics from a LoRA-GA initialization (paper section 4.2).

    accelerate launch recipes/metamath.py                                                  # small, offline, a CPU will do
    accelerate launch recipes/metamath.py --config recipes/configs/metamath_llama2_7b.yaml   # the paper's run
    accelerate launch recipes/metamath.py --model_name_or_path MODEL --dataset_path mine.jsonl

Every field of `MathArguments`, `LoRAGASFTConfig` and TRL's `ModelConfig` is an option, in the YAML or on the command line.
"""

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from answers import count_right, final_number
from datasets import Dataset, load_dataset
from demo_model import demo_model_path
from gsm_symbolic import gsm_symbolic
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from lora_ga_trainer import LoRAGASFTConfig, LoRAGASFTTrainer

DEMO_CONFIG = Path(__file__).parent / "configs/metamath_demo.yaml"
LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class MathArguments:
    """The data: `dataset_name` on the hub, or the file `dataset_path`, or neither for problems made on the spot."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset with MetaMathQA's columns."})
    dataset_path: str | None = field(
        default=None, metadata={"help": "Local .jsonl, .parquet or .csv file with the columns `query` and `response`."}
    )
    type_contains: str | None = field(
        default=None, metadata={"help": "Keep only rows whose column `type` contains this; the paper's is GSM."}
    )
    train_size: int = field(default=100_000, metadata={"help": "Rows to train on, after filters and shuffle."})
    eval_size: int = field(default=200, metadata={"help": "Rows held out for the loss before and after."})
    answer_size: int = field(default=50, metadata={"help": "Held-out problems to answer after training; 0 for none."})
    answer_tokens: int = field(default=256, metadata={"help": "Tokens that an answer may take."})


@dataclass
class MathModelConfig(ModelConfig):
    """TRL's `ModelConfig` with the paper's adapter as the default."""

    use_peft: bool = True
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    use_rslora: bool = True
    lora_target_modules: list[str] | None = field(default_factory=lambda: ["all-linear"])


def load_rows(args: MathArguments, seed: int) -> Dataset:
    """The rows before any filter, with the columns `query` and `response`.

    Raises:
        ValueError: contradictory options, or a file of another kind or with other columns.
        FileNotFoundError: there is no such file.
    """
    if args.dataset_name and args.dataset_path:
        raise ValueError("Both `dataset_name` and `dataset_path` are set. Keep one of them.")
    if args.dataset_name:
        rows = load_dataset(args.dataset_name, split="train")
    elif args.dataset_path:
        path = Path(args.dataset_path)
        if path.suffix not in LOCAL_FORMATS:
            raise ValueError(f"`dataset_path` is {path}, but must end in one of {', '.join(LOCAL_FORMATS)}.")
        if not path.is_file():
            raise FileNotFoundError(f"`dataset_path` is {path}, but there is no such file.")
        rows = load_dataset(LOCAL_FORMATS[path.suffix], data_files=str(path), split="train")
    else:
        rows = gsm_symbolic(10 * (args.train_size + args.eval_size), seed)
    for column in ["query", "response"] + (["type"] if args.type_contains else []):
        if column not in rows.column_names:
            raise ValueError(
                f"The dataset has no column {column!r}, only {', '.join(rows.column_names)}. Rename or add it."
            )
    return rows


def to_prompt_completion(row: dict[str, str]) -> dict[str, str]:
    """`Q: {query}\\nA:` and ` {worked answer ending in #### number}`; TRL masks the prompt.

    The space after `A:` belongs to the completion, so that the prompt ends where a token ends.
    """
    answer = row["response"].split("\nThe answer is:")[0]
    return {"prompt": f"Q: {row['query']}\nA:", "completion": f" {answer}"}


def prepare(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: MathArguments, max_length: int, seed: int
) -> tuple[Dataset, Dataset]:
    """Select, shuffle and split: (train, held-out), disjoint, and say how many rows went where.

    Raises:
        ValueError: no row is left to train on.
    """

    def fits(row: dict[str, str]) -> bool:
        # + 1 for the end-of-sequence token that TRL adds
        return len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 <= max_length

    kept = [("in the dataset", len(rows))]
    if args.type_contains:
        rows = rows.filter(lambda row: args.type_contains in row["type"])
        kept.append((f"of type *{args.type_contains}*", len(rows)))
    rows = rows.map(to_prompt_completion, remove_columns=rows.column_names)
    seen: set[str] = set()
    # `set.add` returns None: keeps the first row of each prompt
    rows = rows.select([i for i, prompt in enumerate(rows["prompt"]) if not (prompt in seen or seen.add(prompt))])
    kept.append(("with a question of its own", len(rows)))
    rows = rows.shuffle(seed=seed).filter(fits)
    kept.append((f"of at most {max_length} tokens", len(rows)))
    held_out = rows.select(range(min(args.eval_size, len(rows))))
    train = rows.select(range(len(held_out), min(len(held_out) + args.train_size, len(rows))))
    kept += [("held out", len(held_out)), ("to train on", len(train))]
    PartialState().print("Rows: " + ", ".join(f"{count:,} {what}" for what, count in kept) + ".")
    if not len(train):
        raise ValueError("No row is left to train on. Raise `max_length`, lower `eval_size`, or check `type_contains`.")
    return train, held_out


def main(args: MathArguments, training_args: LoRAGASFTConfig, model_args: MathModelConfig) -> None:
    if training_args.world_size == 1 and training_args.device.type == "cpu":
        torch.set_num_threads(os.cpu_count())  # `accelerate launch` gives a CPU process one thread
    if model_args.model_name_or_path is None:
        with training_args.main_process_first():  # it makes the copy that the others read
            model_args.model_name_or_path = demo_model_path()
    training_args.eval_on_start = True
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    train, held_out = prepare(
        load_rows(args, training_args.seed), tokenizer, args, training_args.max_length, training_args.seed
    )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    trainer = LoRAGASFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "True" else resume)  # the command line has only text
    before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()

    say = PartialState().print  # on the main process only; the rest is done on all, which share a sharded model
    say(f"\nHeld-out loss: {before:.4f} before, {after:.4f} after training.")
    asked = [row for row in held_out if final_number(row["completion"]) is not None][: args.answer_size]
    if asked:
        prompts, references = [row["prompt"] for row in asked], [row["completion"] for row in asked]
        right = count_right(trainer.model, tokenizer, prompts, references, args.answer_tokens)
        say(f"Held-out problems answered right after training: {right} of {len(asked)}.")
    say(
        f"The adapter is in {training_args.output_dir}. Load it with stock PEFT:\n\n"
        "    from peft import PeftModel\n"
        "    from transformers import AutoModelForCausalLM\n"
        f"    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({model_args.model_name_or_path!r}), "
        f"{training_args.output_dir!r})\n"
    )
    trainer.accelerator.wait_for_everyone()  # before any process leaves the group
    trainer.accelerator.end_training()


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lora_ga_trainer").setLevel(logging.INFO)
    parser = TrlParser((MathArguments, LoRAGASFTConfig, MathModelConfig))
    options = sys.argv[1:] if "--config" in sys.argv else ["--config", str(DEMO_CONFIG), *sys.argv[1:]]
    main(*parser.parse_args_and_config(options))
