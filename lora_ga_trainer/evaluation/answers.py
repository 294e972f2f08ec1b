"""Many questions, answered in batches, on all processes, and written down as they come."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..distributed.backends import gather_objects, rank, world_size
from .results import append_lines, finished_lines


def answer_all(
    prompts: dict[str, str], answer: Callable[[list[str]], list[Any]], file: Path, batch_size: int
) -> dict[str, Any]:
    """`answer` to each prompt, by id. Every process calls it and gets all of them.

    Finished answers are appended to `file` on the main process. Called again, it takes from there what has the same prompt,
    so that an interrupted evaluation goes on.

    Args:
        answer: from a batch of prompts to as many answers, which JSON can hold.
        file: JSONL of `id`, `prompt`, `answer`.
        batch_size: prompts at a time on each process.
    """
    known = finished_lines(file) if rank() == 0 else None
    found = {
        record["id"]: record["answer"]
        for record in gather_objects(known)[0]
        if prompts.get(record["id"]) == record["prompt"]
    }
    # The longest first: neighbours need little padding, and what is too large for the memory fails at once.
    waiting = sorted(prompts.keys() - found.keys(), key=lambda name: (-len(prompts[name]), name))
    of_all = batch_size * world_size()
    with tqdm(
        total=len(prompts), initial=len(found), desc=file.stem.replace("_", " "), unit="answer", disable=rank() != 0
    ) as progress:
        for start in range(0, len(waiting), of_all):
            # Sharded weights are gathered by all processes together: one without a prompt left answers an old one again.
            mine = waiting[start + rank() : start + of_all : world_size()]
            answers = answer([prompts[name] for name in mine or waiting[:1]])
            records = [
                {"id": name, "prompt": prompts[name], "answer": text}
                for name, text in zip(mine, answers[: len(mine)], strict=True)
            ]
            new = [record for of_process in gather_objects(records) for record in of_process]
            if rank() == 0:
                append_lines(file, new)
            found |= {record["id"]: record["answer"] for record in new}
            progress.update(len(new))
    return {name: found[name] for name in prompts}
