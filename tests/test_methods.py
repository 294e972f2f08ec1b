"""Every recipe with every method, and what makes each method the one it is called."""

import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from finetuning.run import finetune, parse
from methods.baselines import LORA_PLUS_RATIO, check_saves_whole, check_whole_parameters, orthogonality
from methods.table import METHODS, MethodConfig, adapter_config
from peft import AdaLoraModel, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from recipe_cases import RECIPES, options
from safetensors.torch import load_file
from tiny import tiny_batches, tiny_model
from torch.distributed.fsdp import StateDictType
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM


@pytest.fixture
def run(tmp_path, one_thread):
    """(the trainer after 3 tiny steps, its folder); keyword arguments are options."""

    def make(recipe="metamath", **overrides):
        return finetune(RECIPES[recipe], parse(RECIPES[recipe], options(recipe, tmp_path, **overrides))), tmp_path

    return make


def code_in(said: str) -> str:
    return "\n".join(line.strip() for line in said.splitlines() if line.startswith("    "))


def logits(model) -> torch.Tensor:
    inputs = {"input_ids": torch.arange(5, 45)[None]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        return model.eval()(**inputs).logits


def mean_loss(model, dataset) -> float:
    """The cross-entropy per completion token of the whole data set, without a trainer."""
    total, count = 0.0, 0
    for example in dataset:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                predicted = model.eval()(ids, labels=labels[None]).logits[0]
            else:
                predicted, labels = model.eval()(ids).logits[0, :-1], labels[1:]
            total += cross_entropy(predicted, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


# The model that was trained and the one that is loaded do the same float32 operations on the same numbers, but for two: PEFT
# writes PiSSA's W_res + s·BA as W + s·(BA − B0 A0), and AdaLoRA's file leaves out ranks that are zero. Relative to the logits.
RELOADED = dict.fromkeys(METHODS, 0.0) | {"pissa": 1e-5, "adalora": 1e-6}


@pytest.mark.parametrize(
    ("recipe", "method"),
    # the recipes for decoders differ in their rows only
    [
        (recipe, method)
        for recipe in RECIPES
        for method in METHODS
        if recipe in ("metamath", "glue") or method == "lora_ga"
    ],
)
def test_a_recipe_with_a_method(recipe, method, run, capsys):
    """It starts from the base model, trains, and what it saved is loaded by the code that it prints, to the same logits."""
    trainer, folder = run(recipe, method=method)
    said = capsys.readouterr().out
    base = RECIPES[recipe].auto_class.from_pretrained(folder / "model")

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    before, after = (entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert len(losses) == 3 and all(map(math.isfinite, [*losses, after]))
    assert f"Held-out loss: {before:.4f} before, {after:.4f} after" in said
    # float32 means over 8 examples, batched or one by one; PiSSA's base is rounded once
    assert before == pytest.approx(mean_loss(base, trainer.eval_dataset), rel=1e-5)
    assert after == pytest.approx(mean_loss(trainer.model, trainer.eval_dataset), rel=1e-5)

    names: dict = {}
    exec(code_in(said), names)
    assert isinstance(names["model"], PeftModel) == (method != "full")
    trained = logits(trainer.model)
    tolerance = RELOADED[method] * max(1.0, trained.abs().max().item())
    torch.testing.assert_close(logits(names["model"]), trained, rtol=0, atol=tolerance)
    # AdaLoRA moves least: its factors are 0.02 in size and its singular values start at zero
    assert (trained - logits(base)).abs().max() > 100 * max(RELOADED[method], 1e-6)


def test_lora_plus_has_two_learning_rates(run):
    trainer, _ = run(method="lora_plus", weight_decay=0.1, adam_beta2=0.9, lr_scheduler_type="constant", warmup_steps=0)
    rates = {}
    for group in trainer.optimizer.param_groups:
        assert group["weight_decay"] == 0.1 and group["betas"] == (0.9, 0.9)
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(rates) == 14
    for name, parameter in trained.items():
        assert rates[id(parameter)] == pytest.approx(1e-2 * (LORA_PLUS_RATIO if "lora_B" in name else 1)), name
    assert LORA_PLUS_RATIO == 16
    assert {layer.scaling["default"] for layer in lora_layers(trainer.model)} == {16 / 4}


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def test_pissa_takes_the_base_apart_in_memory_only(run, capsys):
    """Trained is W_res + s·BA; checkpoints hold B, A for it, the result [B, −B0], [A; A0] for W."""
    trainer, folder = run(method="pissa", save_strategy="steps", save_steps=2)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    weight = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(weight, base.model.layers[0].self_attn.q_proj.weight, atol=1e-3)

    checkpoint, saved = (
        PeftConfig.from_pretrained(folder / "out/checkpoint-2"),
        PeftConfig.from_pretrained(folder / "out"),
    )
    assert (checkpoint.init_lora_weights, checkpoint.r) == ("pissa", 4)
    assert (saved.init_lora_weights, saved.r, saved.lora_alpha) == (True, 8, 32)
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "out")
    with reloaded.disable_adapter():
        assert torch.equal(logits(reloaded), logits(base))

    # a new process starts from the same singular triplets, so the checkpoint fits
    run(method="pissa", save_strategy="steps", save_steps=2, resume_from_checkpoint=folder / "out/checkpoint-2")
    first, resumed = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Held-out loss"))
    assert first == resumed


def test_adalora_allocates_at_every_step(run, monkeypatch):
    """PEFT hears of each step while its gradients exist, and 6·7 ranks become 4·7, in memory and in the file."""
    steps = []
    allocate = AdaLoraModel.update_and_allocate

    def watched(self, global_step):
        assert all(p.grad is not None for name, p in self.named_parameters() if "lora_" in name)
        steps.append(global_step)
        allocate(self, global_step)

    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", watched)
    trainer, folder = run(method="adalora", max_steps=8, gradient_accumulation_steps=2)
    assert steps == list(range(1, 9))
    schedule = trainer.model.peft_config["default"]
    assert (schedule.total_step, schedule.tinit, schedule.tfinal) == (8, 0, 4)
    values = [p for name, p in trainer.model.named_parameters() if "lora_E" in name]
    assert sum(len(value) for value in values) == 6 * 7 and sum(int(value.count_nonzero()) for value in values) == 4 * 7
    saved = load_file(folder / "out/adapter_model.safetensors")
    assert sum(len(value) for name, value in saved.items() if name.endswith("lora_E")) == 4 * 7


@pytest.mark.parametrize("max_steps", [2, 3, 10])
def test_adalora_reaches_its_budget_in_runs_of_any_length(max_steps, run):
    trainer, _ = run(method="adalora", max_steps=max_steps)
    values = [p for name, p in trainer.model.named_parameters() if "lora_E" in name]
    assert sum(int(value.count_nonzero()) for value in values) == 4 * 7


def test_adalora_refuses_what_it_cannot_do(run):
    with pytest.raises(ValueError, match="takes 2 steps, but this run has 1"):
        run(method="adalora", max_steps=1)
    with pytest.raises(ValueError, match="AdaLoRA cannot be resumed"):
        run(method="adalora", resume_from_checkpoint="True")


def test_adaloras_regularizer_is_pefts():
    """PEFT adds it to the model's own loss, which TRL does not use."""
    config = adapter_config(MethodConfig(method="adalora", r=4), "CAUSAL_LM")
    model, (batch,) = get_peft_model(tiny_model(), config), tiny_batches((4,))
    without = model(**batch).loss
    model.peft_config["default"].orth_reg_weight = 1.0
    # float32 sums of 28 norms of about 2.4 on top of a loss of about 4
    torch.testing.assert_close(model(**batch).loss - without, orthogonality(model), rtol=0, atol=1e-5)


def test_adaloras_regularizer_does_not_count_accumulation(run):
    """8 examples at once, or 4 and 4: the same first loss, which has the regularizer in it once."""
    first = []
    for size, accumulation in ((8, 1), (4, 2)):
        trainer, _ = run(
            method="adalora", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=2
        )
        first.append(trainer.state.log_history[1]["loss"])
    # float32 means over the same examples in another order; the regularizer is 1.2
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert first[0] > trainer.state.log_history[0]["eval_loss"] + 0.5


@pytest.mark.parametrize(
    ("method", "scaling", "variance_A", "variance_B", "orthogonal"),
    [
        ("lora_ga", 16 / 4**0.5, lambda O, I: O**0.5 / 16 / I, lambda O, I: O**0.5 / 16 / O, True),
        ("gaussian", 16 / 4, lambda O, I: 1 / O, lambda O, I: 1 / I, False),
        ("so", 16 / 4**0.5, lambda O, I: O**0.5 / 16 / I, lambda O, I: O**0.5 / 16 / O, False),
        ("ga", 16 / 4, lambda O, I: 1 / I, lambda O, I: 1 / O, True),
    ],
)
def test_the_factors_of_the_ablation(method, scaling, variance_A, variance_B, orthogonal, run):
    """The paper's four: scaling s, size of A0's and B0's entries, and whether they are singular vectors.

    The file holds [A0 + dA; dA] and [dB, B0].
    """
    trainer, folder = run(method=method, **({"ga_scale": "stable"} if method == "lora_ga" else {}))
    assert {layer.scaling["default"] for layer in lora_layers(trainer.model)} == {scaling}
    saved = load_file(folder / "out/adapter_model.safetensors")
    ratios_A, ratios_B = [], []
    for name in [name for name in saved if "lora_A" in name]:
        whole, dA = saved[name].chunk(2, dim=0)
        a_RI, b_OR = whole - dA, saved[name.replace("lora_A", "lora_B")].chunk(2, dim=1)[1]
        O, I = len(b_OR), a_RI.shape[1]
        ratios_A.append(a_RI.square().mean() / variance_A(O, I))
        ratios_B.append(b_OR.square().mean() / variance_B(O, I))
        gram_RR = a_RI @ a_RI.T / (variance_A(O, I) * I)
        # float32 singular vectors; the rows of a Gaussian of this size have cosines of about 0.14
        assert torch.allclose(gram_RR, torch.eye(4), atol=1e-4) == orthogonal, name
    # Over 7 layers a factor has 1,500 Gaussian entries: its variance is known to 4 %. Singular vectors have it exactly.
    for ratios in (ratios_A, ratios_B):
        assert torch.stack(ratios).mean().item() == pytest.approx(1, abs=1e-4 if orthogonal else 0.2)


def test_a_choice_that_the_method_contradicts_is_an_error(tmp_path):
    recipe = RECIPES["metamath"]

    def ga_options(*argv):
        options = parse(recipe, ["--use_cpu", "true", *argv])
        return options.training.ga_direction, options.training.ga_scale

    assert ga_options("--method", "gaussian") == ("gaussian", "gaussian")
    assert ga_options("--method", "so", "--ga_scale", "stable") == ("gaussian", "stable")
    assert ga_options("--ga_scale", "unit") == ("ArB2r", "unit")
    # the default of `ga_scale`, but chosen: on the command line in both spellings, and in a file
    for chosen in (["--ga_scale", "stable"], ["--ga-scale=stable"]):
        with pytest.raises(
            ValueError, match="`ga_scale` is 'stable', but the method 'gaussian' is defined by 'gaussian'"
        ):
            ga_options("--method", "gaussian", *chosen)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.dump({"output_dir": str(tmp_path), "method": "ga", "ga_direction": "random"}))
    with pytest.raises(ValueError, match="`ga_direction` is 'random', but the method 'ga' is defined by 'ArB2r'"):
        ga_options("--config", str(config))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
@pytest.mark.parametrize("name", ["PiSSA", "AdaLoRA"])
def test_what_needs_whole_parameters_refuses_launches_that_shard(name, kind):
    sharded, plain = (
        SimpleNamespace(accelerator=SimpleNamespace(distributed_type=t))
        for t in (DistributedType[kind], DistributedType.MULTI_GPU)
    )
    check_whole_parameters(plain, name)
    with pytest.raises(ValueError, match=f"{name} in PEFT needs whole .* this is a {kind} launch"):
        check_whole_parameters(sharded, name)


def test_fsdp_has_to_gather_what_trainer_saves():
    def launched(kind):
        plugin = SimpleNamespace(state_dict_type=kind)
        state = SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        return SimpleNamespace(accelerator=SimpleNamespace(state=state))

    check_saves_whole(launched(StateDictType.FULL_STATE_DICT))
    with pytest.raises(ValueError, match="`accelerate launch --fsdp_state_dict_type FULL_STATE_DICT`"):
        check_saves_whole(launched(StateDictType.SHARDED_STATE_DICT))


def test_one_name_for_the_rank_and_for_the_method():
    """What `--r` and `--method` say cannot be said otherwise with TRL's own options."""
    recipe = RECIPES["metamath"]
    for option in (["--lora_r", "8"], ["--use_dora", "true"], ["--use_rslora", "true"], ["--use_peft", "true"]):
        with pytest.raises(ValueError, match="not used by the HfArgumentParser: .*" + option[0]):
            parse(recipe, ["--use_cpu", "true", *option])
    model_args = parse(recipe, ["--use_cpu", "true", "--method", "dora", "--r", "32"]).model
    config = adapter_config(model_args, "CAUSAL_LM")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (32, 16, 0.0, True)
    assert config.target_modules == "all-linear"
    assert (model_args.lora_r, model_args.use_peft) == (32, True)
    assert adapter_config(MethodConfig(method="full"), "CAUSAL_LM") is None
    assert adapter_config(MethodConfig(method="adalora", r=8), "CAUSAL_LM").init_r == 12


def test_wrong_methods():
    with pytest.raises(
        ValueError, match="`method` is 'lora-ga', but must be one of 'lora_ga', 'full', 'lora', 'rslora'"
    ):
        MethodConfig(method="lora-ga")
    with pytest.raises(ValueError, match="`r` is 0, but must be at least 1"):
        MethodConfig(r=0)


def test_the_methods_that_are_lora_by_another_name():
    configs = {
        name: adapter_config(MethodConfig(method=name), "CAUSAL_LM")
        for name in METHODS
        if name not in ("full", "adalora")
    }
    assert {name for name, config in configs.items() if config.use_rslora} == {"lora_ga", "rslora", "so"}
    assert {name for name, config in configs.items() if config.use_dora} == {"dora"}
    assert {
        name: config.init_lora_weights for name, config in configs.items() if config.init_lora_weights is not True
    } == {"pissa": "pissa"}
    assert all(type(config) is LoraConfig for config in configs.values())
