"""`LoRAGAGRPOTrainer`: the gradient is that of GRPO's own loss on completions of its own, and nothing else changes."""

import copy

import dense_reference
import pytest
import torch
from datasets import Dataset
from other_trainers import estimated_gradients
from peft import PeftModel, get_peft_model
from test_other_trainers import assert_same_gradients, everything_a_probe_may_touch
from tiny import lora_config, moved_at_random, sft_arguments, tiny_batches, tiny_model, word_tokenizer
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from lora_ga_trainer import LoRAGAGRPOConfig, LoRAGAGRPOTrainer

INPUTS = tiny_batches((4,), seed=9)[0]["input_ids"]


def even_words(completions, **_):
    """A reward between 0 and 1."""
    words = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(number % 2 == 0 for number in numbers) / 8 for numbers in words]


def rows(count=12):
    return Dataset.from_list([{"prompt": f"w{i} w{i + 1} w{i % 5}"} for i in range(count)])


def make(out, model=None, stock=False, reward=even_words, peft_config=None, **options):
    """4 completions of each of 2 prompts at once, in 2 batches; the exact gradient."""
    sizes = {"num_generations": 4, "max_completion_length": 8, "gradient_accumulation_steps": 2}
    arguments = sft_arguments(out, **sizes | {"ga_estimator": "exact", "ga_num_samples": 8} | options)
    if stock:
        arguments = {name: value for name, value in arguments.items() if not name.startswith("ga_")}
    trainer, config = (GRPOTrainer, GRPOConfig) if stock else (LoRAGAGRPOTrainer, LoRAGAGRPOConfig)
    model = tiny_model() if model is None else model
    if not isinstance(model, PeftModel):
        peft_config = peft_config or lora_config()
    return trainer(
        model,
        reward,
        config(**arguments),
        train_dataset=rows(),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def entries(trainer):
    times = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [
        {k: v for k, v in entry.items() if k not in ("grad_norm", *times) and not k.startswith("ga/")}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("dapo", {}),
        ("dapo", {"beta": 0.1}),
        ("grpo", {"ga_num_samples": 20}),
        ("dr_grpo", {"ga_batch_size": 3}),
    ],
)
def test_the_gradient_is_autograds(tmp_path, loss, options):
    """Of −Σ A·log p by hand, over all tokens (dapo), by completion (grpo), or over 8 tokens each (dr_grpo). At the start every
    ratio is 1, and the Kullback-Leibler divergence of `beta` has no gradient."""
    trainer = make(tmp_path, loss_type=loss, **options)
    generated = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: generated.append(generate(rows)) or generated[-1]
    before = everything_a_probe_may_touch(trainer.model)[:3]  # of the random state see below
    found = estimated_gradients(trainer)
    assert everything_a_probe_may_touch(trainer.model)[:3] == before
    assert len(generated) == -(-options.get("ga_num_samples", 8) // 8), "as many at once as in training"
    base = tiny_model().eval()
    losses = []
    for batch in generated:
        tokens = batch["completion_mask"].sum()
        for prompt, prompt_mask, ids, mask, advantage in zip(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], batch["advantages"],
            strict=True,
        ):  # fmt: skip
            prompt, ids = prompt[prompt_mask.bool()], ids[mask.bool()]
            logp = base(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total = -advantage * logp.gather(1, ids[:, None]).sum()
            losses.append(total / {"dapo": tokens, "grpo": 8 * len(ids), "dr_grpo": 8 * 8}[loss])
    names = trainer.model.lora_ga.weights
    weights = {name: (base.get_submodule(name.removeprefix("base_model.model.")).weight, False) for name in names}
    expected = dense_reference.weight_gradient(weights, losses)
    # a constant on the loss changes nothing, see test_properties: TRL divides by steps that are not taken here
    first = next(iter(names))
    constant = found[first].norm() / expected[first].norm()
    assert_same_gradients(found, {name: gradient * constant for name, gradient in expected.items()})


def test_everything_else_is_as_in_a_plain_run(tmp_path):
    """What is generated, rewarded and logged; a learning rate of 0 keeps both at the base model."""
    runs = []
    for stock in (True, False):
        options = {} if stock else {"ga_scale": "stable", "ga_num_samples": 24}
        trainer = make(tmp_path / str(stock), stock=stock, learning_rate=0.0, max_steps=6, **options)
        trainer.train()
        runs.append(entries(trainer))
    assert runs[0] == runs[1] and len(runs[0]) == 7 and runs[0][0]["reward"] > 0
    assert trainer.lora_ga_report.num_items == 24


def test_it_trains_saves_and_resumes(tmp_path):
    options = {"learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    whole = make(tmp_path / "run", base, **options)
    whole.train()
    whole.save_model()
    assert (logits(whole.model) - logits(tiny_model())).abs().max() > 0.01
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "run")
    assert (logits(again) - logits(whole.model)).abs().max() < 1e-5  # float32
    with whole.model.disable_adapter():
        assert torch.equal(logits(whole.model), logits(tiny_model()))
    resumed = make(tmp_path / "run", AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_stage_on_top_of_an_adapter(tmp_path):
    """Its reference is where it starts."""
    model = get_peft_model(tiny_model(), lora_config())
    moved_at_random(model)
    start = copy.deepcopy(model)
    trainer = make(tmp_path, model, learning_rate=1e-2, beta=0.1)
    assert list(trainer.model.peft_config) == ["default", "ref"]
    trainer.train()
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(divergences[0]) < 1e-6 < divergences[-1]
    trainer.model.set_adapter("ref")
    assert (logits(trainer.model) - logits(start)).abs().max() < 2e-6  # the same products in float32
    assert list(make(tmp_path / "new", get_peft_model(tiny_model(), lora_config())).model.peft_config) == ["default"]


def test_rewards_that_are_all_alike(tmp_path):
    trainer = make(tmp_path, reward=lambda completions, **_: [1.0 for _ in completions])
    with pytest.raises(ValueError, match=r"The completions of each of 2 prompts .* rewarded alike.*`ga_num_samples`"):
        trainer.train()
    assert trainer.lora_ga_report is None and trainer.state.num_input_tokens_seen == 0


def test_vllm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`use_vllm` is True, but .* Leave it out"):
        make(tmp_path, use_vllm=True)


def test_the_rate_of_full_fine_tuning_is_that_of_reinforcement_learning(tmp_path):
    trainer = make(tmp_path, learning_rate=1e-6, max_steps=1)
    trainer.train()
    for name, weight in trainer.model.lora_ga.weights.items():
        c = dense_reference.matched_scale(
            weight.out_features, weight.in_features, weight.rank, weight.scaling, 1e-6, 1e-6, 1e-6
        )
        assert trainer.lora_ga_report.scale[name] == pytest.approx(c, rel=1e-6)
