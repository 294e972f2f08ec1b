"""Descriptions and matching Python programs: the offline stand-in for Code-Feedback."""

import gzip
import importlib.util
import json
from pathlib import Path

from datasets import Dataset


def codeio() -> Dataset:
    """3,002 rows with Code-Feedback's columns, from the data file of reasoning-gym's CodeI/O task.

    The programs are read as text. (The package's own dataset class would execute them.)

    Sample:
        query: "Given two matrices, what is the result of subtracting the second matrix from the first matrix?\\n\\nInput: …"
        answer: "This program solves the problem:\\n\\n```python\\n# import necessary packages\\nimport random\\n…\\n```"

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
    """
    package = importlib.util.find_spec("reasoning_gym")
    if package is None:
        raise ModuleNotFoundError(
            "The stand-in for Code-Feedback comes from the package reasoning-gym: `pip install reasoning-gym==0.1.25`, or "
            "pass your own data with `--dataset_path`."
        )
    with gzip.open(Path(package.submodule_search_locations[0], "data/codeio.jsonl.gz"), "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    return Dataset.from_list(
        [
            {
                "query": f"{problem['task_description']}\n\n{problem['input_output_spec']}",
                "answer": f"This program solves the problem:\n\n```python\n{problem['code_sample']}\n```",
            }
            for problem in problems
        ]
    )
