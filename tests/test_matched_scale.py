"""`ga_scale="matched"`: the first step of AdamW moves every weight as far as full fine-tuning would, whatever the rate."""

import math

import dense_reference
import pytest
import torch
from peft import get_peft_model
from tiny import lora_config, peft_pair, tiny_batches, tiny_model
from transformers import TrainerCallback
from transformers.optimization import Adafactor, AdafactorSchedule

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTTrainer, initialize_lora_ga
from lora_ga_trainer.checkpoint.state import STATE_FILE, read_state

FULL = 3e-5
LARGE = 1e-2
"""With it c is above its least value at every rate that a trainer here has."""
A_TENTH_OF_LORAS = 0.1 * math.sqrt(1 / 3)
"""Of the root-mean-square length of a row of A as PEFT draws it: I entries uniform in ±1/√I."""


def distances_of_one_step(model, parameters, rate):
    """‖ΔW‖ of every adapted weight after one step of AdamW on a batch, summed up densely."""
    before = {name: weight.layer.get_delta_weight("default") for name, weight in model.lora_ga.weights.items()}
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model(**tiny_batches(seed=5)[0]).loss.backward()
    optimizer.step()
    layers = {name: weight.layer for name, weight in model.lora_ga.weights.items()}
    return {name: (layer.get_delta_weight("default") - before[name]).norm().item() for name, layer in layers.items()}


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("rate", [2e-5, 2e-4, 2e-3])
@pytest.mark.parametrize("lora", [{}, {"r": 8, "lora_alpha": 8}, {"r": 2, "use_rslora": False}], ids=str)
def test_the_first_step_is_as_long_as_full_fine_tunings(lora, rate, offset):
    """Layer by layer, at any rate, rank, α and scaling: ‖ΔW‖ = η_f·√(O·I), the norm of ±η_f in every entry. These layers are so
    small that at 2e-3 all of them start from the shortest A0."""
    model, _ = peft_pair(**lora)
    config = LoRAGAArguments(
        ga_scale="matched", ga_full_learning_rate=FULL, ga_learning_rate=rate, ga_offset=offset, ga_estimator="exact"
    )
    initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)
    rate_of_products = rate * model.lora_ga.weights[next(iter(model.lora_ga.weights))].rank
    distances = distances_of_one_step(model, [p for p in model.parameters() if p.requires_grad], rate)
    for name, weight in model.lora_ga.weights.items():
        O, I = weight.out_features, weight.in_features
        # s·dB dA is not in the formula: its norm is at most s·η²·r·√(O·I) more or less. Beside it dB A0 and B0 dA are not
        # quite orthogonal, and a few entries have no gradient, which AdamW does not move.
        product = weight.scaling * rate_of_products * rate * math.sqrt(O * I)
        c = dense_reference.matched_scale(O, I, weight.rank, weight.scaling, FULL, rate, rate, offset)
        wanted = FULL * math.sqrt(O * I) * max(1, A_TENTH_OF_LORAS / c)  # further only from the shortest A0
        assert distances[name] == pytest.approx(wanted, rel=0.15, abs=product), name


def full_steps(model, rate):
    """‖ΔW‖ of the weights of an untouched model in the same step of full fine-tuning."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model(**tiny_batches(seed=5)[0]).loss.backward()
    optimizer.step()
    return {name: (parameter - before[name]).norm().item() for name, parameter in model.named_parameters()}


def test_full_fine_tuning_really_goes_so_far():
    model, base = peft_pair()
    full = full_steps(base.train(), FULL)
    config = LoRAGAArguments(ga_scale="matched", ga_full_learning_rate=FULL, ga_learning_rate=1e-4)
    initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)
    ours = distances_of_one_step(model, [p for p in model.parameters() if p.requires_grad], 1e-4)
    for name, distance in ours.items():
        # as above; s·dB dA is a hundredth of it at this rate
        assert distance == pytest.approx(full[f"{name.removeprefix('base_model.model.')}.weight"], rel=0.15), name


@pytest.fixture
def make_trainer(sft_config, prompt_completion, tokenizer):
    def make(callbacks=(), **options):
        options = {"ga_full_learning_rate": LARGE} | options
        return LoRAGASFTTrainer(
            model=tiny_model(),
            args=sft_config(**options),
            train_dataset=prompt_completion,
            processing_class=tokenizer,
            peft_config=lora_config(),
            callbacks=list(callbacks),
        )

    return make


def scales(trainer):
    return trainer.lora_ga_report.scale


def expected(trainer, rate_A, rate_B=None):
    """What the formula gives, in float32, in which it comes back from the process that factored the weight."""
    found = {
        w.name: dense_reference.matched_scale(
            w.out_features, w.in_features, w.rank, w.scaling, LARGE, rate_A, rate_B or rate_A, trainer.args.ga_offset
        )
        for w in trainer.model.lora_ga.weights.values()
    }
    assert min(found.values()) > A_TENTH_OF_LORAS, "the shortest A0 is the same at every rate"
    return {name: pytest.approx(c, rel=1e-6) for name, c in found.items()}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "constant_with_warmup"])
def test_the_trainer_knows_its_peak_rate(make_trainer, schedule):
    trainer = make_trainer(
        ga_scale="matched", learning_rate=3e-4, lr_scheduler_type=schedule, warmup_steps=2, max_steps=3
    )
    trainer.train()
    assert scales(trainer) == expected(trainer, 3e-4)
    assert "  scale      c from 8." in trainer.lora_ga_report.summary()
    for name, weight in trainer.model.lora_ga.weights.items():
        # rows of A0 and columns of B0 have length c; float32
        for lengths in (weight.A.frozen.norm(dim=1), weight.B.frozen.norm(dim=0)):
            assert lengths.tolist() == pytest.approx([scales(trainer)[name]] * weight.rank, rel=1e-5)


def test_an_option_overrules_the_trainers_rate(make_trainer):
    trainer = make_trainer(ga_scale="matched", learning_rate=3e-4, ga_learning_rate=1e-3, max_steps=1)
    trainer.train()
    assert scales(trainer) == expected(trainer, 1e-3)


def two_groups(trainer, rate_A, rate_B):
    A, B = zip(*(weight.trained for weight in trainer.model.lora_ga.weights.values()), strict=True)
    return torch.optim.SGD([{"params": A, "lr": rate_A}, {"params": B, "lr": rate_B}])


def one_cycle(optimizer, peaks):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=100)


def cycles(optimizer, peaks):
    return torch.optim.lr_scheduler.CyclicLR(optimizer, [1e-6, 1e-6], peaks, cycle_momentum=False)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("schedule", [one_cycle, cycles])
@pytest.mark.parametrize("own", ["from outside", "both methods", "the schedule"])
def test_the_rates_are_the_peaks_of_what_trains(sft_config, prompt_completion, tokenizer, own, schedule, offset):
    """Groups of their own as in LoRA+, whose schedule climbs on from its start, made in any of the places that Trainer has."""

    class Own(LoRAGASFTTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = two_groups(self, 1e-4, 16e-4)
            return self.optimizer

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = schedule(self.optimizer, [1e-4, 16e-4])
            return self.lr_scheduler

    class OwnSchedule(LoRAGASFTTrainer):
        create_scheduler = Own.create_scheduler

        def get_decay_parameter_names(self, model):  # the trainer's own two groups are A and B
            return [name for name, _ in model.named_parameters() if ".lora_A." in name]

    trainer = {"from outside": LoRAGASFTTrainer, "both methods": Own, "the schedule": OwnSchedule}[own](
        model=tiny_model(),
        args=sft_config(
            ga_scale="matched", ga_full_learning_rate=LARGE, max_steps=1, learning_rate=1e-5, ga_offset=offset
        ),
        train_dataset=prompt_completion,
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    if own == "from outside":
        trainer.optimizer = two_groups(trainer, 1e-4, 16e-4)
        trainer.lr_scheduler = schedule(trainer.optimizer, [1e-4, 16e-4])
    trainer.train()
    assert scales(trainer) == expected(trainer, 1e-4, 16e-4)


def test_without_the_offset_only_the_rate_of_B_counts(make_trainer):
    for rates, fails in (((0.0, 1e-3), False), ((1e-3, 0.0), True)):
        trainer = make_trainer(ga_scale="matched", ga_offset=False, max_steps=1)
        trainer.optimizer = two_groups(trainer, *rates)
        if fails:
            with pytest.raises(ValueError, match=r"0.001 \(A\) and 0.0 \(B\), to which no factor can be matched"):
                trainer.train()
        else:
            trainer.train()
            assert scales(trainer) == expected(trainer, *rates)


def test_a_rate_that_the_optimizer_does_not_know(make_trainer):
    """Adafactor finds its own."""
    for known in (None, 1e-3):
        trainer = make_trainer(ga_scale="matched", ga_learning_rate=known, max_steps=1)
        trainer.optimizer = Adafactor(two_groups(trainer, 1.0, 1.0).param_groups, lr=None)
        for group in trainer.optimizer.param_groups:
            group["lr"] = None
        trainer.lr_scheduler = AdafactorSchedule(trainer.optimizer)
        if known is None:
            with pytest.raises(ValueError, match="Set `ga_learning_rate` to the peak learning rate"):
                trainer.train()
        else:
            trainer.train()
            assert scales(trainer) == expected(trainer, 1e-3)


def test_an_optimizer_that_trains_neither_factor_is_an_error(make_trainer):
    trainer = make_trainer(ga_scale="matched", learning_rate=0.0, max_steps=1)
    with pytest.raises(
        ValueError, match=r"at the learning rates 0.0 \(A\) and 0.0 \(B\), to which no factor can be matched"
    ):
        trainer.train()
    assert trainer.lora_ga_report is None


@pytest.mark.parametrize(
    ("options", "warned"), [({}, 1), ({"ga_scale": "stable"}, 0), ({"ga_learning_rate": 1e-3}, 0)], ids=str
)
def test_a_loop_that_does_not_say_its_rate_is_told(options, warned, caplog):
    initialize_lora_ga(get_peft_model(tiny_model(), lora_config()), tiny_batches(), LoRAGAArguments(**options))
    assert caplog.text.count("`ga_learning_rate` is not set") == warned


def test_a_loop_without_a_trainer_has_to_say_its_rate():
    model = get_peft_model(tiny_model(), lora_config())
    with pytest.raises(ValueError, match="`ga_learning_rate` is None, but .* Pass the peak learning rate"):
        initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_scale="matched"), disable_tqdm=True)
    assert not any(weight.A.frozen.any() for weight in model.lora_ga.weights.values())


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_restarts_resume_card_and_file(make_trainer, tmp_path):
    """A restart in the middle of the schedule is matched to the same rates; a resumed run is the uninterrupted one."""
    options = {"ga_scale": "matched", "ga_restart_steps": 3, "learning_rate": 3e-4, "max_steps": 5, "logging_steps": 1}
    whole = make_trainer(**options)
    whole.train()
    (restart,) = whole.model.lora_ga.state.restarts
    assert restart.scale == scales(whole) == expected(whole, 3e-4)

    saving = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(**options, **saving, callbacks=[StopAt(2)]).train()
    resumed = make_trainer(**options, **saving)
    resumed.train(resume_from_checkpoint=True)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    resumed.save_model()
    assert read_state(tmp_path / "run").report.scale == scales(whole)
    assert (tmp_path / "run" / STATE_FILE).exists()
    assert "matched to full fine-tuning at the learning rate 0.01" in (tmp_path / "run/README.md").read_text()
