"""Invariants 1, 2, 3 and 7 on a GPU: logits at the start, the gradient, the factors, and nothing left behind.

The reference is autograd in float32 on the CPU, on the weights of the untouched base.
"""

import copy
import warnings
from contextlib import nullcontext

import dense_reference
import pytest
import torch
from backend_worker import factor_error
from gpu_results import FACTOR_TOLERANCE, GRADIENT_TOLERANCE
from peft import get_peft_model
from test_probe import checkpointed, estimated_gradients
from tiny import lora_config, peft_pair, tiny_batches, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.checkpoint.adapter_files import adapter_state_dict
from lora_ga_trainer.gradient.memory import peak_memory
from lora_ga_trainer.gradient.objective import language_model_loss

EXACT = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact")
SKETCH = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="sketch", ga_sketch_size=10)
INPUTS = tiny_batches(seed=9)[0]["input_ids"]


def rounding(dtype: torch.dtype) -> float:
    """Some 20 roundings of random signs between a layer's gradient and the loss, each of at most eps / 2 of its own number
    (twice that where autocast rounds the weights as well)."""
    return 20**0.5 * torch.finfo(dtype).eps


def largest_relative_error(found, reference):
    assert found.keys() == reference.keys()
    return max(((found[name].cpu() - reference[name]).norm() / reference[name].norm()).item() for name in reference)


def logits(model, device):
    with torch.no_grad():
        return model(INPUTS.to(device)).logits


def autocast_loss(device, dtype):
    def loss(model, batch, num_items):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return language_model_loss(model, batch, num_items)

    return loss


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, None),
        (torch.float16, torch.float16),
    ],
    ids=str,
)


# --- precision ------------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_at_init_are_the_base_models_bit_for_bit(device, family, dtype, autocast):
    model, base = (part.to(device) for part in peft_pair(family, dtype))
    weights = copy.deepcopy(base.state_dict())
    initialize_lora_ga(model, tiny_batches(), SKETCH, autocast_loss(device, autocast), disable_tqdm=True)
    assert all(layer.B.frozen.any() for layer in model.lora_ga.weights.values())
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        assert torch.equal(logits(model, device), logits(base, device))
    for name, value in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, weights[name.replace("base_layer.", "")]), "the base weights are never written"


@PRECISIONS
def test_gradient(device, dtype, autocast):
    model, base = peft_pair(dtype=dtype)
    batches = tiny_batches((3, 5))
    found = estimated_gradients(model.to(device), batches, compute_loss=autocast_loss(device, autocast))
    assert all(grad.device.type == device.type for grad in found.values())
    reference = dense_reference.autograd_gradients(base.float(), found, batches)
    narrowest = autocast or dtype
    tolerance = GRADIENT_TOLERANCE if narrowest == torch.float32 else rounding(narrowest)
    assert largest_relative_error(found, reference) < tolerance


@pytest.mark.parametrize("config", [EXACT, SKETCH], ids=["exact", "sketch"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd"])
def test_the_factors_are_those_found_on_the_cpu(device, config, scale):
    """The sketch's Gaussian matrices are the same on every device."""
    config = LoRAGAArguments(**vars(config) | {"ga_scale": scale})
    adapters, reports = {}, {}
    for place in ("cpu", device):
        model = peft_pair(r=2)[0].to(place)
        reports[str(place)] = initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)
        adapters[str(place)] = adapter_state_dict(model)
    found, reference = adapters[str(device)], adapters["cpu"]
    assert factor_error({name: value.cpu() for name, value in found.items()}, reference) < FACTOR_TOLERANCE
    assert reports[str(device)].alignment == pytest.approx(reports["cpu"].alignment, rel=1e-3)  # no gap in it


# --- checkpointing, attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_gradient_with_checkpointing(device, checkpointing, autocast):
    loss, batches = autocast_loss(device, autocast), tiny_batches((3, 5))
    plain = estimated_gradients(peft_pair()[0].to(device), batches, compute_loss=loss)
    model = checkpointed(peft_pair()[0].to(device), checkpointing)
    found = estimated_gradients(model, batches, compute_loss=loss)
    # the same operations once more; only sums that a kernel makes in no fixed order may differ
    tolerance = GRADIENT_TOLERANCE if autocast is None else rounding(autocast)
    assert largest_relative_error(found, {name: grad.cpu() for name, grad in plain.items()}) < tolerance


def attending(attention: str, dtype: torch.dtype = torch.float32):
    """A Llama whose heads of 32 every kernel of attention takes; two queries to a key."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()


ATTENTIONS = {
    # name: (implementation, dtype, torch's kernel, whether rows may be padded)
    "eager": ("eager", torch.float32, None, True),
    "sdpa": ("sdpa", torch.float32, None, True),
    "sdpa, memory-efficient kernel": ("sdpa", torch.float32, SDPBackend.EFFICIENT_ATTENTION, True),
    "sdpa, flash kernel": ("sdpa", torch.bfloat16, SDPBackend.FLASH_ATTENTION, False),
    "sdpa, in bf16": ("sdpa", torch.bfloat16, None, True),
    "flash_attention_2": ("flash_attention_2", torch.bfloat16, None, True),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_gradient_by_kernel_of_attention(request, device, name):
    attention, dtype, kernel, padded = ATTENTIONS[name]
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    if kernel is not None or attention == "flash_attention_2":
        request.getfixturevalue("cuda")
    batches = tiny_batches((3, 5)) if padded else [{"input_ids": INPUTS, "labels": INPUTS}]
    model = get_peft_model(attending(attention, dtype), lora_config()).to(device)
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        found = estimated_gradients(model, batches)
    reference = dense_reference.autograd_gradients(attending("eager", dtype).float(), found, batches)
    tolerance = GRADIENT_TOLERANCE if dtype == torch.float32 else rounding(dtype)
    assert largest_relative_error(found, reference) < tolerance


# --- what is left behind, and what is waited for --------------------------------------------------------------------


def test_random_states_modes_and_gradients_come_out_as_they_were(device):
    model = peft_pair("gpt2", lora_dropout=0.5)[0].to(device).train()
    torch.rand(3, device=device)  # starts CUDA's generator
    before = torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device.type == "cuda" else [])
    initialize_lora_ga(model, tiny_batches(), SKETCH, disable_tqdm=True)
    after = torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device.type == "cuda" else [])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert {p.device.type for p in model.parameters()} == {device.type}


def test_the_peak_is_that_of_a_tensor_that_is_gone(cuda):
    with peak_memory(cuda) as peak:
        torch.ones(2**20, device=cuda)
    # the allocator does not split a block for less than 1 MiB
    assert 4 * 2**20 <= peak.extra_bytes < 5 * 2**20


def waits(layers: int, batches: int) -> int:
    """How often the host waits for the GPU while the gradient of so many batches and layers is estimated."""
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=4, vocab_size=64,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_config(config).cuda(), lora_config())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            estimated_gradients(model, tiny_batches((2,) * batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in said)


def test_no_layer_waits_for_the_gpu_in_the_loop_over_batches(cuda):
    waits(1, 1)  # what a first run waits for once
    of_a_batch = {layers: waits(layers, 5) - waits(layers, 3) for layers in (1, 4)}
    assert of_a_batch[1] == of_a_batch[4], "more layers, more waiting"


def test_a_model_on_the_gpu_with_its_embedding_on_the_cpu(cuda, base_model):
    spread = {"model.embed_tokens": "cpu", "model.layers": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32, device_map=spread)
    batches = tiny_batches((3, 5))
    found = estimated_gradients(get_peft_model(model, lora_config()), batches)
    reference = dense_reference.autograd_gradients(tiny_model().eval(), found, batches)
    assert largest_relative_error(found, reference) < GRADIENT_TOLERANCE
