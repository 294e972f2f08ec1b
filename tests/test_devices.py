"""Models that are spread by a `device_map`, with accelerate's hooks on them; models in 16 bits, with and without autocast."""

import dense_reference
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from test_probe import estimated_gradients, largest_relative_error
from tiny import lora_config, peft_pair, tiny_batches, tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTTrainer, initialize_lora_ga
from lora_ga_trainer.gradient.accumulator import ExactGradient, GradientSketch
from lora_ga_trainer.gradient.estimation import make_accumulator
from lora_ga_trainer.gradient.objective import language_model_loss
from lora_ga_trainer.gradient.restored import preserved_rng
from lora_ga_trainer.initialization import attach_lora_ga
from lora_ga_trainer.trainers.data import draw_examples

EXACT = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact")
INPUTS = tiny_batches(seed=9)[0]["input_ids"]
REST = {"model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def logits(model):
    with torch.no_grad():
        return model(INPUTS).logits


# --- device_map -----------------------------------------------------------------------------------------------------


def load(base_model, tmp_path, **device_map):
    return AutoModelForCausalLM.from_pretrained(
        base_model, dtype=torch.float32, device_map=REST | device_map, offload_folder=tmp_path / "offload"
    )


def embedding_on_disk(base_model, tmp_path):
    return load(base_model, tmp_path, **{"model.embed_tokens": "disk", "model.layers": "cpu"})


def hooked(base_model, tmp_path):
    """As accelerate leaves a model on several devices: every module's forward replaced by one that moves what comes in."""
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=module is model))
    return model


def accelerates_hooks(model) -> list[AlignDevicesHook]:
    return [vars(module)["_hf_hook"] for module in model.modules() if "_hf_hook" in vars(module)]


@pytest.mark.parametrize("spread", [embedding_on_disk, hooked])
def test_a_model_with_accelerates_hooks(base_model, spread, tmp_path):
    model, base, batches = spread(base_model, tmp_path), tiny_model(), tiny_batches()
    model = get_peft_model(model, lora_config())
    hooks = accelerates_hooks(model)
    assert hooks
    found = estimated_gradients(model, batches)
    reference = dense_reference.autograd_gradients(base, found, batches)
    assert largest_relative_error(found, reference) < 1e-5  # float32, summed in another order
    initialize_lora_ga(model, batches, EXACT, disable_tqdm=True)
    assert torch.equal(logits(model), logits(base))
    assert all(ours is theirs for ours, theirs in zip(accelerates_hooks(model), hooks, strict=True))


def test_the_trainer_with_an_offloaded_embedding(base_model, sft_config, prompt_completion, tokenizer, tmp_path):
    def losses(model):
        trainer = LoRAGASFTTrainer(
            model, sft_config(), train_dataset=prompt_completion, processing_class=tokenizer, peft_config=lora_config()
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    found, reference = losses(embedding_on_disk(base_model, tmp_path)), losses(tiny_model())
    assert found == pytest.approx(reference, rel=1e-6)  # the same operations in float32


def test_offloaded_targets_are_refused_at_construction(base_model, sft_config, prompt_completion, tokenizer, tmp_path):
    def model():
        layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
        return load(base_model, tmp_path, **{"model.embed_tokens": "cpu"} | layers)

    offloaded = r"layers.1.self_attn.q_proj.*offloaded.*device_map.*zero3_offload"
    with pytest.raises(ValueError, match=offloaded):
        LoRAGASFTTrainer(
            model(),
            sft_config(),
            train_dataset=prompt_completion,
            processing_class=tokenizer,
            peft_config=lora_config(),
        )
    with pytest.raises(ValueError, match=offloaded):
        attach_lora_ga(get_peft_model(model(), lora_config()), EXACT)
    # the layers that are not offloaded may be targets
    model = get_peft_model(model(), lora_config(target_modules=["q_proj", "down_proj"], layers_to_transform=[0]))
    initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    assert torch.equal(logits(model), logits(tiny_model()))


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_a_layers_sums_are_on_its_own_device(estimator):
    """torch's device without memory stands in for a second one: it refuses nothing, but everything made there says so."""
    model, _ = peft_pair()
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator=estimator, ga_sketch_size=10)
    weights = attach_lora_ga(model, config).weights
    weight = next(weight for name, weight in weights.items() if name.endswith("gate_proj"))
    weight.layer.to("meta")
    accumulator = make_accumulator(weight, config)
    assert isinstance(accumulator, GradientSketch if estimator == "sketch" else ExactGradient)
    for _ in range(accumulator.passes):
        accumulator.add(torch.ones(5, 48, device="meta"), torch.ones(5, 80, device="meta"))
        assert all(total.is_meta for total in accumulator.sums())
        accumulator.end_pass()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sketchs_bases_are_as_exact_as_the_model(dtype):
    model, _ = peft_pair(dtype=dtype)
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=10)
    for layer in attach_lora_ga(model, config).weights.values():
        accumulator = make_accumulator(layer, config)
        if isinstance(accumulator, GradientSketch):
            expected = torch.float32 if dtype == torch.float32 else torch.bfloat16
            assert accumulator.left_OK.dtype == accumulator.right_IK.dtype == expected
            assert all(total.dtype == torch.float32 for total in accumulator.sums())


# --- 16 bits --------------------------------------------------------------------------------------------------------

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, None),
        (torch.float16, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)


def under_autocast(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def loss_under_autocast(dtype, factor=1.0):
    def loss(model, batch, num_items):
        with under_autocast(dtype):
            return factor * language_model_loss(model, batch, num_items)

    return loss


@PRECISIONS
def test_logits_at_init(dtype, autocast):
    model, base = peft_pair(dtype=dtype)
    initialize_lora_ga(
        model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), loss_under_autocast(autocast), disable_tqdm=True
    )
    assert all(layer.B.frozen.any() for layer in model.lora_ga.weights.values())
    with under_autocast(autocast):
        assert torch.equal(logits(model), logits(base))


@PRECISIONS
def test_gradient(dtype, autocast):
    model, base = peft_pair(dtype=dtype)
    batches = tiny_batches((3, 5))
    found = estimated_gradients(model, batches, compute_loss=loss_under_autocast(autocast))
    reference = dense_reference.autograd_gradients(base.float(), found, batches)
    # some 20 roundings of random signs between a layer's gradient and the loss, each of at most eps / 2 of its own number
    # (twice that for weights that autocast rounds as well), against float32 on the same weights
    eps = torch.finfo(autocast or dtype).eps
    assert 1e-5 < largest_relative_error(found, reference) < 20**0.5 * eps


@pytest.mark.parametrize("factor", [2.0**-6, 2.0**6])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_a_loss_scale_changes_nothing(autocast, factor):
    def gradients(factor):
        loss = loss_under_autocast(autocast, factor)
        return estimated_gradients(peft_pair()[0], tiny_batches(), compute_loss=loss)

    scaled = {name: grad / factor for name, grad in gradients(factor).items()}
    # a power of two only moves exponents: of those bf16 has as many as float32, fp16 loses digits below 6e-5
    bound = 0.0 if autocast == torch.bfloat16 else 20**0.5 * torch.finfo(autocast).eps
    assert largest_relative_error(scaled, gradients(1.0)) <= bound


class LogitsAtStart(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self.found = logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trainers_own_autocast(dtype, sft_config, prompt_completion, tokenizer):
    at_start = LogitsAtStart()
    trainer = LoRAGASFTTrainer(
        tiny_model(dtype=dtype),
        sft_config(bf16=True),
        train_dataset=prompt_completion,
        processing_class=tokenizer,
        peft_config=lora_config(),
        callbacks=[at_start],
    )
    trainer.train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(tiny_model(dtype=dtype)).float()
    assert torch.equal(at_start.found.float(), expected)
    assert trainer.lora_ga_report.alignment_min > 0
    halves = [p for n, p in trainer.model.named_parameters() if "lora_" in n]
    assert len({p.dtype for p in halves}) == 1


# --- torch's defaults -------------------------------------------------------------------------------------------------


@pytest.fixture
def default():
    """Sets torch's default dtype and device, which other code may have left behind, until the test ends."""

    def set_default(dtype=torch.float32, device=None):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)

    yield set_default
    set_default()


@pytest.mark.parametrize("defaults", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"ga_estimator": "exact", "ga_direction": "random"},
        {"ga_sketch_size": 8, "ga_direction": "ArBr"},
        {"ga_sketch_size": 8, "ga_scale": "weight_svd"},
        {"ga_direction": "gaussian", "ga_scale": "gaussian"},
        {"ga_offset": False},
    ],
    ids=str,
)
def test_torchs_defaults_change_nothing(default, options, defaults, tmp_path):
    """Every tensor says which dtype and device it has: the same factors to the bit, and the same files."""

    def loss(model, batch, num_items):  # on the CPU, where the model is; transformers' own makes tensors by default
        hidden = model.get_input_embeddings()(batch["input_ids"])
        for block in model.get_base_model().model.layers:
            attention, mlp = block.self_attn, block.mlp
            value = attention.v_proj(hidden).repeat(1, 1, 2)
            hidden = hidden + attention.o_proj(value * attention.q_proj(hidden)) + attention.k_proj(hidden).mean()
            hidden = hidden + mlp.down_proj(mlp.up_proj(hidden) * mlp.gate_proj(hidden))
        return hidden.square().sum() / num_items

    def run(folder, **defaults):
        model, config = peft_pair()[0], LoRAGAArguments(ga_learning_rate=1e-3, **options)
        default(**defaults)
        report = initialize_lora_ga(model, tiny_batches_on_cpu, config, loss, disable_tqdm=True)
        draws = draw_examples(list(range(20)), 5, 42, slice(0, None, 1))
        model.save_pretrained(folder)
        model.load_adapter(folder, "default", is_trainable=True)
        default()
        return report, draws, {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}

    tiny_batches_on_cpu = tiny_batches()
    (report, draws, expected), (other, other_draws, found) = run(tmp_path / "a"), run(tmp_path / "b", **defaults)
    assert other.alignment == report.alignment and other.gradient_norm == report.gradient_norm and draws == other_draws
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_trainer_under_another_default_dtype(default, dtype, sft_config, prompt_completion, tokenizer):
    reports = []
    for wanted in (torch.float32, dtype):
        model = tiny_model()
        default(dtype=wanted)
        trainer = LoRAGASFTTrainer(
            model, sft_config(max_steps=1), train_dataset=prompt_completion, processing_class=tokenizer,
            peft_config=lora_config(),
        )  # fmt: skip
        trainer.train()
        default()
        reports.append(trainer.lora_ga_report.alignment)
    assert reports[0] == reports[1]


# --- accelerators ---------------------------------------------------------------------------------------------------


class Accelerators:
    """Three devices with a random state each, as `torch.get_device_module` gives them."""

    def __init__(self):
        self.states = [torch.tensor([n], dtype=torch.uint8, device="cpu") for n in range(3)]

    def device_count(self):
        return len(self.states)

    def get_rng_state(self, device):
        return self.states[device]

    def set_rng_state(self, state, device):
        self.states[device] = state


def test_the_random_states_of_all_accelerators_come_out_as_they_were(monkeypatch):
    """Of any kind: torch knows which. Here a made-up one, since torch's CPU build has none."""
    devices = Accelerators()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda *_: devices)
    with pytest.raises(RuntimeError, match="in between"), preserved_rng():
        devices.states = [state + 7 for state in devices.states]
        raise RuntimeError("in between")
    assert [state.item() for state in devices.states] == [0, 1, 2]
