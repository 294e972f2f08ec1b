"""Fine-tune an encoder-decoder on one of GLUE's tasks and predict its dev set by label words (paper section 4.1).

    accelerate launch recipes/glue.py                                                          # small, offline, on a CPU
    accelerate launch recipes/glue.py --config recipes/configs/glue_t5_base.yaml --task cola   # the paper's run
    accelerate launch recipes/glue.py --model_name_or_path MODEL --task mrpc --dataset_path train.csv --evaluation_file dev.csv

Every field of the dataclasses in `finetuning.run.parse` is an option, in the YAML or on the command line.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from data.glue_tasks import TASKS, Task, label_of, load_split, prompt_of
from data.movie_phrases import movie_phrases
from data.selection import DataArguments
from datasets import Dataset
from finetuning.recipe import Options
from finetuning.run import run
from finetuning.seq2seq import Seq2SeqRecipe

HUB = "nyu-mll/glue"


@dataclass
class GLUEDataArguments(DataArguments):
    """Where the training rows come from. The dev set is GLUE's own on the hub, or `evaluation_file`.

    Files need the task's own columns and `label`, a number as in GLUE or a label word.

    Raises:
        ValueError: there is no such task, another hub dataset, or what `DataArguments` raises.
    """

    task: str = field(default="sst2", metadata={"help": f"One of {', '.join(TASKS)}."})
    train_size: int = field(default=1_000_000, metadata={"help": "Rows to train on; MNLI, the largest, has 392,702."})
    eval_size: int = field(default=1000, metadata={"help": "Rows of the dev set for the loss before and after."})

    def __post_init__(self):
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"`task` is {self.task!r}, but must be one of {', '.join(map(repr, TASKS))}.")
        if self.dataset_name not in (None, HUB):
            raise ValueError(f"`dataset_name` is {self.dataset_name!r}, but must be {HUB!r}. Or use `dataset_path`.")


def to_prompt_completion(row: dict, task: Task) -> dict[str, str]:
    return {"prompt": prompt_of(task, row), "completion": " " + task.label_words[label_of(task, row["label"])]}


def rows_of(options: Options) -> tuple[Dataset, Dataset]:
    """(train, dev) with the task's columns and labels.

    Raises:
        ValueError: a file that `load_split` refuses, or a task without a stand-in.
    """
    args, evaluation = options.data, options.evaluation
    if args.dataset_name or args.dataset_path:
        dev = load_split(args.task, TASKS[args.task].dev_split, evaluation.evaluation_file)
        return load_split(args.task, "train", args.dataset_path), dev
    if args.task != "sst2":
        raise ValueError(
            f"`task` is {args.task!r}, but the offline stand-in is for sst2. Pass `--dataset_name {HUB}`, or "
            "`--dataset_path` and `--evaluation_file`."
        )
    rows = movie_phrases(args.train_size + args.eval_size, options.training.seed)
    dev = rows.select(range(args.eval_size))
    # a file, for `--evaluate` and for `lm_eval` later
    evaluation.evaluation_file = str(Path(options.training.output_dir, "stand_in_dev.jsonl"))
    if PartialState().is_main_process:
        Path(options.training.output_dir).mkdir(parents=True, exist_ok=True)
        dev.to_json(evaluation.evaluation_file)
    return rows.select(range(args.eval_size, len(rows))), dev


def splits(options: Options) -> tuple[Dataset, Dataset]:
    """Prompts and label words: the labelled training rows, shuffled, and the dev set."""
    args, task = options.data, TASKS[options.data.task]
    rows, dev = rows_of(options)
    labelled = rows.filter(lambda row: row["label"] not in (None, -1), desc="Keeping rows with a label")
    train = labelled.shuffle(seed=options.training.seed).select(range(min(args.train_size, len(labelled))))
    held_out = dev.select(range(min(args.eval_size, len(dev))))
    PartialState().print(
        f"Rows: {len(rows):,} in the training set\n  {len(labelled):,} with a label ({len(rows) - len(labelled):,} dropped)\n"
        f"  {len(train):,} to train on, {len(labelled) - len(train):,} left over\n"
        f"  {len(dev):,} in the dev set, {len(held_out):,} of them for the loss"
    )

    def as_text(rows: Dataset) -> Dataset:
        return rows.map(to_prompt_completion, fn_kwargs={"task": task}, remove_columns=rows.column_names)

    return as_text(train), as_text(held_out)


RECIPE = Seq2SeqRecipe("glue", GLUEDataArguments, "{task}_label_words", splits)

if __name__ == "__main__":
    run(RECIPE)
