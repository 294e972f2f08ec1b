"""Greedy completions of many prompts: in batches, on all processes, written down as they come.

lm-eval-harness is not used: a model in memory it evaluates in one process only (lm_eval 0.4.13, `HFLM.__init__`).
"""

from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..backends import compute_device, gather_objects, rank, world_size
from .results import append_lines, finished_lines


def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, str],
    file: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_strings: tuple[str, ...] = (),
) -> dict[str, str]:
    """The greedy completion of each prompt, by id, without special tokens. Every process calls it and gets all of them.

    Finished completions are appended to `file` on the main process. Called again, it takes from there what has the same
    prompt, so that an interrupted evaluation goes on.

    Args:
        file: JSONL of `id`, `prompt`, `completion`.
        batch_size: prompts at a time on each process; padded on the left.
        stop_strings: a completion ends before the first of these that it contains.
    """
    known = finished_lines(file) if rank() == 0 else None
    found = {
        record["id"]: record["completion"]
        for record in gather_objects(known)[0]
        if prompts.get(record["id"]) == record["prompt"]
    }
    # The longest first: neighbours need little padding, and what is too large for the memory fails at once.
    waiting = sorted(prompts.keys() - found.keys(), key=lambda name: (-len(prompts[name]), name))
    of_all = batch_size * world_size()
    progress = tqdm(
        total=len(prompts), initial=len(found), desc=f"Generating {file.stem}", unit="answer", disable=rank() != 0
    )
    with progress:
        for start in range(0, len(waiting), of_all):
            # Sharded weights are gathered by all processes together, so one without a prompt left answers an old one again.
            mine = waiting[start + rank() : start + of_all : world_size()]
            texts = generate(
                model, tokenizer, [prompts[name] for name in mine or waiting[:1]], max_new_tokens, stop_strings
            )
            records = [
                {"id": name, "prompt": prompts[name], "completion": text}
                for name, text in zip(mine, texts[: len(mine)], strict=True)
            ]
            new = [record for of_process in gather_objects(records) for record in of_process]
            if rank() == 0:
                append_lines(file, new)
            found |= {record["id"]: record["completion"] for record in new}
            progress.update(len(new))
    return {name: found[name] for name in prompts}


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    stop_strings: tuple[str, ...] = (),
) -> list[str]:
    """The greedy completion of each prompt, in one batch. The model's modes and the tokenizer come out as they were."""
    was_training = model.training
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs = inputs.to(compute_device(next(model.parameters())))
    until = {"stop_strings": list(stop_strings), "tokenizer": tokenizer} if stop_strings else {}
    try:
        model.eval()
        with torch.no_grad():
            outputs = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                **until,
            )
    finally:
        model.train(was_training)
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [before_stop(text, stop_strings) for text in texts]


def before_stop(text: str, stop_strings: tuple[str, ...]) -> str:
    """
    >>> before_stop("return 1\\n``` done ```", ("```",))
    'return 1\\n'
    """
    return text[: min((text.find(stop) for stop in stop_strings if stop in text), default=len(text))]
