"""The `ga_*` options from Python, YAML and the command line, and what a `LoraConfig` may not ask for."""

import dataclasses
from dataclasses import dataclass, fields

import pytest
from peft import LoraConfig
from tiny import lora_config
from transformers import SchedulerType, TrainingArguments
from trl import TrlParser

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTConfig
from lora_ga_trainer.adapter.lora_config import check_lora_config, paper_lora_config

DEFAULTS = {
    "ga_num_samples": 64,
    "ga_batch_size": None,
    "ga_estimator": "sketch",
    "ga_sketch_passes": 2,
    "ga_sketch_size": None,
    "ga_direction": "ArB2r",
    "ga_scale": None,
    "ga_full_learning_rate": 5e-5,
    "ga_learning_rate": None,
    "ga_gamma": 16.0,
    "ga_offset": True,
    "ga_stage_rank": None,
    "ga_restart_steps": None,
    "ga_restart_warmup_steps": 10,
    "ga_seed": 42,
}


def test_defaults_and_documentation():
    assert {option.name: option.default for option in fields(LoRAGAArguments)} == DEFAULTS
    for option in fields(LoRAGAArguments):
        assert option.metadata["help"]
        assert f"{option.name} (" in LoRAGAArguments.__doc__


def test_command_line_and_yaml(tmp_path):
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        "output_dir: out\nbf16: false\nga_num_samples: 32\nga_gamma: 64\nga_scale: gd\nga_sketch_size: 40\n"
    )
    command = ["--config", str(yaml), "--ga_num_samples", "8", "--ga_direction", "random", "--ga_estimator", "exact"]
    command += ["--ga_offset", "false"]
    (config,) = TrlParser(LoRAGASFTConfig).parse_args_and_config(command)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS | {
        "ga_num_samples": 8,
        "ga_gamma": 64,
        "ga_scale": "gd",
        "ga_sketch_size": 40,
        "ga_direction": "random",
        "ga_estimator": "exact",
        "ga_offset": False,
    }


def test_the_default_scale_is_matched_where_the_rate_is_known(tmp_path):
    assert LoRAGASFTConfig(output_dir=str(tmp_path), bf16=False).scale == "matched"
    assert LoRAGAArguments(ga_learning_rate=1e-3).scale == "matched"
    without = LoRAGAArguments()  # a training loop without a trainer, as before there was another
    assert without.scale == "stable"
    assert dataclasses.replace(without, ga_learning_rate=1e-3).scale == "matched"
    assert LoRAGAArguments(ga_learning_rate=1e-3, ga_scale="stable").scale == "stable"


@pytest.mark.parametrize(("given", "passes"), [("2", 2), ("1.25", 1.25)])
def test_passes_from_the_command_line(given, passes, tmp_path):
    command = ["--output_dir", str(tmp_path), "--bf16", "false", "--ga_sketch_passes", given]
    (config,) = TrlParser(LoRAGASFTConfig).parse_args_and_config(command)
    assert config.ga_sketch_passes == passes


def test_restarts_need_the_offset():
    with pytest.raises(ValueError, match="`ga_restart_steps` is 5, but `ga_offset` is False.*Leave out one of the two"):
        LoRAGAArguments(ga_offset=False, ga_restart_steps=5)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("ga_num_samples", 0, "whole number of at least 1"),
        ("ga_num_samples", 2.5, "whole number of at least 1"),
        ("ga_num_samples", True, "whole number of at least 1"),
        ("ga_batch_size", 0, "whole number of at least 1; leave it out"),
        ("ga_estimator", "svd", "one of 'sketch', 'exact'"),
        ("ga_sketch_passes", 0, "finite number of at least 1; 2 is the default"),
        ("ga_sketch_passes", 0.75, "finite number of at least 1; 2 is the default"),
        ("ga_sketch_passes", float("inf"), "finite number of at least 1; 2 is the default"),
        ("ga_sketch_size", 1, "whole number of at least 2; leave it out"),
        ("ga_direction", "ArB", "one of 'ArB2r', 'A2rBr', 'ArBr', 'random', 'gaussian'"),
        ("ga_scale", "stabel", "one of 'matched', 'stable', 'unit', 'gd', 'weight_svd'"),
        ("ga_full_learning_rate", 0.0, "finite number above 0; 5e-5 is the default"),
        ("ga_learning_rate", float("inf"), "finite number above 0; leave it out"),
        ("ga_gamma", 0.0, "finite number above 0"),
        ("ga_gamma", -1, "finite number above 0"),
        ("ga_gamma", float("nan"), "finite number above 0"),
        ("ga_gamma", "16", "finite number above 0"),
        ("ga_offset", "no", "must be True (the paper's form) or False"),
        ("ga_seed", -1, "whole number of at least 0"),
    ],
)
def test_wrong_values_name_the_value_and_the_rule(field, value, rule, tmp_path):
    for make in (LoRAGAArguments, lambda **kw: LoRAGASFTConfig(output_dir=str(tmp_path), bf16=False, **kw)):
        with pytest.raises(ValueError) as error:
            make(**{field: value})
        assert f"`{field}` is {value!r}" in str(error.value) and rule in str(error.value)


def test_a_wrong_value_in_yaml(tmp_path):
    yaml = tmp_path / "run.yaml"
    yaml.write_text("output_dir: out\nbf16: false\nga_direction: upwards\n")
    with pytest.raises(ValueError, match="`ga_direction` is 'upwards'"):
        TrlParser(LoRAGASFTConfig).parse_args_and_config(["--config", str(yaml)])


@pytest.mark.parametrize("init", ["pissa", "gaussian", "olora", "eva", "lora_ga", False])
def test_another_initialization_is_refused(init):
    config = lora_config()
    config.init_lora_weights = init
    with pytest.raises(ValueError, match=f"init_lora_weights={init!r}.*another initialization"):
        check_lora_config(config)


@pytest.mark.parametrize(("option", "value"), [("use_dora", True), ("alora_invocation_tokens", [1])])
def test_another_kind_of_adapter_is_refused(option, value):
    config = lora_config()
    setattr(config, option, value)
    with pytest.raises(ValueError, match=f"{option}=.*cannot be combined with LoRA-GA"):
        check_lora_config(config)


@pytest.mark.parametrize("config", [LoraConfig(), LoraConfig(use_rslora=True, lora_dropout=0.1), paper_lora_config()])
def test_ordinary_lora_configs_pass(config):
    check_lora_config(config)


def test_the_papers_adapter():
    config = paper_lora_config()
    assert (config.r, config.lora_alpha, config.use_rslora, config.target_modules) == (8, 16, True, "all-linear")


def test_a_configuration_of_ones_own(tmp_path):
    @dataclass
    class MyArguments(LoRAGAArguments, TrainingArguments):
        margin: float = 0.1

    found = MyArguments(output_dir=str(tmp_path), lr_scheduler_type="cosine", ga_num_samples=3, margin=0.5)
    assert (found.margin, found.ga_num_samples, found.output_dir) == (0.5, 3, str(tmp_path))
    assert isinstance(found.lr_scheduler_type, SchedulerType), "the checks of `TrainingArguments` have run as well"
    with pytest.raises(ValueError, match="`ga_num_samples` is -3"):
        MyArguments(output_dir=str(tmp_path), ga_num_samples=-3)


def test_the_options_come_first_in_the_bases():
    with pytest.raises(ValueError, match=r"Write `class Late\(LoRAGAArguments, ...\)`"):

        @dataclass
        class Late(TrainingArguments, LoRAGAArguments):
            pass
