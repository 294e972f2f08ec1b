"""lora-ga eval gsm8k|humaneval|mt_bench|glue --adapter out --base MODEL [options of the benchmark]

Under `accelerate launch -m lora_ga_trainer.cli.eval ...` the items are shared by all processes.
"""

import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from .parsing import errors_as_messages, parse_options

BENCHMARKS = {
    "gsm8k": "GSM8KArguments",
    "humaneval": "HumanEvalArguments",
    "mt_bench": "MTBenchArguments",
    "glue": "GLUEArguments",
}
"""Modules of `lora_ga_trainer.evaluation`, and what their options are called."""


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


def main(argv: list[str] | None = None, prog: str = "lora-ga eval") -> None:
    name, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(f"usage: {prog} {{{','.join(BENCHMARKS)}}} --base MODEL [--adapter ADAPTER] [options]\n")
        print(f"{prog} BENCHMARK --help tells the options of one benchmark.")
        return
    if name not in BENCHMARKS:
        sys.exit(f"error: name the benchmark first, one of {', '.join(BENCHMARKS)}. Its options: {prog} NAME --help")
    with errors_as_messages():
        run(name, options, f"{prog} {name}")


def run(name: str, options: list[str], prog: str) -> None:
    benchmark = import_module(f"lora_ga_trainer.evaluation.{name}")
    model_args, args = parse_options((ModelArguments, getattr(benchmark, BENCHMARKS[name])), options, prog)

    import torch
    from accelerate import PartialState

    from ..evaluation.loading import load, model_settings
    from ..evaluation.results import evaluation_settings, open_evaluation

    # told so, because accelerate would take the processes of a launch on CPUs each for the only one
    state = PartialState(cpu=not torch.accelerator.is_available())
    benchmark.check(args)  # before the model, which may take minutes to load
    model, tokenizer = load(model_args.base, model_args.revision, model_args.adapter, model_args.dtype)
    asked = model_settings(model_args.base, model_args.revision, model_args.adapter, model_args.dtype)
    settings = evaluation_settings(asked, args)
    directory = open_evaluation(Path(model_args.output), name, settings)
    results = benchmark.evaluate(model, tokenizer, directory, args)
    state.print(f"{name}: score {results['score']} on {results['count']} items. All of them are in {directory}.")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
