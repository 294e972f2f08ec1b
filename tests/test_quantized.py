"""Quantized bases: the same invariants, on weights that nobody dequantizes but the layers themselves."""

import copy
import json
import weakref

import dense_reference
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.te import TeLinear
from test_families import FAMILIES, PARAMETERS
from test_probe import checkpointed, estimated_gradients, largest_relative_error
from test_vision_language import batches_of
from tiny import VOCABULARY, lora_config, random_model, sft_arguments, tiny_batches, word_problems, word_tokenizer
from tiny_vision import FAMILIES as VISION_FAMILIES
from tiny_vision import visible, vision_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from lora_ga_trainer import (
    LoRAGAArguments,
    LoRAGASFTConfig,
    LoRAGASFTTrainer,
    initialize_lora_ga,
    restart_lora_ga,
)
from lora_ga_trainer.checkpoint import export
from lora_ga_trainer.initialization import attach_lora_ga

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the extra `quant`")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INPUTS = tiny_batches(seed=9)[0]["input_ids"]
EXACT = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact")


def dense_model(dtype: torch.dtype = torch.float32, num_layers: int = 2) -> LlamaForCausalLM:
    """Of sizes that the quantizations can block: multiples of 32, 64 in the rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("base"))
    dense_model().save_pretrained(path)
    return path


# --- the quantizations ----------------------------------------------------------------------------------------------


def bnb_config(bits: int, dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_nf4(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=bnb_config(4, dtype))


def load_int8(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=bnb_config(8))


def load_hqq(folder, dtype):
    """Layer by layer, since transformers wants a GPU for HQQ."""
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is the extra `quant`")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name in projections(model):
        parent, _, child = name.rpartition(".")
        layer = quantize.HQQLinear(
            getattr(model.get_submodule(parent), child),
            quantize.BaseQuantizeConfig(nbits=4, group_size=64),
            compute_dtype=dtype,
            device="cpu",
        )
        setattr(model.get_submodule(parent), child, layer)
    return model


def load_torchao(folder, dtype):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    quantization.quantize_(model.model.layers, quantization.Int8WeightOnlyConfig())
    return model


LOADERS = {"nf4": load_nf4, "int8": load_int8, "hqq": load_hqq, "torchao": load_torchao}
EVERY_KIND = pytest.mark.parametrize("kind", list(LOADERS))
BNB_KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])


def projections(model) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TARGETS]


def dequantized(layer: nn.Module) -> torch.Tensor:
    """In each library's own words, not in the package's."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return layer.weight.data.float() * scales[:, None] / 127
    return layer.dequantize() if type(layer).__name__ == "HQQLinear" else layer.weight.dequantize()


def dense_twin(quantized, dtype=torch.float32):
    """A dense model of the dequantized weights: what the quantized one computes, but for rounding."""
    twin = dense_model(dtype)
    for name in projections(quantized):
        twin.get_submodule(name).weight.data.copy_(dequantized(quantized.get_submodule(name)))
    return twin


def stored(model) -> dict[str, torch.Tensor]:
    """The base's bytes as they lie in memory, scales included."""
    kept = {}
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            kept[f"{name}.{key}".replace("base_layer.", "")] = tensor.detach().clone()
        if isinstance(module, bnb.nn.Linear4bit):
            kept[f"{name}.absmax".replace("base_layer.", "")] = module.weight.quant_state.absmax.clone()
        if isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
            kept[f"{name}.SCB".replace("base_layer.", "")] = scales.clone()
    return kept


def same_bytes(found, reference) -> bool:
    def same(a, b):
        if type(a) is not torch.Tensor and type(b).__module__.startswith("torchao"):
            return torch.equal(a.qdata, b.qdata) and torch.equal(a.scale, b.scale)
        return torch.equal(a, b)

    return found.keys() == reference.keys() and all(same(found[name], reference[name]) for name in reference)


def logits(model):
    """In training mode, with the kernels that train: bitsandbytes has others for inference on CPUs, which round otherwise."""
    with torch.no_grad():
        return model.train()(INPUTS).logits


def adapted(quantized, **lora):
    return get_peft_model(quantized, lora_config(**{"r": 2, "target_modules": TARGETS} | lora))


# --- initialization -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_KIND
def test_logits_stay_the_quantized_bases_bit_for_bit(folder, kind, dtype):
    load = LOADERS[kind]
    model, base = adapted(load(folder, dtype)), load(folder, dtype)
    before = stored(model)
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    layers = model.lora_ga.weights
    assert len(layers) == 14
    halves = [half for weight in layers.values() for half in (weight.A, weight.B)]
    assert all(half.frozen.any() for half in halves)
    assert torch.equal(logits(model), logits(base))
    assert same_bytes(stored(model), before)
    assert not torch.equal(logits(base), logits(dense_model(dtype))), "nothing is quantized"


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@EVERY_KIND
def test_gradient_is_autograds_at_the_dequantized_weights(folder, kind, checkpointing):
    quantized = LOADERS[kind](folder, torch.float32)
    twin, batches = dense_twin(quantized), tiny_batches((3, 5))
    found = estimated_gradients(checkpointed(adapted(quantized), checkpointing), batches)
    # float32; the layers' own kernels scale after multiplying or before, which rounds otherwise
    assert largest_relative_error(found, dense_reference.autograd_gradients(twin, found, batches)) < 1e-5
    unquantized = dense_reference.autograd_gradients(dense_model(), found, batches)
    assert largest_relative_error(found, unquantized) > 1e-3, "it would have passed on any weights"


# --- every architecture ---------------------------------------------------------------------------------------------

WIDTHS = {
    "hidden_size", "intermediate_size", "intermediate_size_mlp", "moe_intermediate_size", "head_dim", "q_lora_rank",
    "shared_expert_intermediate_size", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim", "v_head_dim",
    "time_step_rank", "mamba_d_ssm", "mamba_d_head", "d_model", "d_kv", "d_ff", "n_embd", "ffn_dim", "word_embed_proj_dim",
    "encoder_ffn_dim", "decoder_ffn_dim", "rotary_dim", "out_hidden_size", "embed_dim", "projection_dim", "global_head_dim",
    "resampler_head_dim", "linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input",
}  # fmt: skip
UNQUANTIZED = {
    "mamba": ["dt_proj", "out_proj", "lm_head"],  # read as bare weights
    "switch_transformers": ["wo", "lm_head"],  # read for their dtype; T5 keeps its own in float32 by itself
}
"""What transformers itself could not run in 4 bits, with the head, which it leaves out only if it is told nothing.

It quantizes nothing of Falcon, whose layers are a class of its own.
"""


def wide(config: PreTrainedConfig, times: int) -> PreTrainedConfig:
    """In sizes that bitsandbytes can block, multiples of 32; its parts, too."""
    for name in {config.attribute_map.get(name, name) for name in WIDTHS} & vars(config).keys():
        if vars(config)[name]:
            setattr(config, name, times * vars(config)[name])
    sections = (vars(config).get("rope_parameters") or {}).get("mrope_section", [])
    sections[:] = [times * size for size in sections]
    for part in [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]:
        wide(part, times)
    return config


def check_4_bits(base, batches, folder, unquantized=None, **lora):
    """The gradient is autograd's at the dequantized weights, and the start the quantized base's bit for bit."""
    base.save_pretrained(folder)
    nf4 = bnb_config(4)
    nf4.llm_int8_skip_modules = unquantized

    def load():
        return type(base).from_pretrained(folder, dtype=torch.float32, quantization_config=nf4)

    quantized, twin = load(), base
    names = [name for name, module in quantized.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert names
    for name in names:  # GPT-2's weights lie the other way round
        weight = twin.get_submodule(name).weight
        found = dequantized(quantized.get_submodule(name))
        weight.data.copy_(found.T if type(twin.get_submodule(name)).__name__ == "Conv1D" else found)
    model = adapted(load(), task_type=None, **lora)
    before = stored(model)
    found = estimated_gradients(model, batches)
    reached = {name: gradient for name, gradient in found.items() if gradient.any()}  # not all of LLaVA's tower
    # float32, through two layers
    assert largest_relative_error(reached, dense_reference.autograd_gradients(twin, reached, batches)) < 1e-5
    report = initialize_lora_ga(model, batches, EXACT, disable_tqdm=True)
    assert report.alignment.keys() == reached.keys()

    def run(model):
        torch.manual_seed(0)  # of dropout, in training mode: see `logits`
        with torch.no_grad():
            return model.train()(**batches[0]).logits

    assert torch.equal(run(model), run(quantized)) and same_bytes(stored(model), before)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in ("falcon", "falcon_40b", "falcon_rw")]
)
def test_4_bits_in_every_family(family, tmp_path):
    make, targets = FAMILIES[family]
    lora = {"target_modules": targets, "target_parameters": PARAMETERS.get(family)}
    base = random_model(wide(make(), 16)).eval()
    check_4_bits(base, tiny_batches((3, 5)), tmp_path, UNQUANTIZED.get(family), **lora)


@pytest.mark.parametrize("family", list(VISION_FAMILIES))
def test_4_bits_with_pictures(family, tmp_path):
    batches = batches_of(family)
    model, _ = vision_model(family)
    torch.manual_seed(0)
    base = type(model)(wide(copy.deepcopy(model.config), 4)).eval()
    check_4_bits(visible(base), batches, tmp_path, target_modules="all-linear")


@BNB_KINDS
def test_gradient_in_bf16(folder, kind):
    quantized = LOADERS[kind](folder, torch.bfloat16)
    batches = tiny_batches((3, 5))
    twin = dense_twin(quantized).float()
    found = estimated_gradients(adapted(quantized), batches)
    # some 20 roundings to bf16 (of at most 2⁻⁸, of random signs) between a layer's gradient and the loss
    assert largest_relative_error(found, dense_reference.autograd_gradients(twin, found, batches)) < 20**0.5 * 2**-8


def test_8_bit_gradient_of_the_gpus_kernel(folder, monkeypatch):
    """On a GPU bitsandbytes rounds activations to 8 bits on the way forward, and not on the way back.

    Its own function for that, put where it has another one for CPUs: the gradient is that of the dequantized weights at the
    rounded activations, passed straight through the rounding.
    """
    functions = bnb.autograd._functions
    monkeypatch.setattr(functions, "MatMul8bitFp", functions.MatMul8bitLt)
    quantized = load_int8(folder, torch.float32)
    twin, batches = dense_twin(quantized), tiny_batches((3, 5))
    found = estimated_gradients(adapted(quantized), batches)
    reference = dense_reference.autograd_gradients(twin, found, batches)
    # rounding a row of 64 normal numbers to 8 bits of its largest one (2.5 σ) errs by 2.5 / 127 / √12 = 0.6 %, 14 times
    assert 1e-4 < largest_relative_error(found, reference) < 0.006 * 14**0.5


@EVERY_KIND
def test_weight_svd_dequantizes_and_leaves_the_layer_as_it_was(folder, kind):
    load = LOADERS[kind]
    model, base = adapted(load(folder, torch.float32)), load(folder, torch.float32)
    before, scaling = stored(model), 16 / 2**0.5
    initialize_lora_ga(
        model, tiny_batches(), LoRAGAArguments(ga_scale="weight_svd", ga_estimator="exact"), disable_tqdm=True
    )
    for name, layer in model.lora_ga.weights.items():
        weight_OI = dequantized(base.get_submodule(name.removeprefix("base_model.model.")))
        c = dense_reference.scale(
            "weight_svd", out_features=None, rank=2, scaling=scaling, gamma=None, weight_OI=weight_OI.detach()
        )
        for rows in (layer.A.frozen, layer.B.frozen.T):
            assert rows.norm(dim=1).tolist() == pytest.approx([c, c], rel=1e-5)  # unit vectors times c, float32
    assert torch.equal(logits(model), logits(base)) and same_bytes(stored(model), before)
    model(**tiny_batches()[0]).loss.backward()


@EVERY_KIND
def test_training_and_a_restart(folder, kind):
    model = adapted(LOADERS[kind](folder, torch.float32))
    before, batches, config = stored(model), tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3)
    initialize_lora_ga(model, batches, config, disable_tqdm=True)
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)

    def step():
        losses = [model(**batch).loss for batch in batches]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        return sum(losses).item()

    first = [step() for _ in range(8)]
    trained = logits(model)
    restart_lora_ga(model, batches, config, optimizer, disable_tqdm=True)
    # the same products of the trained rows and columns, of a history this time: in float32
    assert (logits(model) - trained).abs().max() < 1e-5
    second = [step() for _ in range(8)]
    assert first[-1] < 0.97 * first[0] and second[-1] < first[-1]
    assert same_bytes(stored(model), before)


@BNB_KINDS
def test_prepared_for_kbit_training(folder, kind):
    """PEFT's own preparation: norms in float32, checkpointing, inputs that require a gradient."""
    load = LOADERS[kind]
    model = adapted(prepare_model_for_kbit_training(load(folder, torch.bfloat16)))
    base = prepare_model_for_kbit_training(load(folder, torch.bfloat16))
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    assert torch.equal(logits(model), logits(base))
    model(**tiny_batches()[0]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


class LargeTensors(TorchDispatchMode):
    """How many floating-point tensors of a target weight's shape are alive at once, counted at every operation."""

    def __init__(self, shapes: set[tuple[int, ...]]):
        super().__init__()
        self.shapes, self.alive, self.most = shapes, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            # torchao's own kind of tensor says that it is floating-point, but holds int8
            if type(tensor) is torch.Tensor and tensor.is_floating_point() and tuple(tensor.shape) in self.shapes:
                self.alive.append(weakref.ref(tensor.untyped_storage()))
        self.alive = [storage for storage in self.alive if storage() is not None]
        self.most = max(self.most, len({id(storage()) for storage in self.alive}))
        return result


@pytest.mark.parametrize("scale", ["stable", "weight_svd"])
@EVERY_KIND
def test_no_copy_of_the_weights_in_full_precision(kind, scale, tmp_path):
    """One layer's at a time while it runs, as in training. With a sketch nothing else has the shape of a weight."""
    dense_model(num_layers=6).save_pretrained(tmp_path)
    model = adapted(LOADERS[kind](tmp_path, torch.float32), target_modules=["gate_proj", "up_proj", "down_proj"])
    if kind == "torchao":  # its product keeps the dequantized weight for the backward, as in training
        checkpointed(model, "non-reentrant")
    shapes = {(128, 64), (64, 128)}
    batches = tiny_batches((3, 5), length=21)  # 63 and 105 tokens: no activation has such a shape
    with LargeTensors(shapes) as large:
        initialize_lora_ga(model, batches, LoRAGAArguments(ga_sketch_size=4, ga_scale=scale), disable_tqdm=True)
    # of the 18 weights, one and what its dequantization computes on the way (codes, scales, their product)
    assert 1 <= large.most <= 4
    large.alive = [storage for storage in large.alive if storage() is not None]
    assert not large.alive, "a dequantized weight was kept"


# --- the trainer ----------------------------------------------------------------------------------------------------


def make_trainer(folder, output_dir, bits, **overrides):
    args = LoRAGASFTConfig(
        **sft_arguments(
            output_dir,
            learning_rate=1e-2,
            model_init_kwargs={"dtype": "float32", "quantization_config": bnb_config(bits)},
            save_strategy="steps",
            save_steps=2,
            **overrides,
        )
    )
    return LoRAGASFTTrainer(
        folder, args, train_dataset=word_problems(), processing_class=word_tokenizer(), peft_config=lora_config(r=2)
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def mean_loss(trainer):
    with torch.no_grad():
        return sum(trainer.model(**batch).loss.item() for batch in trainer.get_train_dataloader()) / 6


@pytest.fixture(scope="module", params=[4, 8], ids=["nf4", "int8"])
def trained(request, folder, tmp_path_factory):
    """(bits, the trainer after 12 steps, the base's bytes before them)."""
    trainer = make_trainer(folder, tmp_path_factory.mktemp("run"), request.param, max_steps=12)
    before = stored(trainer.model)
    trainer.train()
    trainer.save_model()
    return request.param, trainer, before


def quantized_base(folder, bits):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=bnb_config(bits))


def test_one_run_from_a_path_and_a_quantization_config(trained, folder):
    bits, trainer, before = trained
    assert trainer.model.get_base_model().is_quantized
    assert same_bytes(stored(trainer.model), before)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(quantized_base(folder, bits)))
        at_first = mean_loss(trainer)
    assert mean_loss(trainer) < 0.97 * at_first


def test_all_of_an_adapter_is_in_one_dtype(trained):
    """TRL casts what trains to bf16 under a quantized base; the frozen halves are made after that, and like it."""
    layers = trained[1].model.lora_ga.weights.values()
    halves = [half for weight in layers for half in (weight.A, weight.B)]
    assert {parameter.dtype for half in halves for parameter in half.parameters()} == {torch.bfloat16}


def test_the_saved_adapter_with_stock_peft(trained, folder):
    bits, trainer, _ = trained
    base, found = logits(quantized_base(folder, bits)), logits(trainer.model)
    moved = (found - base).abs().max()
    on_quantized = PeftModel.from_pretrained(quantized_base(folder, bits), trainer.args.output_dir)
    # PEFT multiplies in float32, the run rounded 3 products in each of 14 layers to bf16 (2⁻⁹): 1.3 %, and in the largest of
    # 2,000 logits some standard deviations of it
    assert (logits(on_quantized) - found).abs().max() < 4 * 0.013 * moved
    for name, parameter in on_quantized.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()  # as TRL trains it, and nothing is lost: the file is in bf16
    assert torch.equal(logits(on_quantized), found)
    on_full = PeftModel.from_pretrained(dense_model(), trainer.args.output_dir)
    quantizing_moved = (logits(dense_model()) - base).abs().max()
    assert (logits(on_full) - found).abs().max() < 4 * 0.013 * moved + 3 * quantizing_moved
    assert (logits(on_full) - logits(dense_model())).abs().max() > 0.5 * moved


def test_resuming_to_the_bit(trained, folder, tmp_path):
    bits, trainer, before = trained
    resumed = make_trainer(folder, tmp_path, bits, max_steps=12)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert losses(resumed) == losses(trainer)
    ours, theirs = dict(resumed.model.named_parameters()), dict(trainer.model.named_parameters())
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert same_bytes(stored(resumed.model), before)


def test_exporting_and_merging(trained, folder, tmp_path):
    """Merged files are of the full-precision base that the run quantized; in memory PEFT merges and quantizes anew."""
    bits, trainer, _ = trained
    checkpoint = f"{trainer.args.output_dir}/checkpoint-12"
    export(checkpoint, tmp_path / "adapter")
    export(checkpoint, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    on_full = PeftModel.from_pretrained(dense_model(), tmp_path / "adapter")
    # float32: W + s·BA as one matrix, or its products one after the other
    assert (logits(merged) - logits(on_full)).abs().max() < 1e-5

    quantized_base(folder, bits).save_pretrained(tmp_path / "quantized")
    with pytest.raises(ValueError, match="is quantized.*unquantized model as `base_model`"):
        export(checkpoint, tmp_path / "again", merge=True, base_model=tmp_path / "quantized")

    model = PeftModel.from_pretrained(quantized_base(folder, bits), tmp_path / "adapter")
    adapted_logits, base_logits = logits(model), logits(quantized_base(folder, bits))
    ours = logits(copy.deepcopy(trainer.model).merge_and_unload())
    theirs = logits(model.merge_and_unload())
    # a second quantization; what it does to PEFT's own adapter it does to the one in memory
    assert (ours - adapted_logits).norm() < 1.1 * (theirs - adapted_logits).norm() + 2**-6 * base_logits.norm()


# --- what cannot work -----------------------------------------------------------------------------------------------


def test_a_kernel_without_a_backward_is_refused(folder, tmp_path):
    """bitsandbytes' own, for 4 bits on some CPUs: an evaluation repacks the weights for it."""
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes has no such kernel here")
    trainer = make_trainer(folder, tmp_path, 4)
    trainer.evaluate(trainer.train_dataset)
    with pytest.raises(
        ValueError, match=r"quantized layers pass no gradient.*o_proj.*Linear4bit.*evaluate after training"
    ):
        trainer.train()


class Int8Linear(nn.Module):
    """A minimal quantized layer, with the shapes under the names that PEFT looks for; it has a backward, or has none."""

    def __init__(self, linear: nn.Linear, has_backward: bool):
        super().__init__()
        self.in_features, self.out_features, self.has_backward = linear.in_features, linear.out_features, has_backward
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))

    def forward(self, x):
        y = (x if self.has_backward else x.detach()) @ (self.qweight * self.scales).T
        return y if self.has_backward else y.requires_grad_(x.requires_grad)


def int8_model(peft_class, has_backward=True):
    """Its layers wrapped in PEFT's class for some quantization library that is not here."""
    model = dense_model()
    for name in projections(model):
        parent, _, child = name.rpartition(".")
        linear = getattr(model.get_submodule(parent), child)
        setattr(model.get_submodule(parent), child, Int8Linear(linear, has_backward))
    config = lora_config(r=2, target_modules=TARGETS)
    config._register_custom_module({Int8Linear: peft_class})
    return get_peft_model(model, config)


PEFT_CLASSES = pytest.mark.parametrize("peft_class", [GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear, TeLinear])


@PEFT_CLASSES
def test_by_construction_in_pefts_other_quantized_layers(peft_class, tmp_path):
    """GPTQ, AWQ, AQLM, Transformer Engine: PEFT's own layers around a stand-in for the libraries' weights."""
    model, batches = int8_model(peft_class), tiny_batches((3, 5))
    twin = dense_model()
    for name in projections(twin):
        layer = model.get_base_model().get_submodule(name).get_base_layer()
        twin.get_submodule(name).weight.data.copy_(layer.qweight * layer.scales)
    base = copy.deepcopy(model)
    found = estimated_gradients(model, batches)
    # the same float32 products
    assert largest_relative_error(found, dense_reference.autograd_gradients(twin, found, batches)) < 1e-5

    initialize_lora_ga(model, batches, EXACT, disable_tqdm=True)
    with base.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**batches[0]).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = int8_model(peft_class)
    loaded.load_adapter(tmp_path, "saved")
    loaded.set_adapter("saved")
    assert not torch.equal(logits(model), logits(twin))
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5  # float32, A0 + dA rounded once


@PEFT_CLASSES
def test_without_a_backward_they_are_refused(peft_class):
    model = int8_model(peft_class, has_backward=False)
    with pytest.raises(
        ValueError, match=r"4 quantized layers pass no gradient.*o_proj.*Int8Linear.*kernel that can train"
    ):
        initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    layers = model.lora_ga.weights.values()
    assert not any(layer.A.frozen.any() for layer in layers), "nothing was written"


def test_torchaos_dynamic_activations_are_refused():
    """Their quantization of x cuts the gradient off. Here in layers that are no targets, before one that is."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = dense_model()
    quantization.quantize_(model.model.layers, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="quantized layers pass no gradient on to their input"):
        initialize_lora_ga(adapted(model, target_modules=["down_proj"]), tiny_batches(), EXACT, disable_tqdm=True)


@PEFT_CLASSES
def test_weight_svd_is_refused_where_the_weight_cannot_be_had(peft_class):
    model = int8_model(peft_class)
    config = LoRAGAArguments(ga_scale="weight_svd")
    with pytest.raises(ValueError, match=r"weight_svd.*q_proj .*cannot be dequantized.*matched"):
        attach_lora_ga(model, config)
    attach_lora_ga(model, LoRAGAArguments(ga_learning_rate=1e-3))
    with pytest.raises(ValueError, match="cannot be dequantized"):
        initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)
