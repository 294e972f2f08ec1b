"""The small encoder-decoder that the GLUE demo trains: a T5 with random weights, since a trained one needs a hub."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from data.demo_model import made_once
from data.glue_tasks import TASKS, prompt_of
from data.movie_phrases import movie_phrases


def demo_t5_path() -> str:
    """A folder with a T5 of 2 + 2 layers and width 128, and its tokenizer, for `from_pretrained`.

    Made at the first call and kept under `$XDG_CACHE_HOME/lora_ga_trainer`, by default `~/.cache/lora_ga_trainer`. It is
    untrained, so everything it learns in the demo is in its adapter.
    """
    return made_once("random-t5", _make)


def _make(folder: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    random_t5(len(tokenizer)).save_pretrained(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The words of the stand-in, its instruction and its labels."""
    task = TASKS["sst2"]
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [prompt_of(task, row) for row in movie_phrases(2000, seed=0)]
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    core.train_from_iterator([*texts, *task.label_words], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def random_t5(vocabulary: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=vocabulary, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(config)
