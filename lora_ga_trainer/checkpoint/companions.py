"""The files next to a model's or an adapter's weights: which are exported with them, and which are left out.

A tokenizer or processor may save a file of any name, so the exclusions are listed: weights, and what training writes.
"""

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from transformers.utils import CHAT_TEMPLATE_DIR

OF_MODEL = ("config.json", "generation_config.json")
OTHER_WEIGHTS = (
    "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data",
    "*.tflite", "*.mlmodel", "*.npz", "*.distcp",
)  # fmt: skip
"""Weights and states in formats that are not read here, including optimizers, schedules and random states."""
WEIGHTS = (*OTHER_WEIGHTS, "*.safetensors", "*.safetensors.index.json", "adapter_config.json")
OF_TRAINING = (
    "lora_ga.*", "lora_ga_files.json*", "trainer_state.json", "*_results.json", "latest", "zero_to_fp32.py",
    "*.jsonl", "*.csv", "*.parquet", "*.log", "index.html", "*.png",
)  # fmt: skip
DESCRIPTIONS = ("README.md", ".*")
"""A card describes only the folder that it was written for, and hidden files belong to it."""


def companions(directory: Path) -> list[Path]:
    """The files in `directory` to export with its weights, as relative paths, without those of the model itself (`OF_MODEL`).

    Subfolders count only if they hold chat templates, or further tokenizers of a processor.
    """
    folders = [directory, directory / CHAT_TEMPLATE_DIR]
    for config in directory.glob("*/tokenizer_config.json"):
        if not any(_matches(path.name, WEIGHTS) for path in config.parent.iterdir()):  # no checkpoint, no other adapter
            folders.append(config.parent)
    return [
        path.relative_to(directory)
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.is_file() and not _matches(path.name, (*OF_MODEL, *WEIGHTS, *OF_TRAINING, *DESCRIPTIONS))
    ]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def copy_files(source: Path, names: list[Path], target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)
