"""`recipes/metamath.py` as people run it: with `accelerate launch`, on a tiny model and local files."""

import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
import yaml
from answers import count_right, final_number
from gsm_symbolic import gsm_symbolic
from metamath import MathArguments, MathModelConfig, load_rows, prepare
from peft import PeftModel
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from trl import TrlParser

from lora_ga_trainer import LoRAGASFTConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model_path(tmp_path, tokenizer):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rows():
    return [
        {
            "query": f"w{i} w{i // 50} w{i % 7}",
            "response": f"w{i % 50} w3 #### {i}\nThe answer is: {i}",
            "type": "GSM_AnsAug",
        }
        for i in range(60)
    ]


def write(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def launch(*arguments, launcher=()):
    program = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(ROOT / "recipes/metamath.py")]
    return subprocess.run(
        [*program, *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=300, cwd=ROOT,
    )  # fmt: skip


SHORT = ("--max_steps", 3, "--eval_size", 8, "--answer_size", 4, "--answer_tokens", 8, "--max_length", 40)
TINY = (*SHORT, "--use_cpu", "true")


def test_a_run_on_two_processes(rows, model_path, tmp_path):
    """ZeRO-3: evaluation, generation and saving work on a model that is sharded, and only one process speaks."""
    data, out = write(rows, tmp_path / "mine.jsonl"), tmp_path / "out"

    def train(*more):
        run = launch(
            "--dataset_path", data, "--model_name_or_path", model_path, "--output_dir", out, "--lora_r", 4, *SHORT,
            "--save_strategy", "steps", "--save_steps", 2, "--ddp_backend", "gloo", *more,
            launcher=("--config_file", "accelerate_configs/cpu/zero3.yaml", "--main_process_port", "0"),
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        return run

    run = train()
    for text in ("Rows: ", "Held-out loss: ", "answered right after training: "):
        assert run.stdout.count(text) == 1
    assert json.loads((out / "lora_ga.json").read_text())["launch"] == {"backend": "ZeRO-3", "world_size": 2}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), out)

    resumed = train("--resume_from_checkpoint", "True")
    (loss,) = (line for line in run.stdout.splitlines() if line.startswith("Held-out loss"))
    assert loss in resumed.stdout


def test_a_run_on_a_local_file(rows, model_path, tmp_path):
    data, out = write(rows, tmp_path / "mine.jsonl"), tmp_path / "out"
    run = launch("--dataset_path", data, "--model_name_or_path", model_path, "--output_dir", out, "--lora_r", 4, *TINY)
    assert run.returncode == 0, run.stderr
    for line in (
        "Rows: 60 in the dataset",
        "8 held out, 52 to train on",
        "Held-out loss: ",
        "answered right after training:",
    ):
        assert line in run.stdout
    assert "LoRA-GA gradient, pass 3/3" in run.stderr or "LoRA-GA gradient, pass 1/1" in run.stderr
    assert "LoRA-GA initialized 14 layers" in run.stderr

    code = "\n".join(line.strip() for line in run.stdout.splitlines() if line.startswith("    "))
    assert code.count("\n") == 2, "three lines of code"
    names: dict = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    assert names["model"].peft_config["default"].r == 8  # --lora_r 4, rank 2r in the file
    inputs = torch.arange(5, 25)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(model_path).eval()
        assert not torch.equal(names["model"].eval()(inputs).logits, base(inputs).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ga_direction", "up"], "`ga_direction` is 'up', but must be one of"),
        (["--lora_r", "30"], "rank 30 is too large for"),
        (["--dataset_path", "nowhere.jsonl"], "`dataset_path` is nowhere.jsonl, but there is no such file"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_wrong_arguments_end_in_one_clear_error(arguments, message, rows, model_path, tmp_path):
    data, out = write(rows, tmp_path / "mine.jsonl"), tmp_path / "out"
    run = launch("--dataset_path", data, "--model_name_or_path", model_path, "--output_dir", out, *TINY, *arguments)
    assert run.returncode != 0 and message in run.stderr
    assert not list(out.rglob("*.safetensors"))


def test_parquet_and_csv(rows, tmp_path):
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(tmp_path / "mine.parquet")
    Dataset.from_list(rows).to_csv(tmp_path / "mine.csv")
    for name in ("mine.parquet", "mine.csv"):
        assert load_rows(MathArguments(dataset_path=str(tmp_path / name)), seed=0).to_list() == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_path": "a.jsonl", "dataset_name": "b"}, "Both `dataset_name` and `dataset_path`"),
        ({"dataset_path": "a.txt"}, "a.txt, but must end in one of .jsonl"),
    ],
)
def test_contradictory_data_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_rows(MathArguments(**arguments), seed=0)


def test_a_missing_column_is_named(rows, tmp_path):
    data = write([{"question": row["query"], "response": row["response"]} for row in rows], tmp_path / "mine.jsonl")
    with pytest.raises(ValueError, match="no column 'query', only question, response"):
        load_rows(MathArguments(dataset_path=str(data)), seed=0)
    data = write([{"query": "a", "response": "b"}], tmp_path / "typeless.jsonl")
    with pytest.raises(ValueError, match="no column 'type'"):
        load_rows(MathArguments(dataset_path=str(data), type_contains="GSM"), seed=0)


def test_selection_shuffle_and_split(rows, tmp_path, tokenizer, capsys):
    rows += [row | {"type": "MATH_AnsAug"} for row in rows[:10]] + rows[:5]
    rows += [{"query": "w1 " * 60, "response": "w2 #### 1", "type": "GSM_SV"}]
    args = MathArguments(
        dataset_path=str(write(rows, tmp_path / "mine.jsonl")), type_contains="GSM", train_size=40, eval_size=10
    )
    train, held_out = prepare(load_rows(args, 0), tokenizer, args, max_length=40, seed=3)
    assert len(train) == 40 and len(held_out) == 10
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert train[0]["prompt"].startswith("Q: w") and train[0]["prompt"].endswith("\nA:")
    assert "The answer is" not in train[0]["completion"] and final_number(train[0]["completion"]) is not None
    # 60 problems, 10 repeated as MATH, 5 repeated as they are, 1 too long
    counts = "76 in the dataset, 66 of type *GSM*, 61 with a question of its own, 60 of at most 40 tokens"
    assert counts in capsys.readouterr().out
    again, _ = prepare(load_rows(args, 0), tokenizer, args, max_length=40, seed=3)
    other, _ = prepare(load_rows(args, 0), tokenizer, args, max_length=40, seed=4)
    assert again["prompt"] == train["prompt"] != other["prompt"]
    assert train["prompt"] != sorted(train["prompt"]), "shuffled"


def test_no_row_left(rows, tmp_path, tokenizer):
    args = MathArguments(dataset_path=str(write(rows, tmp_path / "mine.jsonl")))
    with pytest.raises(ValueError, match="No row is left to train on. Raise `max_length`"):
        prepare(load_rows(args, 0), tokenizer, args, max_length=3, seed=0)


def test_embedded_problems_have_worked_answers():
    rows = gsm_symbolic(20, seed=1)
    assert rows.column_names == ["query", "response", "type"]
    assert all(final_number(row["response"]) is not None for row in rows)
    assert rows.to_list() == gsm_symbolic(20, seed=1).to_list() != gsm_symbolic(20, seed=2).to_list()


@pytest.mark.parametrize(
    "config", sorted((ROOT / "recipes/configs").glob("metamath_*.yaml")), ids=lambda path: path.stem
)
def test_committed_configs_parse(config, tmp_path):
    """Every line is a known option; bf16 needs hardware, and Trainer rewrites report_to, so they are left out here."""
    options = yaml.safe_load(config.read_text()) | {"bf16": False, "use_cpu": True, "output_dir": str(tmp_path)}
    options.pop("report_to", None)
    (tmp_path / "config.yaml").write_text(yaml.dump(options))
    parser = TrlParser((MathArguments, LoRAGASFTConfig, MathModelConfig))
    args, training_args, model_args = parser.parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    for name, value in options.items():
        holders = [holder for holder in (args, training_args, model_args) if hasattr(holder, name)]
        assert [getattr(holder, name) for holder in holders] == [value], name
    assert model_args.lora_r == 8 and model_args.lora_target_modules == "all-linear" and model_args.lora_dropout == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 1,000", "1000"),
        ("#### -3.5", "-3.5"),
        ("#### $18", "18"),
        ("#### -$18.20.", "-18.20"),
        ("####7 apples", "7"),
        ("#### 12,345,678.90\nmore", "12345678.90"),
        ("#### .5", ".5"),
        ("#### 1,5", "1"),
        ("#### 4\n#### 5", "4"),
        ("the answer is 4", None),
        ("#### none", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_count_right_counts_exact_matches(tokenizer):
    class Parrot(torch.nn.Module):
        """Answers with the last token of the prompt; checks that prompts are padded on the left."""

        device = torch.device("cpu")

        def generate(self, input_ids, attention_mask, **_):
            assert attention_mask[:, -1].all()
            return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

    class Words:
        """Reads w7 as "#### 7"."""

        padding_side = "right"

        def __call__(self, prompts, **kwargs):
            assert self.padding_side == "left"
            return tokenizer(prompts, **kwargs, padding_side="left")

        def batch_decode(self, ids, **_):
            return [f"#### {text.strip()[1:]}" for text in tokenizer.batch_decode(ids)]

    words, model = Words(), Parrot()
    prompts = ["w1 w2 w7", "w8", "w1 w9"]
    assert count_right(model, words, prompts, ["#### 7", "#### 8.0", "#### 1"], max_new_tokens=1, batch_size=2) == 2
    assert words.padding_side == "right" and model.training
