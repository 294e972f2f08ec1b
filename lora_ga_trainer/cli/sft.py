"""lora-ga sft --model_name_or_path MODEL --dataset_name NAME | --dataset_path FILE | --config MIXTURE.yaml [options]

On several processes: accelerate launch --config_file accelerate_configs/zero3.yaml -m lora_ga_trainer.cli.sft ...
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from .parsing import errors_as_messages, options_parser, parse_options, resume_choice

if TYPE_CHECKING:
    from ..trainers.configs import LoRAGASFTConfig

HELP = """\
usage: {prog} --model_name_or_path MODEL (--dataset_name NAME | --dataset_path FILE)
       [--config FILE.yaml] [options]

Fine-tune a decoder-only model with LoRA, starting from the gradient. The data may be prompts and
completions, conversations or text. Options come from the YAML file; those on the command line take
precedence. The most common ones, some with an example value:

  model      --model_name_or_path  --dtype bfloat16  --attn_implementation  --load_in_4bit
  data       --dataset_name  --dataset_config  --dataset_train_split  --dataset_test_split
             --dataset_path FILE  --eval_dataset_path FILE     .jsonl, .json, .parquet or .csv
             datasets: in the YAML     a mixture, as in TRL; --streaming  --test_split_size 0.1
             --max_length 1024  --packing  --completion_only_loss  --assistant_only_loss
  adapter    --lora_r 8  --lora_alpha 16  --use_rslora true  --lora_dropout 0
             --lora_target_modules all-linear   --lora_target_parameters, for experts
  LoRA-GA    --ga_num_samples 64        examples that the gradient is averaged over
             --ga_batch_size            examples per batch; half the training batch
             --ga_estimator sketch      or exact: the full gradients in float32
             --ga_sketch_passes 2       1.25: a look at a quarter of them, then one pass
             --ga_sketch_size           by default 2r + 32
             --ga_direction ArB2r
             --ga_scale                 by default matched to --ga_full_learning_rate 5e-5, for
                                        --ga_learning_rate; or stable, with --ga_gamma 16
             --ga_offset true           false: B from zero, files of rank r
             --ga_stage_rank            r on top of a trained adapter
             --ga_restart_steps         a fresh gradient every this many steps
             --ga_restart_warmup_steps  --ga_seed 42
  training   --output_dir  --learning_rate 2e-4  --num_train_epochs  --max_steps  --seed
             --per_device_train_batch_size  --gradient_accumulation_steps  --lr_scheduler_type
             --eval_strategy steps  --eval_steps  --save_steps  --save_total_limit
             --logging_steps  --report_to tensorboard  --push_to_hub
  resuming   --resume_from_checkpoint true    the last complete checkpoint, or a folder

{prog} --help_all lists all options and their defaults. They are those of TRL's SFTConfig,
ModelConfig and ScriptArguments, except the adapter's, which are the LoRA-GA paper's."""


@dataclass
class DataArguments(DatasetMixtureConfig, ScriptArguments):
    """TRL's `ScriptArguments` and mixtures, plus local files.

    Raises:
        ValueError: the data come from several places, or from none; or a local file is to be streamed.
    """

    dataset_path: str | None = field(
        default=None, metadata={"help": "Local .jsonl, .json, .parquet or .csv file to train on."}
    )
    eval_dataset_path: str | None = field(
        default=None, metadata={"help": "Local file to evaluate on, beside `dataset_path`."}
    )

    def __post_init__(self):
        super().__post_init__()  # that of the mixture
        if [self.dataset_name is None, self.dataset_path is None, not self.datasets].count(False) != 1:
            if self.dataset_name is None and self.dataset_path is None:
                raise ValueError(
                    "There is no data. Set exactly one of `dataset_name` (on the hub), `dataset_path` (a local file) and "
                    "`datasets` (a mixture, in the YAML file)."
                )
            raise ValueError(
                f"`dataset_name` is {self.dataset_name!r}, `dataset_path` is {self.dataset_path!r} and `datasets` names "
                f"{len(self.datasets)}, but exactly one of them must be set: a data set on the hub, a local file, or a "
                "mixture in the YAML file."
            )
        if self.dataset_path is not None and self.dataset_streaming:
            raise ValueError("`dataset_streaming` is for data sets on the hub. Leave it out with `dataset_path`.")


@dataclass
class AdapterConfig(ModelConfig):
    """TRL's `ModelConfig` with the paper's adapter as the default.

    Raises:
        ValueError: no model, or `use_peft` is off.
    """

    use_peft: bool = field(default=True, metadata={"help": "Always on: LoRA-GA initializes LoRA."})
    lora_r: int = field(default=8, metadata={"help": "The adapter's rank."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter's alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the layers that get an adapter."}
    )
    use_rslora: bool = field(default=True, metadata={"help": "Scaling by lora_alpha/sqrt(r) instead of lora_alpha/r."})

    def __post_init__(self):
        super().__post_init__()
        if self.model_name_or_path is None:
            raise ValueError("`model_name_or_path` is not set. Name a model on the hub, or a folder with one.")
        if not self.use_peft:
            raise ValueError("`use_peft` is False, but LoRA-GA initializes LoRA. For full fine-tuning, use `trl sft`.")


def main(argv: list[str] | None = None, prog: str = "lora-ga sft") -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(HELP.format(prog=prog))
        return
    from ..trainers.configs import LoRAGASFTConfig

    types = (DataArguments, LoRAGASFTConfig, AdapterConfig)
    if {"--help_all", "--help-all"} & set(argv):
        options_parser(types, prog).print_help()
        return
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lora_ga_trainer").setLevel(logging.INFO)
    with errors_as_messages():
        options = parse_options(types, argv, prog)
        train(*options)


def train(data_args: DataArguments, training_args: "LoRAGASFTConfig", model_args: AdapterConfig) -> None:
    """Load, train, save. Every process calls it."""
    from trl import get_peft_config, get_quantization_config

    from ..trainers.sft import LoRAGASFTTrainer

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})  # type: ignore[operator]  # a string has been parsed
    peft_config = get_peft_config(model_args)
    assert peft_config is not None  # `use_peft` is on
    if model_args.model_revision != "main":  # for whoever loads or merges the adapter
        peft_config.revision = model_args.model_revision
    with training_args.main_process_first():  # it makes the cached copies that the others read
        train_dataset, eval_dataset = load_data(data_args, training_args)
    trainer = LoRAGASFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume_choice(training_args.resume_from_checkpoint))
    trainer.save_state()  # the whole log, for `lora-ga inspect` and `lora-ga compare`
    out = Path(training_args.output_dir)  # type: ignore[arg-type]  # TrainingArguments has filled it in
    if training_args.push_to_hub:  # this saves as well
        trainer.push_to_hub(dataset_name=data_args.dataset_name)
    else:
        trainer.save_model()
        trainer.create_model_card(out.resolve().name, data_args.dataset_name)
    trainer.accelerator.print(
        f"The adapter is in {out}; {out / 'README.md'} shows how to load it.\nTo look at the run: lora-ga inspect {out}"
    )
    trainer.accelerator.wait_for_everyone()  # before any process leaves the group
    trainer.end()


def load_data(data_args: DataArguments, training_args: "LoRAGASFTConfig") -> tuple[Any, Any]:
    """(training set, evaluation set or None).

    Raises:
        ValueError: there is no such file, data set or split, or nothing to evaluate on.
    """
    from transformers.trainer_utils import IntervalStrategy

    from .sources import load_mixture, load_named, local_items

    strategy = IntervalStrategy(training_args.eval_strategy)
    evaluates = strategy != IntervalStrategy.NO
    eval_name: str | None
    if data_args.dataset_path is not None:
        if evaluates and data_args.eval_dataset_path is None:
            raise ValueError(
                f"`eval_strategy` is {strategy.value!r}, but there is nothing to evaluate on. Set "
                "`eval_dataset_path`, or leave out `eval_strategy`."
            )
        train_name, eval_name = data_args.dataset_path, data_args.eval_dataset_path if evaluates else None
        parts = {path: local_items(path, ()) for path in (train_name, eval_name) if path is not None}
    else:
        parts = (
            load_mixture(data_args, training_args.seed)
            if data_args.datasets
            else load_named(
                data_args.dataset_name,  # type: ignore[arg-type]  # one of the three is set
                "Check the name and the connection, or pass a local file as `dataset_path`.",
                name=data_args.dataset_config,
                streaming=data_args.dataset_streaming,
            )
        )
        train_name, eval_name = data_args.dataset_train_split, data_args.dataset_test_split if evaluates else None
    for name in filter(None, (train_name, eval_name)):
        if name not in parts:
            remedy = (
                "Set `test_split_size` to hold a part of it out."
                if data_args.datasets
                else "Set `dataset_train_split` and, to evaluate, `dataset_test_split`."
            )
            source = "The mixture `datasets`" if data_args.datasets else data_args.dataset_name
            raise ValueError(f"{source} has no split {name!r}, only {', '.join(parts)}. {remedy}")
    return parts[train_name], parts[eval_name] if eval_name is not None else None


if __name__ == "__main__":
    main()
