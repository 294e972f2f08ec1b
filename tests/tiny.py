"""Tiny models and data that the tests, and the processes they launch, build from. Nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
import string

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 64

CONFIGS = {
    # hidden sizes that are not multiples of each other, so that a transposed shape cannot go unnoticed
    "llama": lambda: LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=False,
    ),
    "llama_tied": lambda: LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=True,
    ),
    "gpt2": lambda: GPT2Config(  # Conv1D: weights are stored I×O; dropout on, as GPT-2 comes
        n_embd=48, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=1, eos_token_id=2,
    ),
    "qwen2": lambda: Qwen2Config(  # biases on q, k, v
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, attention_dropout=0.1,
    ),
}  # fmt: skip
MIXTURE = {
    "mixture": lambda: Qwen3MoeConfig(  # its router's loss weighs as much as the tokens'
        hidden_size=48, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, num_experts=4, num_experts_per_tok=2, vocab_size=VOCABULARY,
        router_aux_loss_coef=0.5, output_router_logits=True,
    ),
}  # fmt: skip


def tiny_t5(dropout_rate: float = 0.1) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(  # 10 = d_kv, so that no layer is square
        d_model=48, d_kv=10, d_ff=80, num_layers=2, num_heads=4, vocab_size=VOCABULARY, dropout_rate=dropout_rate,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32):
    return random_model((CONFIGS | MIXTURE)[family](), dtype)


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # from_config leaves biases at zero, where a lost bias would not show
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def tiny_batches(sizes=(4, 4), length: int = 20, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches with prompts masked out; the same sum(sizes) examples however they are split."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(sum(sizes)):
        prompt, completion = torch.randint(2, 6, (2,), generator=generator).tolist()
        ids = torch.randint(3, VOCABULARY, (prompt + 2 * completion,), generator=generator)
        padding = length - len(ids)
        examples.append(
            {
                "input_ids": torch.cat([ids, torch.zeros(padding, dtype=torch.long)]),
                "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
                "labels": torch.tensor([-100] * prompt + ids[prompt:].tolist() + [-100] * padding),
            }
        )
    batches, start = [], 0
    for size in sizes:
        chunk = examples[start : start + size]
        batches.append({key: torch.stack([example[key] for example in chunk]) for key in chunk[0]})
        start += size
    return batches


def lora_config(**overrides) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | overrides
    )


def peft_pair(family: str = "llama", dtype: torch.dtype = torch.float32, **lora):
    """(PeftModel, an untouched copy of its base), both in eval mode."""
    base = tiny_model(family, dtype).eval()
    return get_peft_model(copy.deepcopy(base), lora_config(**lora)).eval(), base


def moved_at_random(model) -> None:
    """Take what trains as far from its start as much training would."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)


def word_tokenizer(last_words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """w0, w1, …; `last_words` take the place of the last of them."""
    words = [*(f"w{i}" for i in range(VOCABULARY - 4 - len(last_words))), *last_words]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    characters = string.ascii_lowercase + string.digits + " \n`_()[]=*/+-:,.#'\""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    assert len(vocabulary) <= VOCABULARY
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def word_problems() -> Dataset:
    """24 prompt/completion pairs of different lengths."""
    generator = torch.Generator().manual_seed(2)

    def words(count):
        return " ".join(f"w{i}" for i in torch.randint(0, VOCABULARY - 4, (count,), generator=generator).tolist())

    return Dataset.from_list([{"prompt": words(3 + i % 3) + " ", "completion": words(4 + i % 5)} for i in range(24)])


def seq2seq_problems() -> Dataset:
    """`word_problems`, tokenized for an encoder-decoder; all but the padding of `labels`, which the collator adds."""
    tokenizer = word_tokenizer()

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        return {
            "input_ids": tokenizer(row["prompt"])["input_ids"],
            "attention_mask": tokenizer(row["prompt"])["attention_mask"],
            "labels": tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id],
        }

    return word_problems().map(tokenize, remove_columns=["prompt", "completion"])


def sft_arguments(output_dir, **overrides) -> dict:
    """Keyword arguments of a `LoRAGASFTConfig` for a few steps on the CPU."""
    return {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "ga_num_samples": 8,
    } | overrides
