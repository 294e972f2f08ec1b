"""python -m lora_ga_trainer.evaluation gsm8k|humaneval|mt_bench|glue --adapter out --base MODEL [options of the benchmark]

Under `accelerate launch -m lora_ga_trainer.evaluation ...` the items are shared by all processes.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import PartialState
from trl import TrlParser

from . import glue, gsm8k, humaneval, mt_bench
from .arguments import EvaluationArguments
from .loading import load, model_settings
from .results import evaluation_settings, open_evaluation

BENCHMARKS: dict[str, tuple[ModuleType, type[EvaluationArguments]]] = {
    "gsm8k": (gsm8k, gsm8k.GSM8KArguments),
    "humaneval": (humaneval, humaneval.HumanEvalArguments),
    "mt_bench": (mt_bench, mt_bench.MTBenchArguments),
    "glue": (glue, glue.GLUEArguments),
}


@dataclass
class ModelArguments:
    base: str = field(
        metadata={"help": "The base model: a folder or a hub name. With no `adapter`, it is evaluated itself."}
    )
    revision: str = field(default="main", metadata={"help": "Of the base model on the hub: a branch, tag or commit."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or hub name of a PEFT adapter for it."})
    dtype: str = field(default="auto", metadata={"help": "Of the base's weights: auto, float32, bfloat16 or float16."})
    output: str = field(
        default="evaluation", metadata={"help": "Each benchmark of each model gets a folder of its own in here."}
    )


def main() -> None:
    name, *options = sys.argv[1:] or [""]
    if name not in BENCHMARKS:
        sys.exit(f"error: name the benchmark first, one of {', '.join(BENCHMARKS)}. Its options: NAME --help")
    benchmark, arguments = BENCHMARKS[name]
    kinds: Any = (ModelArguments, arguments)  # TRL says that it wants instances, and means classes
    parser = TrlParser(kinds, prog=f"python -m lora_ga_trainer.evaluation {name}")
    try:
        model_args, args = parser.parse_args_and_config(options)  # an unknown option is a `ValueError` here
        # told so, because accelerate would take the processes of a launch on CPUs each for the only one
        state = PartialState(cpu=not torch.accelerator.is_available())
        benchmark.check(args)  # before the model, which may take minutes to load
        model, tokenizer = load(model_args.base, model_args.revision, model_args.adapter, model_args.dtype)
        asked = model_settings(model_args.base, model_args.revision, model_args.adapter, model_args.dtype)
        settings = evaluation_settings(asked, args)
        directory = open_evaluation(Path(model_args.output), name, settings)
        results = benchmark.evaluate(model, tokenizer, directory, args)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    state.print(f"{name}: score {results['score']} on {results['count']} items. All of them are in {directory}.")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
