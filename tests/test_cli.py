"""`lora-ga`: what each command takes, refuses and does."""

import configparser
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from launching import REPOSITORY, accelerate_command, ended_well, environment, free_port
from peft import PeftModel
from safetensors.torch import load_file
from tiny import sft_arguments, tiny_batches, tiny_model, word_problems, word_tokenizer
from transformers import AutoModelForCausalLM

import lora_ga_trainer
from lora_ga_trainer import LoRAGAArguments, LoRAGASFTConfig
from lora_ga_trainer.cli import sft as cli_sft
from lora_ga_trainer.cli.__main__ import COMMANDS, main
from lora_ga_trainer.cli.parsing import options_parser, resume_choice
from lora_ga_trainer.cli.sft import HELP, AdapterConfig, DataArguments

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """A run's folder."""
    folder = tmp_path_factory.mktemp("finished")
    word_problems().to_json(folder / "rows.jsonl")
    words = ["--model_name_or_path", model, "--dataset_path", str(folder / "rows.jsonl")]
    main(["sft", *words, *options(folder / "out", max_steps=2)])
    return folder / "out"


@pytest.fixture
def data(tmp_path) -> str:
    word_problems().to_json(tmp_path / "rows.jsonl")
    return str(tmp_path / "rows.jsonl")


def options(out, **overrides) -> list[str]:
    """The options of `sft_arguments` as words."""
    return [word for name, value in sft_arguments(out, **overrides).items() for word in (f"--{name}", str(value))]


def error_of(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert isinstance(ending.value.code, str) and ending.value.code.startswith("error: ")
    return ending.value.code


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(arguments, capsys):
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    for name, what in COMMANDS.items():
        assert sum(line.split() == [name, *what.split()] for line in lines) == 1
    assert len(lines) <= 24 and max(map(len, lines)) <= 100, "a screen"


def test_a_wrong_command_says_which_there_are():
    assert "lora-ga has no command 'train', only sft, export, inspect, compare" in error_of(["train"])


def test_help_and_wrong_usage_do_not_wait_for_torch():
    """In one new process; what a command needs is imported when it runs."""
    code = """
import sys
from lora_ga_trainer.cli.__main__ import main
for words in ([], ["no"], ["sft", "--help"], ["export", "-h"], ["export"], ["export", "--checkpoint_dir", "a", "--out", "b",
              "--no_such", "1"], ["eval"], ["eval", "-h"], ["eval", "no"], ["inspect", "-h"], ["inspect"], ["compare", "-h"],
              ["compare", "--bogus", "1"]):
    try:
        main(words)
    except SystemExit:
        pass
slow = {"torch", "transformers", "peft", "datasets", "matplotlib"} & set(sys.modules)
sys.exit(f"imported: {slow}" if slow else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_the_public_names_are_found_when_they_are_used():
    for name in lora_ga_trainer.__all__:
        assert getattr(lora_ga_trainer, name) is not None and name in dir(lora_ga_trainer)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lora_ga_trainer.no_such_name


def test_the_console_script_is_this_main():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].strip() == "lora-ga = lora_ga_trainer.cli.__main__:main"


def test_the_help_of_sft_fits_a_screen_and_names_real_options(capsys):
    main(["sft", "--help"])
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 40 and max(map(len, said.splitlines())) <= 100
    parser = options_parser((DataArguments, LoRAGASFTConfig, AdapterConfig), "lora-ga sft")
    known = {text for action in parser._actions for text in action.option_strings} | {"--config", "--help_all"}
    named = set(re.findall(r"--[a-z_0-9]+", HELP))
    assert named <= known
    assert {f"--{option.name}" for option in fields(LoRAGAArguments)} <= named
    defaults = {}
    for action in parser._actions:
        defaults.setdefault(action.dest, action.default)  # `--no_…` come after what they negate
    for name, value in re.findall(r"--((?:lora|ga)_[a-z_]+|use_rslora) ([a-zA-Z0-9-]+)(?:\s|$)", HELP):
        default = defaults[name]
        shown = default[0] if isinstance(default, list) else default
        assert str(shown).lower().removesuffix(".0") == value.lower(), f"the default of {name}"
    main(["sft", "--help_all"])
    assert "--adam_beta2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    said = capsys.readouterr().out
    assert "usage: lora-ga export [--config FILE.yaml]" in said and len(said.splitlines()) < 50


# --- sft --------------------------------------------------------------------------------------------------------------

KINDS = {
    "prompt and completion": lambda row: row,
    "text": lambda row: {"text": row["prompt"] + row["completion"]},
    "conversation": lambda row: {
        "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    },
    "ShareGPT": lambda row: {
        "conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]
    },
}


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("prompt and completion", ".jsonl"), ("text", ".csv"), ("conversation", ".parquet"), ("ShareGPT", ".jsonl")],
)
def test_every_kind_of_data_from_a_file(model, tmp_path, kind, suffix):
    rows = word_problems().map(KINDS[kind])
    if kind != "prompt and completion":
        rows = rows.remove_columns(["prompt", "completion"])
    path = tmp_path / f"rows{suffix}"
    {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](path)
    out = tmp_path / "out"
    main(["sft", "--model_name_or_path", model, "--dataset_path", str(path), *options(out, max_steps=1)])
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 16, "the paper's r 8, twice in the file"
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert sum("ga/alignment_mean" in entry for entry in log) == 1
    assert any("train_runtime" in entry for entry in log), "the whole log"


def test_a_mixture_of_experts_with_no_option_but_model_and_data(data, tmp_path):
    """And those that make it short, on a CPU. What is saved can be looked at, released alone and merged."""
    base, out = tmp_path / "mixture", tmp_path / "out"
    tiny_model("mixture").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    short = ["--output_dir", str(out), "--max_steps", "2", "--use_cpu", "true", "--bf16", "false"]
    main(["sft", "--model_name_or_path", str(base), "--dataset_path", data, *short])
    names = load_file(out / "adapter_model.safetensors").keys()
    assert any(name.endswith("mlp.experts.base_layer.lora_A.weight") for name in names), "gate_up_proj"
    assert any(name.endswith("mlp.experts.lora_A.weight") for name in names), "down_proj"
    main(["inspect", str(out)])
    main(["export", "--checkpoint_dir", str(out), "--out", str(tmp_path / "merged"), "--merge", "true"])
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    inputs = tiny_batches(seed=9)[0]["input_ids"]
    with torch.no_grad():  # W + s·BA in float32, rounded once more
        torch.testing.assert_close(merged(inputs).logits, trained(inputs).logits, rtol=0, atol=1e-5)


def test_options_come_from_the_file_and_over_it_from_the_command_line(model, data, tmp_path, capsys):
    config = {"lora_r": 2, "learning_rate": 1e-2, "ga_num_samples": 4, "eval_strategy": "steps", "eval_steps": 1}
    config |= {"model_name_or_path": model, "dataset_path": data, "eval_dataset_path": data, "use_rslora": False}
    (tmp_path / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    out = tmp_path / "out"
    words = [word for word in options(out, max_steps=1) if word not in ("--ga_num_samples", "8")]
    words = ["--learning-rate" if word == "--learning_rate" else word for word in words]
    main(["sft", "--config", str(tmp_path / "run.yaml"), *words, "--lora_r", "3"])
    saved = json.loads((out / "lora_ga.json").read_text())
    assert (saved["lora"]["r"], saved["lora"]["use_rslora"], saved["options"]["ga_num_samples"]) == (3, False, 4)
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in log if "loss" in entry] == [1e-3], "that of `options`"
    assert any("eval_loss" in entry for entry in log)
    assert f"The adapter is in {out}" in capsys.readouterr().out


def test_it_resumes_and_what_it_saves_loads_with_stock_peft(model, data, tmp_path):
    out = tmp_path / "out"
    words = ["sft", "--model_name_or_path", model, "--dataset_path", data]
    words += options(out, max_steps=4, save_strategy="steps", save_steps=2)
    main(words)
    whole = load_file(out / "adapter_model.safetensors")
    shutil.rmtree(out / "checkpoint-4")
    main([*words, "--resume_from_checkpoint", "true"])
    again = load_file(out / "adapter_model.safetensors")
    assert all((whole[name] == again[name]).all() for name in whole)
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert sum("ga/alignment_mean" in entry for entry in log) == 1, "estimation was skipped"
    PeftModel.from_pretrained(tiny_model(), out)
    assert "lora-ga" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (None, None),
        ("True", True),
        ("true", True),
        (True, True),
        ("false", None),
        ("out/checkpoint-3", "out/checkpoint-3"),
    ],
)
def test_what_resuming_may_be_called(given, taken):
    assert resume_choice(given) == taken


def test_it_runs_under_the_launcher(model, data, tmp_path):
    """Two processes under ZeRO-3; the way of every multi-GPU run."""
    words = ["--model_name_or_path", model, "--dataset_path", data, *options(tmp_path / "out", max_steps=1)]
    done = subprocess.run(
        [*accelerate_command("zero3", "--main_process_port", str(free_port())), "-m", "lora_ga_trainer.cli.sft", *words],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended_well(done), done.stderr[-2000:]
    saved = json.loads((tmp_path / "out/lora_ga.json").read_text())
    assert saved["launch"] == {"backend": "ZeRO-3", "world_size": 2}
    assert done.stdout.count("The adapter is in") == 1, "on the main process only"
    assert done.stderr.count("LoRA-GA initialized 14 layers") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "There is no option '--learning_rat'. Did you mean --learning_rate?"),
        (["--use_peft", "false"], "`use_peft` is False, but LoRA-GA initializes LoRA"),
        (["--dataset_name", "a/b"], "`dataset_name` is 'a/b', `dataset_path` is .*exactly one of them must be set"),
        (["--dataset_streaming", "true"], "`dataset_streaming` is for data sets on the hub"),
        (["--eval_strategy", "steps"], "`eval_strategy` is 'steps', but there is nothing to evaluate on"),
        (["--config", "nowhere.yaml"], "`config` is 'nowhere.yaml', but there is no such file"),
        (["--config"], "`config` is '', but there is no such file"),
        (["--config=run.yaml"], "write `--config FILE`"),
        (["--ga_num_samples", "0"], "`ga_num_samples` is 0, but must be a whole number of at least 1"),
        (["--dataset_path", "rows.txt"], "rows.txt must end in one of .jsonl, .json, .parquet, .csv"),
        (["--dataset_path", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["--lora_r", "40", "--ga_sketch_size", "50"], "must be at least 2·r = 80"),
    ],
)
def test_what_sft_refuses(model, data, tmp_path, words, message):
    said = error_of(["sft", "--model_name_or_path", model, "--dataset_path", data, *options(tmp_path / "out"), *words])
    assert re.search(message, said)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sft", "--dataset_name", "{data}"], "`dataset_name` is '.*', which is a file.*Pass the file as `dataset_path`"),
        (["sft", "--dataset_name", "{folder}/empty"], "cannot be loaded.*contain any data files.*as `dataset_path`"),
        (["sft", "--dataset_path", "{folder}/a::b.jsonl"], "has '::' in its name"),
        (["sft", "--dataset_path", "{data}", "--model_name_or_path", "{folder}/nowhere"], "nowhere"),
        (["sft", "--dataset_path", "{data}", "--model_name_or_path", "{folder}/damaged"], "header"),
        (["sft", "--dataset_path", "{data}", "--output_dir", "{data}/out"], "Not a directory"),
        (["export", "--checkpoint_dir", "{folder}", "--out", "{data}/out"], "has no adapter_config.json"),
        (["inspect", "{folder}/run", "--out", "{data}/out"], "Not a directory"),
        (["compare", "{folder}/run", "--out", "{data}/out"], "Not a directory"),
    ],
)  # fmt: skip
def test_files_and_folders_that_cannot_be_used_end_in_one_line(model, data, finished, tmp_path, command, message):
    """Whatever the system or a hub says: errors of the kind `OSError`, which no option's check has found before."""
    (tmp_path / "a::b.jsonl").write_text('{"text": "w1"}\n')
    (tmp_path / "empty").mkdir()
    shutil.copytree(model, tmp_path / "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"no weights")
    shutil.copytree(finished, tmp_path / "run")
    names = {"data": data, "folder": tmp_path, "model": model}
    words = [word.format(**names) for word in command]
    if command[0] == "sft":
        words = ["sft", "--model_name_or_path", model, *options(tmp_path / "out", max_steps=1), *words[1:]]
    said = error_of(words)
    assert re.search(message, said) and "\n" not in said


def test_a_yaml_key_that_does_not_exist(tmp_path, model):
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {model}\ndataset_path: rows.jsonl\nga_samples: 4\n")
    assert "There is no option '--ga_samples'. Did you mean --ga_num_samples?" in error_of(
        ["sft", "--config", str(tmp_path / "run.yaml")]
    )


@pytest.mark.parametrize(("text", "message"), [("- a\n- b\n", "holds no options"), ("a: [1\n", "is not valid YAML")])
def test_a_file_that_holds_no_options(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert message in error_of(["sft", "--config", str(tmp_path / "run.yaml")])


def test_neither_model_nor_data(data, tmp_path):
    assert "There is no data. Set exactly one of `dataset_name`" in error_of(["sft", "--model_name_or_path", "m"])
    assert "`model_name_or_path` is not set" in error_of(["sft", "--dataset_path", data, *options(tmp_path)])


def mixture(tmp_path, **more) -> list[str]:
    """Two files, of which a quarter and three quarters, without a column that only one has."""
    rows = word_problems()
    rows.to_json(tmp_path / "a.jsonl")
    rows.add_column("source", ["b"] * len(rows)).to_json(tmp_path / "b.jsonl")
    parts = [
        {"path": "json", "data_files": str(tmp_path / f"{name}.jsonl"), "split": "train", "fraction": fraction}
        | {"columns": ["prompt", "completion"]}
        for name, fraction in (("a", 0.25), ("b", 0.75))
    ]
    (tmp_path / "mixture.yaml").write_text(json.dumps({"datasets": parts} | more))
    return ["--config", str(tmp_path / "mixture.yaml")]


def test_a_mixture_of_data_sets_as_in_trl(model, tmp_path, monkeypatch):
    """What is held out is the same again, so that a resumed run trains on the same rows."""
    seen = []
    monkeypatch.setattr(cli_sft, "train", lambda *args: seen.append(cli_sft.load_data(*args[:2])))
    words = mixture(tmp_path, test_split_size=4, eval_strategy="steps", model_name_or_path=model)
    for _ in range(2):
        main(["sft", *words, *options(tmp_path / "out")])
    (train, held_out), again = seen
    total = round(len(word_problems()) / 0.75)  # all rows of the second file
    assert (len(train), len(held_out)) == (total - 4, 4) and train.column_names == ["prompt", "completion"]
    assert [part.to_list() for part in again] == [train.to_list(), held_out.to_list()]


def test_training_on_a_mixture(model, data, tmp_path):
    words = [*mixture(tmp_path, model_name_or_path=model), *options(tmp_path / "out", max_steps=1)]
    main(["sft", *words])
    assert Path(tmp_path, "out/adapter_model.safetensors").is_file()
    assert "`datasets` names 2, but exactly one of them must be set" in error_of(
        ["sft", *words, "--dataset_path", data]
    )
    said = error_of(["sft", *words, "--eval_strategy", "steps"])
    assert "The mixture `datasets` has no split 'test', only train. Set `test_split_size`" in said
    Path(tmp_path, "b.jsonl").unlink()
    assert "The mixture `datasets` (json, json) cannot be loaded (Unable to find" in error_of(["sft", *words])


def test_a_folder_as_a_data_set_and_its_splits(model, tmp_path):
    """`load_dataset` takes a folder for a name on the hub; no network is needed."""
    (tmp_path / "set").mkdir()
    word_problems().to_json(tmp_path / "set/train.jsonl")
    words = ["sft", "--model_name_or_path", model, "--dataset_name", str(tmp_path / "set")]
    main([*words, *options(tmp_path / "out", max_steps=1)])
    assert Path(tmp_path, "out/adapter_model.safetensors").is_file()
    said = error_of([*words, *options(tmp_path / "out"), "--eval_strategy", "steps"])
    assert "has no split 'test', only train" in said
