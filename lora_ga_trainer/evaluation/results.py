"""Where an evaluation keeps its files, and what tells it from another one.

PARENT/gsm8k-1f3a9c02/     one folder for one benchmark of one model with one set of options
    settings.json          what was asked, and the digest of the weights
    *.jsonl                what is finished so far; an interrupted evaluation goes on from there
    results.json           the score and every prediction, written last
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..compatibility import sha256
from ..distributed.backends import gather_objects, rank
from .arguments import EvaluationArguments


def weights_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of the `.safetensors` files in `directory`, and what its configuration says of them.

    Raises:
        ValueError: there is none.
    """
    digest = hashlib.sha256()
    for path in (directory / "adapter_config.json", directory / "config.json"):
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            known = {
                name: value
                for name, value in config.items()
                if name not in ("base_model_name_or_path", "_name_or_path")
            }
            digest.update(json.dumps(known, sort_keys=True).encode())
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has no .safetensors file, so it holds no weights. Check the path.")
    for path in files:
        digest.update(path.name.encode())
        digest.update(sha256(path))
    return digest.hexdigest()


def evaluation_settings(model: dict[str, Any], args: EvaluationArguments) -> dict[str, Any]:
    """What the answers depend on: `model` says which weights, `args` how the benchmark asks.

    The content of `evaluation_file` counts, not its name.
    """
    options = {option.name: getattr(args, option.name) for option in fields(args)}
    settings = model | {name: value for name, value in options.items() if name not in args.NO_ANSWER_DEPENDS_ON}
    if args.evaluation_file is not None:
        path = Path(args.evaluation_file)
        if not path.is_file():
            raise ValueError(f"`evaluation_file` is {path}, but there is no such file. Check the path.")
        settings["evaluation_file"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return settings


def open_evaluation(parent: Path, benchmark: str, settings: dict[str, Any]) -> Path:
    """The folder for `benchmark` with these `settings`, made or found again on the main process. All processes call it."""
    text = json.dumps(settings, indent=2, sort_keys=True)
    directory = parent / f"{benchmark}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / "settings.json", text + "\n")
    return gather_objects(directory)[0]


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """`results.json`, by the main process; whole or absent."""
    if rank() == 0:
        write_whole(directory / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`; a kill leaves what was there before."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append `records` to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def finished_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file that was appended to; [] if there is none.

    A kill in the middle of a line leaves a part of it at the end, which is cut off here.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
