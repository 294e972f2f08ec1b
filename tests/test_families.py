"""Every architecture: the start is exact, the gradient is autograd's, the saved adapter is an ordinary one.

All are tiny random models of transformers' own classes. Where "all-linear" works it is what they are adapted with.
"""

import copy
import re

import dense_reference
import pytest
import torch
from peft import PeftModel, get_peft_model
from test_probe import checkpointed, estimated_gradients, largest_relative_error
from tiny import VOCABULARY, lora_config, random_model, tiny_batches
from torch import nn
from transformers import (
    BartConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
    T5Config,
)

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.checkpoint import export
from lora_ga_trainer.initialization import attach_lora_ga

CONFIG = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# sizes that are not multiples of each other, so that a transposed shape cannot go unnoticed; windows shorter than the examples
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = TOKENS | {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 10, "attention_dropout": 0.1}
EXPERTS = GROUPED | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
FALCON = TOKENS | {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1,
}  # fmt: skip
MAMBA = {"hidden_size": 24, "state_size": 4, "num_hidden_layers": 2}

FAMILIES = {  # a configuration, and what is targeted
    "llama": (lambda: LlamaConfig(**GROUPED), "all-linear"),
    "mistral": (lambda: MistralConfig(**GROUPED, sliding_window=8), "all-linear"),
    "qwen2": (lambda: Qwen2Config(**SIZES, num_key_value_heads=2), "all-linear"),
    "qwen3": (lambda: Qwen3Config(**GROUPED), "all-linear"),
    "gemma2": (lambda: Gemma2Config(**GROUPED, sliding_window=8), "all-linear"),
    "gemma3": (lambda: Gemma3TextConfig(**GROUPED, sliding_window=8), "all-linear"),
    "phi3": (lambda: Phi3Config(**SIZES, num_key_value_heads=2), "all-linear"),  # q, k, v in one
    "gpt2": (lambda: GPT2Config(**TOKENS, n_embd=24, n_layer=2, n_head=4, n_positions=64), "all-linear"),  # Conv1D: I×O
    "gpt_neox": (lambda: GPTNeoXConfig(**SIZES, hidden_dropout=0.1, attention_dropout=0.1), "all-linear"),
    "opt": (  # with projections into and out of the layers, as in OPT-350m
        lambda: OPTConfig(
            **TOKENS, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=14, do_layer_norm_before=False,
        ),
        "all-linear",
    ),
    "gpt_neo": (
        lambda: GPTNeoConfig(
            **TOKENS, hidden_size=24, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=8, max_position_embeddings=64, resid_dropout=0.1, attention_dropout=0.1, embed_dropout=0.1,
        ),
        "all-linear",
    ),
    "gptj": (
        lambda: GPTJConfig(
            **TOKENS, n_embd=24, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, resid_pdrop=0.1, attn_pdrop=0.1,
        ),
        "all-linear",
    ),
    # adds to what its layers return in place, and reads its dropout from the configuration as it runs
    "falcon": (lambda: FalconConfig(**FALCON), "all-linear"),  # one key and value for all heads
    "falcon_40b": (lambda: FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True), "all-linear"),
    "falcon_rw": (
        lambda: FalconConfig(**FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True), "all-linear"
    ),
    "bloom": (lambda: BloomConfig(**TOKENS, hidden_size=24, n_layer=2, n_head=4, hidden_dropout=0.1), "all-linear"),
    # Mixtures: the experts of most are one parameter, since transformers 5, and their routers are no `nn.Linear`. For some
    # "all-linear" means both to PEFT; for the others it means neither.
    "mixtral": (lambda: MixtralConfig(**GROUPED, num_local_experts=4, router_jitter_noise=0.1), "all-linear"),
    "qwen2_moe": (lambda: Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=28), "all-linear"),
    "qwen3_moe": (lambda: Qwen3MoeConfig(**EXPERTS), "all-linear"),
    "gpt_oss": (lambda: GptOssConfig(**GROUPED, num_local_experts=4), "all-linear"),
    "qwen2_moe_experts": (lambda: Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=28), ATTENTION),
    "gpt_oss_experts": (lambda: GptOssConfig(**GROUPED, num_local_experts=4), ATTENTION),  # I×O
    "llama4_experts": (  # I×O, and every expert gets all tokens
        lambda: Llama4TextConfig(**GROUPED, intermediate_size_mlp=40, num_local_experts=4, moe_layers=[1]), ATTENTION
    ),
    "deepseek_v3": (  # latent attention
        lambda: DeepseekV3Config(
            **SIZES, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
            q_lora_rank=14, kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=10,
            first_k_dense_replace=1,
        ),
        "all-linear",
    ),
    "switch_transformers": (  # each expert is a module, and gets the tokens that are routed to it
        lambda: SwitchTransformersConfig(
            vocab_size=VOCABULARY, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=4,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, expert_capacity=64,
            decoder_start_token_id=0,
        ),
        "all-linear",
    ),
    # State spaces: PEFT refuses `out_proj`, which their kernels read as a bare weight; here `dt_proj` is read so, too
    "mamba": (lambda: MambaConfig(**TOKENS | MAMBA, time_step_rank=6), ["in_proj", "x_proj"]),
    "mamba2": (
        lambda: Mamba2Config(**TOKENS | MAMBA, num_heads=4, head_dim=12, n_groups=2, expand=2, chunk_size=8),
        ["in_proj"],
    ),
    "falcon_h1": (
        lambda: FalconH1Config(
            **GROUPED, mamba_d_ssm=24, mamba_n_heads=2, mamba_d_head=12, mamba_d_state=4, mamba_chunk_size=8
        ),
        ["in_proj", *ATTENTION, "gate_proj", "up_proj", "down_proj"],
    ),
    "t5": (
        lambda: T5Config(
            vocab_size=VOCABULARY, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0,
        ),
        "all-linear",
    ),
    "bart": (
        lambda: BartConfig(
            **TOKENS, d_model=24, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=40, decoder_ffn_dim=40,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64,
        ),
        "all-linear",
    ),
}  # fmt: skip
PARAMETERS = {  # besides
    "qwen2_moe_experts": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "gpt_oss_experts": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "llama4_experts": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
}
every_family = pytest.mark.parametrize("family", list(FAMILIES))


def pair(family, target_modules=None, dtype=torch.float32, **lora):
    """(PeftModel, an untouched copy of its base), in eval mode."""
    make_config, targets = FAMILIES[family]
    base = random_model(make_config(), dtype).eval()
    config = lora_config(
        r=2,
        target_modules=target_modules or targets,
        target_parameters=PARAMETERS.get(family),
        task_type="SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM",
        **lora,
    )
    return get_peft_model(copy.deepcopy(base), config).eval(), base


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_batches((4,), seed=9)[0]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_family
def test_the_logits_are_the_bases_bit_for_bit(family, dtype):
    model, base = pair(family, dtype=dtype)
    report = initialize_lora_ga(model, tiny_batches(), CONFIG, disable_tqdm=True)
    assert torch.equal(logits(model), logits(base))
    layers = model.lora_ga.weights
    assert report.alignment.keys() == layers.keys()
    for (
        name,
        layer,
    ) in layers.items():  # A takes the first r pairs; few tokens reach some experts, gates have one output
        assert layer.A.frozen.any(dim=-1).all(), name
        assert layer.B.frozen.any() == (len(report.singular_values[name]) > layer.rank), name
    experts = {name for name, parameter in base.named_parameters() if parameter.dim() == 3 and "experts" in name}
    if model.peft_config["default"].target_parameters:
        assert experts and {
            f"base_model.model.{name}" for name in experts
        } <= layers.keys() == report.experts.keys() | {name for name, layer in layers.items() if layer.experts == 1}
    elif FAMILIES[family][1] == "all-linear":  # really all of them, but the head
        linear = [
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        ]
        left_out = {name for name in linear if f"base_model.model.{name}" not in layers}
        assert {name.split(".")[-1] for name in left_out} == {"lm_head"}


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@every_family
def test_the_gradient_of_every_target_is_autograds(family, checkpointing):
    model, base = pair(family)
    batches = tiny_batches((3, 5))
    found = estimated_gradients(checkpointed(model, checkpointing), batches)
    # float32 through two layers, summed in another order
    assert largest_relative_error(found, dense_reference.autograd_gradients(base, found, batches)) < 1e-5


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
@every_family
def test_it_resumes_and_stock_peft_loads_and_merges_what_was_trained(family, offset, tmp_path):
    model, base = pair(family)
    base.save_pretrained(tmp_path / "base")
    batches = tiny_batches()
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact", ga_offset=offset)
    initialize_lora_ga(model, batches, config, disable_tqdm=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    resumed, _ = pair(family)
    attach_lora_ga(resumed, config)
    resumed.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    of_resumed = dict(resumed.named_parameters())
    assert all(torch.equal(value, of_resumed[name]) for name, value in model.named_parameters())

    trained, untrained = logits(model), logits(base)
    # float32 through a few layers; PEFT's scaling can differ in the last place, and merging rounds once more
    tolerance = 1e-5 * untrained.abs().max()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert (logits(loaded) - trained).abs().max() < tolerance
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, base_model=tmp_path / "base")
    merged = type(base).from_pretrained(tmp_path / "merged")
    assert (logits(merged) - trained).abs().max() < tolerance
    assert (trained - untrained).abs().max() > 1000 * tolerance, "training changed nothing, so this shows nothing"


# --- what is refused, by name and with what to do instead --------------------------------------------------------------

IDLE_EXPERTS = SwitchTransformersConfig(
    vocab_size=VOCABULARY, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=4,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=40, decoder_start_token_id=0,
)  # fmt: skip
"""Forty experts a layer, for fewer tokens than that."""
LLAMA4 = Llama4TextConfig(**GROUPED, intermediate_size_mlp=40, num_local_experts=4, moe_layers=[1])


def test_a_router_that_also_says_which_experts_is_refused():
    """PEFT itself could not run a LoRA on it. The model still computes the base function, and takes another adapter."""
    base = random_model(LLAMA4).eval()
    model = get_peft_model(copy.deepcopy(base), lora_config(r=2, task_type=None))
    with pytest.raises(
        ValueError, match=r"layers.1.feed_forward.router: its forward returns a tuple .*exclude_modules=\['router'\]"
    ):
        initialize_lora_ga(model, tiny_batches((2,)), CONFIG, disable_tqdm=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    again = get_peft_model(model.unload(), lora_config(r=2, task_type=None, exclude_modules=["router"]))
    initialize_lora_ga(again, tiny_batches((2,)), CONFIG, disable_tqdm=True)
    assert torch.equal(logits(again), logits(base))


# --- what some rows do not reach ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "lora", "idle"),
    [
        # its weight is read as a bare one, so in PEFT a LoRA on it does nothing at all
        (FAMILIES["mamba"][0](), {"target_modules": ["in_proj", "dt_proj"]}, r"layers\.\d\.mixer\.dt_proj"),
        (IDLE_EXPERTS, {}, r"experts\.expert_\d+\.w[io]"),
    ],
    ids=["mamba", "idle experts"],
)
def test_what_no_row_gives_a_gradient_starts_as_in_lora(config, lora, idle):
    base = random_model(config).eval()
    model = get_peft_model(copy.deepcopy(base), lora_config(r=2, task_type=None, **lora))
    report = initialize_lora_ga(model, tiny_batches((2,)), CONFIG, disable_tqdm=True)
    assert torch.equal(logits(model), logits(base))
    assert report.idle and all(re.search(idle, name) for name in report.idle)
    assert report.alignment.keys() | set(report.idle) == model.lora_ga.weights.keys()
    for name in report.idle:
        weight = model.lora_ga.weights[name]
        assert weight.A.frozen.any(dim=1).all() and not weight.B.frozen.any()
