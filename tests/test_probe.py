"""Invariants 3 and 7 at the source: what the probe sees is autograd's gradient, and it leaves nothing behind."""

import random

import dense_reference
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import peft_pair, tiny_batches
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_ga_trainer import LoRAGAArguments
from lora_ga_trainer.gradient.estimation import estimate_gradients, make_accumulator
from lora_ga_trainer.gradient.objective import Objective, language_model_loss
from lora_ga_trainer.gradient.probe import gradient_probe
from lora_ga_trainer.gradient.restored import noise_free_training_mode
from lora_ga_trainer.initialization import attach_lora_ga

EXACT = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact")


def estimated_gradients(model, batches, config=EXACT, compute_loss=language_model_loss):
    adapter = attach_lora_ga(model, config)
    accumulators = {name: make_accumulator(weight, config) for name, weight in adapter.weights.items()}
    estimate_gradients(adapter, accumulators, Objective(model, batches, compute_loss))
    return {name: accumulator.grad_OI for name, accumulator in accumulators.items()}


def largest_relative_error(found, reference):
    assert found.keys() == reference.keys()
    return max(((found[name] - reference[name]).norm() / reference[name].norm()).item() for name in reference)


def checkpointed(model, how):
    if how != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "qwen2"])
def test_estimated_gradient_is_autograds(family, checkpointing):
    model, base = peft_pair(family)
    batches = tiny_batches((3, 5))
    found = estimated_gradients(checkpointed(model, checkpointing), batches)
    reference = dense_reference.autograd_gradients(base, found, batches)
    # float32 through two layers, summed in another order
    assert largest_relative_error(found, reference) < 1e-5


@pytest.mark.parametrize("sizes", [(1,) * 8, (5, 3), (8,)])
def test_estimation_does_not_depend_on_batching(sizes):
    """Invariant 3: the token-weighted mean, whatever the batches; prompts and padding contribute nothing."""
    reference = estimated_gradients(peft_pair()[0], tiny_batches((4, 4)))
    found = estimated_gradients(peft_pair()[0], tiny_batches(sizes))
    assert largest_relative_error(found, reference) < 1e-5  # float32 sums in another order


def test_more_padding_changes_nothing():
    reference = estimated_gradients(peft_pair()[0], tiny_batches((4, 4), length=20))
    found = estimated_gradients(peft_pair()[0], tiny_batches((4, 4), length=33))
    assert largest_relative_error(found, reference) < 1e-5


def test_a_fully_masked_batch_among_others_contributes_nothing():
    batches = tiny_batches((4, 4))
    masked = {key: value.clone() for key, value in batches[0].items()}
    masked["labels"][:] = -100
    reference = estimated_gradients(peft_pair()[0], batches)
    assert largest_relative_error(estimated_gradients(peft_pair()[0], [*batches, masked]), reference) < 1e-6


def test_prompt_tokens_contribute_nothing_to_the_loss():
    """Unmasking the prompts does change the gradient: the masks above are not ignored."""
    batches = tiny_batches((4, 4))
    unmasked = [batch | {"labels": batch["input_ids"].where(batch["attention_mask"].bool(), -100)} for batch in batches]
    reference = estimated_gradients(peft_pair()[0], batches)
    assert largest_relative_error(estimated_gradients(peft_pair()[0], unmasked), reference) > 0.1


def test_dropout_is_off_while_estimating():
    """GPT-2 here has dropout 0.1 everywhere and the adapter 0.5: two estimates agree to the bit all the same."""

    def gradients(seed):
        model, _ = peft_pair("gpt2", lora_dropout=0.5)
        torch.manual_seed(seed)
        return estimated_gradients(model, tiny_batches())

    first, second = gradients(seed=1), gradients(seed=2)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_noise_attributes_are_found_and_restored():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_dropout, self.layerdrop, self.router_jitter_noise = 0.1, 0.2, 0.3
            self.resid, self.eps = nn.Dropout(0.4), 1e-5
            self.neftune_noise_alpha, self.drop_something = 5, True  # an int counts, a bool does not

    model = Noisy().eval()
    with noise_free_training_mode(model):
        assert model.training and model.resid.training
        assert (model.attention_dropout, model.layerdrop, model.router_jitter_noise, model.resid.p) == (0, 0, 0, 0)
        assert model.neftune_noise_alpha == 0 and model.drop_something is True and model.eps == 1e-5
    assert model.neftune_noise_alpha == 5
    assert not model.training and not model.resid.training
    assert (model.attention_dropout, model.layerdrop, model.router_jitter_noise, model.resid.p) == (0.1, 0.2, 0.3, 0.4)


def test_noise_that_a_configuration_turns_on_is_found_and_restored():
    model, _ = peft_pair("gpt2")
    config = model.get_base_model().config
    config.router_jitter_noise = 1
    before = config.to_dict()
    with noise_free_training_mode(model):
        assert (config.resid_pdrop, config.attn_pdrop, config.summary_first_dropout, config.router_jitter_noise) == (
            0,
        ) * 4
        assert type(config.resid_pdrop) is float and type(config.router_jitter_noise) is int
        assert config.layer_norm_epsilon == before["layer_norm_epsilon"]
    assert config.to_dict() == before and config.resid_pdrop == 0.1


def test_running_statistics_are_neither_written_nor_replaced():
    """A batch's own statistics would also make the gradient depend on how the examples are batched."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 6))
    base[1].running_mean.normal_()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"])).eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    inputs = torch.randn(8, 8)

    def loss(model, batch, num_items):
        return model(batch["x"]).square().sum() / num_items

    found = [
        estimated_gradients(model, [{"x": part} for part in inputs.split(size)], compute_loss=loss) for size in (8, 2)
    ]
    assert largest_relative_error(found[1], found[0]) < 1e-5  # float32 sums in another order
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert not base[1].training


# --- torch.compile: the Trainer's own is in test_training_options ---------------------------------------------------


def compile_layers_in_place(model, backend):
    for layer in model.model.layers:
        layer.compile(backend=backend)


def wrap_layers(model, backend):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend=backend)


def compile_forward(model, backend):
    model.model.forward = torch.compile(model.model.forward, backend=backend)


@pytest.mark.parametrize(
    ("compile_model", "runs_compiled"),
    [(compile_layers_in_place, False), (wrap_layers, False), (compile_forward, True)],
)
def test_a_compiled_model_gives_the_same_gradient(compile_model, runs_compiled):
    """Compiled modules run as they were written; a compiled function around the layers stops at every tap."""
    batches, compiled_graphs = tiny_batches(), []
    reference = estimated_gradients(peft_pair()[0], batches)

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, _ = peft_pair()
    compile_model(model.get_base_model(), backend)
    found = estimated_gradients(model, batches)
    found = {name.replace("._orig_mod", ""): gradient for name, gradient in found.items()}
    assert largest_relative_error(found, reference) == 0.0  # the same operations, in the same order
    assert bool(compiled_graphs) == runs_compiled
    compiled_graphs.clear()
    torch._dynamo.reset()
    model(batches[0]["input_ids"])
    assert compiled_graphs  # it has come out compiled


def test_functions_that_a_model_compiles_for_itself_stay_compiled():
    """As flex attention is, which uncompiled makes the whole matrix of scores. Its own backward needs a GPU; this is SDPA's."""
    batches, runs = tiny_batches((3, 5)), []

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph.forward(*args)

    torch._dynamo.reset()
    AttentionInterface.register("compiled_sdpa", torch.compile(sdpa_attention_forward, backend=backend))
    AttentionMaskInterface.register("compiled_sdpa", sdpa_mask)
    model, base = peft_pair()
    model.get_base_model().set_attn_implementation("compiled_sdpa")
    found = estimated_gradients(model, batches)
    assert len(runs) == len(batches) * base.config.num_hidden_layers
    # float32 through two layers, summed in another order
    assert largest_relative_error(found, dense_reference.autograd_gradients(base, found, batches)) < 1e-5


def snapshot(model):
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is not None for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()],
        "dropout": [module.p for module in model.modules() if isinstance(module, nn.Dropout)],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
def test_the_probe_leaves_nothing_behind(checkpointing, fails):
    """Invariant 7, after an error in the middle of it too."""
    model, _ = peft_pair("gpt2", lora_dropout=0.1, modules_to_save=["ln_f"])
    attach_lora_ga(model, EXACT)
    checkpointed(model, checkpointing)
    model.base_model.model.transformer.h[0].train()  # mixed modes are restored module by module
    before = snapshot(model)

    def loss(model, batch, num_items):
        torch.rand(3), random.random(), np.random.rand()
        if fails:
            raise RuntimeError("stop here")
        return language_model_loss(model, batch, num_items)

    if fails:
        with pytest.raises(RuntimeError, match="stop here"):
            estimated_gradients(model, tiny_batches(), compute_loss=loss)
    else:
        estimated_gradients(model, tiny_batches(), compute_loss=loss)
    assert snapshot(model) == before


def test_probe_keeps_one_tensor_per_layer_and_none_under_checkpointing():
    """What the taps save for backward is the layer's input, which autograd may drop and recompute."""
    saved = {}
    for how in ("none", "non-reentrant"):
        model, _ = peft_pair()
        checkpointed(model, how)
        adapter = attach_lora_ga(model, EXACT)
        layers = {name: weight.layer for name, weight in adapter.weights.items()}
        inputs, packed = set(), []

        def pack(tensor, inputs=inputs, packed=packed):
            packed.append(tensor.data_ptr() in inputs)
            return tensor

        hooks = [
            layer.register_forward_hook(lambda _, args, __, inputs=inputs: inputs.add(args[0].data_ptr()))
            for layer in layers.values()
        ]
        with (
            gradient_probe(adapter, {name: lambda x, dy: None for name in layers}),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model(**{k: v for k, v in tiny_batches()[0].items() if k != "labels"})
        for hook in hooks:
            hook.remove()
        saved[how] = sum(packed)
    assert saved["none"] >= len(layers)
    assert saved["non-reentrant"] < len(layers)
