"""4-bit NF4 weights on a GPU, where bitsandbytes has kernels of its own."""

import dense_reference
import pytest
import torch
from gpu_results import GRADIENT_TOLERANCE
from peft import get_peft_model, prepare_model_for_kbit_training
from test_gpu_estimation import rounding
from test_probe import checkpointed, estimated_gradients
from tiny import lora_config, tiny_batches

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga


@pytest.fixture(scope="module")
def quantized_tests():
    """The module of the same tests on the CPU: its models, and what the weights are dequantized."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is the extra `quant`")
    import test_quantized

    return test_quantized


@pytest.fixture(scope="module")
def folder(quantized_tests, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("base"))
    quantized_tests.dense_model().save_pretrained(path)
    return path


def loaded(quantized_tests, folder, dtype, device):
    return quantized_tests.load_nf4(folder, dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_at_init_are_the_quantized_bases_bit_for_bit(device, quantized_tests, folder, dtype):
    inputs = quantized_tests.INPUTS.to(device)
    model = quantized_tests.adapted(loaded(quantized_tests, folder, dtype, device))
    base = loaded(quantized_tests, folder, dtype, device)
    before = quantized_tests.stored(model)
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    assert all(layer.B.frozen.any() for layer in model.lora_ga.weights.values())
    with torch.no_grad():
        assert torch.equal(model.train()(inputs).logits, base.train()(inputs).logits)
    assert quantized_tests.same_bytes(quantized_tests.stored(model), before)


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_autograds_at_the_dequantized_weights(device, quantized_tests, folder, dtype, checkpointing):
    quantized, batches = loaded(quantized_tests, folder, dtype, device), tiny_batches((3, 5))
    twin = quantized_tests.dense_twin(quantized, dtype).float()
    found = estimated_gradients(checkpointed(quantized_tests.adapted(quantized), checkpointing), batches)
    found = {name: grad.cpu() for name, grad in found.items()}
    # in bf16 some 20 roundings on the way, as in test_gpu_estimation
    tolerance = GRADIENT_TOLERANCE if dtype == torch.float32 else rounding(dtype)
    reference = dense_reference.autograd_gradients(twin, found, batches)
    assert quantized_tests.largest_relative_error(found, reference) < tolerance


def test_it_learns(device, quantized_tests, folder):
    """Prepared and trained as QLoRA is: checkpointing, norms in float32, autocast."""
    quantized = prepare_model_for_kbit_training(loaded(quantized_tests, folder, torch.bfloat16, device))
    model = get_peft_model(quantized, lora_config(r=2, target_modules=quantized_tests.TARGETS))
    batch = {name: value.to(device) for name, value in tiny_batches()[0].items()}
    initialize_lora_ga(model, [batch], LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        with torch.autocast(device.type, torch.bfloat16):
            loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
