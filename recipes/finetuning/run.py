"""The steps of every recipe: parse, prepare the data, train with a method, print the loss before and after, save, evaluate."""

import logging
import os
import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import release_memory
from evaluation.arguments import EvaluationArguments
from methods.baselines import check_saves_whole
from methods.table import MethodConfig, set_ga_options
from peft import PeftModel
from transformers import AutoTokenizer, Trainer
from trl import TrlParser, get_quantization_config

from finetuning.recipe import Options, Recipe
from lora_ga_trainer.cli.parsing import config_keys, errors_as_messages, resume_choice
from lora_ga_trainer.distributed.backends import end_sharding

CONFIGS = Path(__file__).parents[1] / "configs"


def parse(recipe: Recipe, argv: list[str]) -> Options:
    """The options in the YAML of `--config`, by default the recipe's demo, and over it those in `argv`.

    Raises:
        ValueError: an option does not exist, or its value is invalid.
    """
    # TRL's parser does not report what was set, and a method must not silently override the user's choice.
    seen = ArgumentParser(argument_default=SUPPRESS, add_help=False)
    for names in (["--config"], ["--ga_direction", "--ga-direction"], ["--ga_scale", "--ga-scale"]):
        seen.add_argument(*names)
    set_here = vars(seen.parse_known_args(argv)[0])
    config = Path(set_here.get("config", CONFIGS / f"{recipe.name}_demo.yaml"))
    if not config.is_file():
        raise ValueError(f"`config` is {config}, but there is no such file. The recipes' own are in {CONFIGS}.")
    config_keys(str(config))
    if "config" not in set_here:
        argv = ["--config", str(config), *argv]

    parser = TrlParser((recipe.data_arguments, recipe.config, MethodConfig, EvaluationArguments))
    options = Options(*parser.parse_args_and_config(argv))
    set_here |= yaml.safe_load(config.read_text(encoding="utf-8"))
    set_ga_options(options.training, options.model.method, given=set_here)
    return options


def finetune(recipe: Recipe, options: Options) -> Trainer:
    """Train and save. Every process calls it; the model may be sharded."""
    training_args, model_args = options.training, options.model
    with training_args.main_process_first():  # it makes the copies that the others read
        if model_args.model_name_or_path is None:
            model_args.model_name_or_path = recipe.demo_model()
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
        train, held_out = recipe.datasets(options, tokenizer)
    check_evaluation(recipe, options)
    training_args.eval_on_start = True
    trainer = recipe.trainer(options, tokenizer, train, held_out)
    check_saves_whole(trainer)
    if trainer.is_world_process_zero():  # for `lora-ga export --rank`, and for anything else to be measured later
        held_out.to_json(Path(training_args.output_dir, "held_out.jsonl"))

    trainer.train(resume_from_checkpoint=resume_choice(training_args.resume_from_checkpoint))
    before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trainer.save_state()  # the whole log, for `lora-ga inspect` and `lora-ga compare`

    say = PartialState().print  # only on the main process; all processes do the rest, since the model may be sharded
    say(f"\nHeld-out loss: {before:.4f} before, {after:.4f} after training.")
    say(how_to_load(recipe, model_args, training_args.output_dir))
    return trainer


def check_evaluation(recipe: Recipe, options: Options) -> None:
    """Find out what is wrong with the tasks of `--evaluate` before hours of training. Every process calls it.

    Raises:
        ValueError: see `evaluation.harness.check`.
    """
    names, source = recipe.asked(options)
    if names:
        from evaluation import harness  # an extra

        harness.check(names, options.evaluation, source)


def evaluate(recipe: Recipe, options: Options) -> dict[str, dict[str, Any]]:
    """Run the tasks of `--evaluate` on the saved result: the metrics by task, on the main process. Every process calls it."""
    names, source = recipe.asked(options)
    if not names:
        return {}
    from evaluation import harness  # an extra

    out, args = options.training.output_dir, options.model
    model = recipe.base_model(args, None if args.use_peft else out)
    if args.use_peft:
        model = PeftModel.from_pretrained(model, out)
    if get_quantization_config(args) is None:  # bitsandbytes has already placed its models
        model = model.to(PartialState().device)
    directory, tokenizer = Path(out, "evaluation"), AutoTokenizer.from_pretrained(out)
    found = harness.evaluate(model, tokenizer, names, directory, options.evaluation, source)
    PartialState().print(f"All answers are in {directory}.")
    return found


def how_to_load(recipe: Recipe, model_args: MethodConfig, output_dir: str) -> str:
    """Where the result is, and the code that loads it without this project."""
    auto_class = recipe.auto_class.__name__
    revision = "" if model_args.model_revision == "main" else f", revision={model_args.model_revision!r}"
    if not model_args.use_peft:
        return (
            f"The model is in {output_dir}. Load it with transformers:\n\n"
            f"    from transformers import {auto_class}\n"
            f"    model = {auto_class}.from_pretrained({output_dir!r})\n"
        )
    return (
        f"The adapter is in {output_dir}. Load it with stock PEFT:\n\n"
        "    from peft import PeftModel\n"
        f"    from transformers import {auto_class}\n"
        f"    base = {auto_class}.from_pretrained({model_args.model_name_or_path!r}{revision})\n"
        f"    model = PeftModel.from_pretrained(base, {output_dir!r})\n"
    )


def run(recipe: Recipe) -> None:
    """The recipe as a program."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lora_ga_trainer").setLevel(logging.INFO)
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)  # it warns of models loaded elsewhere
    with errors_as_messages():
        options = parse(recipe, sys.argv[1:])
        if options.training.world_size == 1 and options.training.device.type == "cpu":
            torch.set_num_threads(os.cpu_count())  # `accelerate launch` gives a CPU process one thread
        if "--config" not in sys.argv:
            PartialState().print(f"Other settings come from {CONFIGS / recipe.name}_demo.yaml.")
        accelerator = release(finetune(recipe, options))
        evaluate(recipe, options)
        accelerator.wait_for_everyone()  # before any process leaves the group
        accelerator.end_training()


def release(trainer: Trainer) -> Accelerator:
    """Free the memory of training, so that its model can be loaded again; only its process group is left."""
    accelerator, trained = trainer.accelerator, trainer.model_wrapped
    vars(trainer).clear()  # callbacks and hooks refer to the trainer, and it refers to everything else
    accelerator.free_memory()
    end_sharding(trained)
    del trained
    release_memory()
    return accelerator
