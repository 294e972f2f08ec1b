"""`--evaluate`: lm-evaluation-harness with the task files beside this one, and MT-Bench."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from torch import nn
from transformers import PreTrainedTokenizerBase

from evaluation import mt_bench
from evaluation.arguments import EvaluationArguments
from evaluation.model import HarnessModel
from lora_ga_trainer.distributed.backends import failing_together

HERE = Path(__file__).parent


def known_tasks(names: list[str], args: EvaluationArguments, source: dict[str, Any]) -> TaskManager:
    """The harness's index of tasks. Indexing its own tasks takes many seconds, and is skipped if none of them is asked for.

    Raises:
        ValueError: one of `names` is not in it.
    """
    ours = set(names) <= {path.stem for path in HERE.glob("*.yaml")}
    metadata = source | {"evaluation_file": args.evaluation_file, "max_prompt_tokens": args.max_prompt_tokens}
    manager = TaskManager(include_path=HERE, include_defaults=not ours, metadata=metadata)
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise ValueError(f"There is no task {name!r}. {hint}`lm_eval ls tasks` lists the harness's own.")
    return manager


def check(names: list[str], args: EvaluationArguments, source: dict[str, Any]) -> None:
    """Load all items, so that a broken task shows before hours of training. Every process calls it.

    Args:
        names: tasks of the harness, or `mt_bench`.
        source: what `lm_eval` takes as `--model_args`; some tasks read it.

    Raises:
        ValueError: there is no such task, it cannot be loaded, or it runs programs and this has not been allowed.
    """
    others = [name for name in names if name != "mt_bench"]
    if others != names:
        mt_bench.check(args)
    with failing_together():
        for task in known_tasks(others, args, source).load(others)["tasks"].values():
            if task.get_config("unsafe_code") and not args.confirm_run_unsafe_code:
                raise ValueError(
                    f"{task.task_name} runs programs that the model wrote, unreviewed, on this machine. Allow it with "
                    "`--confirm_run_unsafe_code`. (HumanEval's run in processes that may read files, but not write, connect "
                    "or start others.)"
                )


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    directory: Path,
    args: EvaluationArguments,
    source: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """The metrics of each task on the main process, and all answers in files in `directory`. Every process calls it.

    Args:
        model: whole, on every process.
        names, source: see `check`.
    """
    asked = HarnessModel(pretrained=model, tokenizer=tokenizer, batch_size=args.evaluation_batch_size)
    found, others = {}, [name for name in names if name != "mt_bench"]
    if others != names:
        found["mt_bench"] = mt_bench.evaluate(asked, directory / "mt_bench", args)
    if others:
        tracker = EvaluationTracker(output_path=str(directory / "results.json"))
        results = simple_evaluate(
            asked,
            tasks=others,
            task_manager=known_tasks(others, args, source),
            limit=args.evaluation_limit,
            gen_kwargs=args.max_new_tokens and {"max_gen_toks": args.max_new_tokens},
            evaluation_tracker=tracker,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        )
        if results is not None:  # on the main process
            samples = results.pop("samples")
            tracker.save_results_aggregated(results, samples)
            for name in samples:
                tracker.save_results_samples(name, samples[name])
            found |= results["results"]
            print(make_table(results))
    return found
