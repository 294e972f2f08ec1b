"""Single-answer grading by a language model (Zheng et al. 2023, arXiv:2306.05685, section 4), as FastChat does it.

`judge_prompts.jsonl` holds the four prompts of single-answer grading, byte for byte the lines of
github.com/lm-sys/FastChat, fastchat/llm_judge/data/judge_prompts.jsonl (Apache-2.0).

Every judgment is saved as it arrives, in FastChat's format, so its tools can read the file and a stopped run can resume.
"""

import importlib.util
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from evaluation.arguments import JudgeArguments

if TYPE_CHECKING:  # an extra, needed only with a judge
    from openai import OpenAI

NEED_REFERENCE = ("math", "reasoning", "coding")
"""The categories of MT-Bench that are graded against a reference answer."""

UNRATED = -1
"""The score of a judgment without a rating, left out of all means."""

RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
"""`[[7]]`, or else `[7]`."""

API_KEY = "OPENAI_API_KEY"

REMEDIES = {
    400: "Name a judge that takes chat completions with `temperature` and `max_tokens`.",
    401: f"Set the environment variable {API_KEY} to a key of this endpoint.",
    403: f"Set the environment variable {API_KEY} to a key that may use this model.",
    404: "Check `judge_model`, and `judge_url`, which usually ends in /v1.",
    429: "Lower `judge_parallel`, or wait until the endpoint's limit is raised or renewed.",
}


@dataclass(frozen=True)
class Request:
    """One turn to rate."""

    question_id: int
    turn: int
    prompt_name: str
    system_prompt: str
    user_prompt: str


def make_requests(
    questions: Sequence[dict[str, Any]],
    answers: dict[int, tuple[str, str]],
    references: dict[int, tuple[str, str]],
) -> list[Request]:
    """Both turns of every question, each with the prompt of its category.

    Args:
        questions: with `question_id`, `category` and two `turns`.
        answers, references: both turns by question_id; references only for the categories in `NEED_REFERENCE`.
    """
    prompts = judge_prompts()
    requests = []
    for turn in (1, 2):
        for question in questions:
            question_id = question["question_id"]
            (question_1, question_2), (answer_1, answer_2) = question["turns"], answers[question_id]
            # each prompt uses those that it names
            texts = {
                "question": question_1, "question_1": question_1, "question_2": question_2,
                "answer": answer_1, "answer_1": answer_1, "answer_2": answer_2,
            }  # fmt: skip
            needs_reference = question["category"] in NEED_REFERENCE
            if needs_reference:
                texts["ref_answer_1"], texts["ref_answer_2"] = references[question_id]
            name = f"single{'-math' if needs_reference else ''}-v1{'-multi-turn' if turn == 2 else ''}"
            prompt = prompts[name]
            user_prompt = prompt["prompt_template"].format(**texts)
            requests.append(Request(question_id, turn, name, prompt["system_prompt"], user_prompt))
    return requests


def judge_prompts() -> dict[str, dict[str, str]]:
    """FastChat's prompts of single-answer grading, by name."""
    lines = Path(__file__).with_name("judge_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return {prompt["name"]: prompt for prompt in map(json.loads, lines)}


def rating(judgment: str) -> int | float:
    """The first `[[number]]`, else the first `[number]`, else −1. As in FastChat, any number passes, even above 10.

    >>> rating("Rating: [[7]]"), rating("arr[0] is right. [[8.5]]"), rating("Rating: [6]"), rating("7 of 10")
    (7, 8.5, 6, -1)
    """
    for pattern in RATINGS:
        if found := pattern.search(judgment):
            return float(found[1]) if "." in found[1] else int(found[1])
    return UNRATED


def check_judge(args: JudgeArguments) -> None:
    """Check what can be checked before the first request.

    Raises:
        ValueError: the package openai is not installed, or OpenAI's endpoint has no key.
    """
    if importlib.util.find_spec("openai") is None:
        raise ValueError(
            f"`judge_model` is {args.judge_model}, but the package openai, which asks it, is not installed: "
            "`pip install openai`, or leave out `judge_model` to write the answers only."
        )
    if args.judge_url is None and not os.environ.get(API_KEY):
        raise ValueError(
            f"OpenAI's endpoint needs a key, but the environment variable {API_KEY} is not set. Set it, or name another "
            "endpoint with `judge_url`."
        )


def judge(requests: Sequence[Request], model_id: str, file: Path, args: JudgeArguments) -> list[dict[str, Any]]:
    """The judgment of each request, from `file` or else from the endpoint, in FastChat's format.

    Each is appended to `file` as it arrives. Entries in `file` for another prompt, model or judge are out of date and removed,
    since FastChat's tools average all entries.

    Sample:
        {"question_id": 81, "model": "lora-ga", "judge": ["gpt-4", "single-v1"], "user_prompt": "[Instruction]\\n…",
         "judgment": "… Rating: [[7]]", "score": 7, "turn": 1, "tstamp": 1700000000.0}

    Raises:
        ValueError: the endpoint refused a request, or failed `judge_retries` + 1 times in a row on one.
    """
    recorded = finished_lines(file)
    found = {_asked(record): record for record in recorded}
    found = {key: found[key] for request in requests if (key := _key(request, model_id, args)) in found}
    if len(found) < len(recorded):
        write_whole(file, "".join(json.dumps(record) + "\n" for record in found.values()))
    file.parent.mkdir(parents=True, exist_ok=True)
    missing = [request for request in requests if _key(request, model_id, args) not in found]
    client = connect(args)
    writing = threading.Lock()

    def judge_one(request: Request) -> dict[str, Any]:
        judgment = ask(client, request, file, args)
        record = {
            "question_id": request.question_id,
            "model": model_id,
            "judge": [args.judge_model, request.prompt_name],
            "user_prompt": request.user_prompt,
            "judgment": judgment,
            "score": rating(judgment),
            "turn": request.turn,
            "tstamp": time.time(),
        }
        with writing:
            append_lines(file, [record])
        return record

    pool = ThreadPoolExecutor(args.judge_parallel)
    try:
        futures = [pool.submit(judge_one, request) for request in missing]
        waiting = as_completed(futures)
        for future in tqdm(waiting, desc="Judging", unit="answer", initial=len(found), total=len(requests)):
            record = future.result()
            found[_asked(record)] = record
    finally:
        # After an error no new request starts, but pending ones are still saved: they are paid for.
        pool.shutdown(cancel_futures=True)
    return [found[_key(request, model_id, args)] for request in requests]


def _key(request: Request, model_id: str, args: JudgeArguments) -> tuple:
    return request.question_id, request.turn, model_id, args.judge_model, request.prompt_name, request.user_prompt


def _asked(record: dict[str, Any]) -> tuple:
    return record["question_id"], record["turn"], record["model"], *record["judge"], record["user_prompt"]


def connect(args: JudgeArguments) -> "OpenAI":
    """A client that repeats a request after status 408, 409, 429, 5xx, a timeout or a lost connection.

    It waits as long as the endpoint says, or else 0.5 s, doubling each time up to 8 s.
    """
    from openai import OpenAI

    # A self-hosted server seldom needs a key, but the client does.
    return OpenAI(
        base_url=args.judge_url,
        api_key=os.environ.get(API_KEY) or "none",
        max_retries=args.judge_retries,
        timeout=args.judge_timeout,
    )


def ask(client: "OpenAI", request: Request, file: Path, args: JudgeArguments) -> str:
    """The judge's reply; "" if it gave none, as with a content filter.

    Raises:
        ValueError: naming the endpoint, the model, what went wrong, and what to do.
    """
    from openai import APIConnectionError, APIStatusError
    from openai.types.chat import ChatCompletion

    assert args.judge_model is not None  # checked by the caller
    where = f"The judge {args.judge_model} at {client.base_url}"
    onwards = f"Finished judgments are in {file}; the same command resumes from there."
    try:
        completion = client.chat.completions.create(
            model=args.judge_model,
            messages=[
                {"role": "system", "content": request.system_prompt},
                {"role": "user", "content": request.user_prompt},
            ],
            temperature=0,
            max_tokens=2048,
        )
    except APIStatusError as error:
        remedy = REMEDIES.get(error.status_code, "Check the endpoint's own messages, or try again later.")
        raise ValueError(
            f"{where} answered with status {error.status_code}: {error.message[:500]} {remedy} {onwards}"
        ) from error
    except APIConnectionError as error:
        raise ValueError(
            f"{where} gave no reply in {args.judge_retries + 1} attempts of at most {args.judge_timeout:g} s: "
            f"{error.__cause__ or error}. Check `judge_url` and that the server runs, or raise `judge_timeout`. {onwards}"
        ) from error
    # the client accepts a web page, or an error under status 200
    if not isinstance(completion, ChatCompletion) or not completion.choices:
        raise ValueError(f"{where} answered with no chat completion: {str(completion)[:500]} {REMEDIES[404]} {onwards}")
    return completion.choices[0].message.content or ""


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`; if killed, the previous content stays."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append `records` to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def finished_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file that was appended to; [] if there is none.

    A run killed in the middle of a line leaves a partial one at the end, which is cut off here.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
