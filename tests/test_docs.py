"""README.md and docs/: every code block runs, every command parses, every link and every file that is named is there.

What a block names on the hub is not reachable from a test, so a stand-in is: in a hub cache of its own, under exactly the name
in `HUB`, tiny real models with a tokenizer, which transformers, TRL and PEFT load from there by themselves. `load_dataset` is
replaced, for exactly the data sets in `DATASETS`, and so is transformers' question whether a GPU can do bf16, which TRL's
default asks for: the autocast then really runs, on whatever device there is. All else that a block does is real: it trains,
saves, loads and compares.
"""

import configparser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from evaluation import mt_bench
from finetuning.run import parse
from lm_eval._cli import HarnessCLI
from lm_eval.tasks import TaskManager
from recipe_cases import RECIPES
from tiny import letter_tokenizer, tiny_model
from transformers import training_args

import lora_ga_trainer
from lora_ga_trainer import LoRAGASFTConfig
from lora_ga_trainer.cli import compare, export, inspect, sft
from lora_ga_trainer.cli.parsing import parse_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("**/*.md")) if not page.is_symlink())]
HUB = {"Qwen/Qwen2.5-0.5B": "llama"}  # transformers would make a tokenizer of its own for a Qwen
CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {{ eos_token }} {% endfor %}"


def conversations(**asked) -> Dataset:
    assert asked == {"split": "train"}
    turns = [[("user", f"w{n} w3 w{n + 1}"), ("assistant", f"w{n + 2} w{n}")] for n in range(24)]
    return Dataset.from_list(
        [{"messages": [{"role": role, "content": text} for role, text in turn], "source": "made up"} for turn in turns]
    )


DATASETS = {"trl-lib/Capybara": conversations}


class Block(NamedTuple):
    page: Path
    line: int
    """Of the first line of code, from 1."""
    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    found, fence = [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        mark = re.match(r"\s*```(\w*)", line)
        if mark and fence is None:
            fence = Block(page, number + 1, mark[1], "")
        elif mark:
            found.append(fence)
            fence = None
        elif fence is not None:
            fence = fence._replace(code=fence.code + line + "\n")
    assert fence is None, f"{page} ends inside a block"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- Python -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory) -> Path:
    """What a download of `HUB` would have left behind."""
    cache = tmp_path_factory.mktemp("hub")
    for name, family in HUB.items():
        repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(commit)
        model = tiny_model(family)
        model.generation_config.eos_token_id = 2
        model.save_pretrained(repository / "snapshots" / commit)
        tokenizer = letter_tokenizer()
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(repository / "snapshots" / commit)
    return cache


@pytest.fixture
def stand_ins(hub_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable may have been read already
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **asked: DATASETS[name](**asked))
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))], ids=name_of
)
def test_python_blocks(page, stand_ins):
    """The blocks of a page, one after another in one namespace and one empty folder."""
    namespace: dict = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            # moved down to where it stands in the page, so that a traceback points there
            code = compile("\n" * (block.line - 1) + block.code, page, "exec")
            exec(code, namespace)


def test_custom_loop(tmp_path, monkeypatch, capsys):
    """It asserts by itself that stock PEFT gives the trained logits, and that the base is untouched."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import custom_loop

    custom_loop.main(["--out", str(tmp_path / "adapter"), "--learning_rate", "1e-2"])
    said = capsys.readouterr().out
    first, last = (float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+)", said))
    assert last < first < 5.6  # ln 256 = 5.5: what it is before training
    assert "Reloaded with stock PEFT: the same logits." in said
    assert lora_ga_trainer.checkpoint.adapter_files.FROZEN_FILE in os.listdir(tmp_path / "adapter")


# --- commands -----------------------------------------------------------------------------------------------------------

RECIPE_FILES = {f"recipes/{name}.py": recipe for name, recipe in RECIPES.items()}
ON_A_CPU = ["--bf16", "false", "--use_cpu", "true"]
"""The paper's configurations ask for bf16, which transformers refuses where there is no GPU."""


def commands_in(block: Block) -> list[list[str]]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words: list[str], folder: Path) -> None:
    """The command is one that this project has, and its own parser takes the options; nothing is run."""
    match words:
        case ["make", *targets]:
            assert targets and all(
                re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets
            )
        case ["pip", "install", "--no-deps", "--constraint", "constraints.txt", *packages]:
            pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
            assert packages and pinned.issuperset(packages)
        case ["pip", "install", what]:
            setup = configparser.ConfigParser()
            setup.read(ROOT / "setup.cfg")
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)[1]
            assert set(extras.split(",") if extras else ()) <= set(setup["options.extras_require"])
        case ["accelerate", "launch", *rest]:
            launch = launch_command_parser().parse_args(rest)
            assert launch.config_file is None or (ROOT / launch.config_file).is_file(), launch.config_file
            check_program(
                (["-m"] if launch.module else []) + [launch.training_script, *launch.training_script_args], folder
            )
        case ["lm_eval", *options]:
            check_lm_eval(options)
        case ["lora-ga", command, *options]:
            check_subcommand(command, options)
        case ["python", *program]:
            check_program(program, folder)
        case _:
            raise AssertionError(f"{words[0]} is no program of this project: mark the block as ```text")


def check_program(words: list[str], folder: Path) -> None:
    match words:
        case ["-m", "lora_ga_trainer.cli.sft", *options]:
            check_subcommand("sft", options)
        case [path, *options] if path in RECIPE_FILES:
            if "--config" in options:
                place = options.index("--config") + 1
                options[place] = str(ROOT / options[place])
            parse(RECIPE_FILES[path], [*options, *ON_A_CPU, "--output_dir", str(folder)])
        case ["-m", "lm_eval", *options]:
            check_lm_eval(options)
        case ["recipes/evaluation/mt_bench.py", *options]:
            parse_options((mt_bench.ModelArguments, mt_bench.MTBenchArguments), options, "mt_bench.py")
        case [path, *options] if (ROOT / path).is_file():
            source = (ROOT / path).read_text()  # its parser is made inside of its `main`
            for option in options:
                assert not option.startswith("--") or f'"{option}"' in source, f"{path} has no {option}"
            for option in options:
                assert not option.endswith((".yaml", ".json")) or (ROOT / option).is_file(), option
        case _:
            raise AssertionError(f"there is no {' '.join(words[:2])}")


def check_lm_eval(options: list[str]) -> None:
    args = HarnessCLI()._parser.parse_args(["run", *options])
    if args.include_path is not None:  # the harness's own tasks would take seconds
        manager = TaskManager(include_path=ROOT / args.include_path, include_defaults=False)
        assert manager.match_tasks(args.tasks), args.tasks


def check_subcommand(command: str, options: list[str]) -> None:
    match command:
        case "sft":
            parse_options((sft.DataArguments, LoRAGASFTConfig, sft.AdapterConfig), [*options, *ON_A_CPU], "lora-ga sft")
        case "export":
            parse_options((export.ExportArguments,), options, "lora-ga export")
        case "inspect" | "compare":
            # Their options are few, and end in argparse's own exit, 2, where they are wrong; the runs of a page are not here.
            with pytest.raises(SystemExit, match=r"^error: There is no folder"):
                {"inspect": inspect, "compare": compare}[command].main(options)
        case _:
            raise AssertionError(f"lora-ga has no {command}")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "bash" for b in blocks_of(page))], ids=name_of
)
def test_commands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page):
        if block.language == "bash":
            for words in commands_in(block):
                try:
                    check_command(words, tmp_path)
                except (AssertionError, ValueError, KeyError, SystemExit) as error:
                    pytest.fail(f"{name_of(page)}:{block.line}: {shlex.join(words)}\n{error!r}")


@pytest.mark.parametrize(
    "command",
    [
        "make everything",
        "pip install .[everything]",
        "pip install --no-deps --constraint constraints.txt no-such-package",
        "python recipes/metamath.py --no_such_option 1",
        "python recipes/metamath.py --config recipes/configs/none.yaml",
        "accelerate launch --config_file accelerate_configs/none.yaml recipes/glue.py",
        "accelerate launch --no_such_option recipes/glue.py --x 1",
        "lm_eval --model hf --model_args pretrained=M --tasks gsm8k --no_such_option 1",
        "lm_eval --model hf --model_args pretrained=M --tasks gsm8k_none --include_path recipes/evaluation",
        "python recipes/evaluation/mt_bench.py --no_such_option 1",
        "lora-ga export --out adapter",
        "lora-ga train --model_name_or_path M",
        "lora-ga sft --model_name_or_path M",
        "lora-ga sft --model_name_or_path M --dataset_path d.jsonl --no_such_option 1",
        "lora-ga inspect --out page",
        "lora-ga compare out --out c --no_such_option",
        "python benchmarks/backends.py --no_such_option",
        "python benchmarks/none.py",
        "llama-cli -m model.gguf",
    ],
)
def test_a_wrong_command_is_noticed(command, tmp_path):
    with pytest.raises((AssertionError, ValueError, KeyError, SystemExit)):
        check_command(shlex.split(command), tmp_path)


def test_every_block_says_what_it_is():
    """`text` is for what cannot be executed here; nothing is skipped for want of a language."""
    others = [f"{name_of(b.page)}:{b.line}" for b in BLOCKS if b.language not in ("python", "bash", "yaml", "text")]
    assert not others
    assert {b.language for b in BLOCKS} == {"python", "bash", "yaml", "text"}


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: f"{name_of(b.page)}:{b.line}"
)
def test_yaml_is_what_lora_ga_sft_takes(block, tmp_path):
    (tmp_path / "run.yaml").write_text(block.code)
    words = ["--config", str(tmp_path / "run.yaml"), "--use_cpu", "true", "--bf16", "false"]
    data, _, model = parse_options((sft.DataArguments, LoRAGASFTConfig, sft.AdapterConfig), words, "lora-ga sft")
    assert len(data.datasets) == 2 and model.model_name_or_path


# --- links and files ----------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    """On GitHub, where README.md is read; `mkdocs build --strict` looks after the site."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if not target.startswith(("https://", "api.md#")):  # those anchors come from the docstrings
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors_of(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named(page):
    """Whatever looks like a path of this repository is one."""
    tops = "|".join(("lora_ga_trainer", "recipes", "accelerate_configs", "benchmarks", "tests", "docs", "examples"))
    for path in re.findall(rf"`((?:{tops})/[\w./*-]*)[^`]*`", page.read_text()):
        assert list(ROOT.glob(path.removesuffix("/"))), path


def test_the_file_tree_is_complete():
    """In README.md: every file of the package and the recipes, so that a newcomer finds the one that matters."""
    (tree,) = (block.code for block in blocks_of(ROOT / "README.md") if block.language == "text")
    files = [
        *(ROOT / "lora_ga_trainer").rglob("*.py"),
        *(ROOT / "recipes").rglob("*.py"),
        *(ROOT / "examples").glob("*.py"),
    ]
    named = set(re.findall(r"[\w.]+\.py|[a-z_]+/", tree))
    missing = [name_of(path) for path in files if path.name not in named and not path.name.startswith("_")]
    inner = re.compile(r"lora_ga_trainer/inspection/\w+\.py")
    assert not [path for path in missing if not inner.fullmatch(path)]
    tops = [path for path in ROOT.iterdir() if not path.name.startswith(".")]
    there = {path.name for top in tops for path in (top, *top.rglob("*"))}
    gone = [name for name in named if name.removesuffix("/") not in there and "<" not in name]
    assert not gone


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs/api.md").read_text()
    missing = [
        name
        for name in lora_ga_trainer.__all__
        if not re.search(rf"^::: lora_ga_trainer\.[\w.]*\b{name}$", reference, re.M)
    ]
    assert missing == ["__version__"]


def test_the_site_builds(tmp_path):
    """Without a warning: a broken link, an anchor that is gone, a page that is in no menu, a docstring that cannot be read."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 10
    for page in pages:  # the reader's browser fetches nothing from elsewhere either
        fetched = re.findall(
            r'<(?:script|img|iframe)[^>]*\ssrc="(https?://[^"]*)|<link[^>]*rel="?(?:stylesheet|preconnect)"?[^>]*href="(https?:[^"]*)',
            page.read_text(),
        )
        assert not fetched, (page, fetched)
