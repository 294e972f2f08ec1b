"""Problems of GSM-symbolic as a file that `recipes/metamath.py --evaluate --evaluation_file` answers.

    python benchmarks/symbolic_items.py symbolic.jsonl
    python benchmarks/symbolic_items.py symbolic.jsonl --size 200 --max_length 128

Of the same templates as the training rows and of another seed, at most `max_length` tokens with their answers, each question
once. A problem that was trained on may be among them where a template has few variants.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from data.demo_model import demo_model_path
from data.gsm_symbolic import gsm_symbolic
from data.selection import first_of_each
from transformers import AutoTokenizer

SEED = 1_000_003
"""Far from the seeds of training runs."""


def symbolic_items(size: int, max_length: int) -> Dataset:
    """`question` and `answer`, as GSM8K has them."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    rows = gsm_symbolic(20 * size, SEED)
    rows = rows.select(first_of_each(rows["query"]))
    rows = rows.filter(lambda row: len(tokenizer(row["query"] + row["response"])["input_ids"]) <= max_length)
    rows = rows.rename_columns({"query": "question", "response": "answer"}).select_columns(["question", "answer"])
    return rows.select(range(min(size, len(rows))))


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=128)
    args = parser.parse_args()
    symbolic_items(args.size, args.max_length).to_json(args.path)


if __name__ == "__main__":
    main()
