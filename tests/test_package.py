"""The wheel and the source distribution: built from a copy of what a release consists of, looked into, installed and run."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import lora_ga_trainer

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = ["pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"]
KEPT_OUT = ["tests", "recipes", "benchmarks", "tools"]
BASE = f"lora_ga_trainer-{lora_ga_trainer.__version__}"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """dist/ with both, the wheel built from the source distribution, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("release")
    for name in NEEDED:
        shutil.copy(REPOSITORY / name, folder)
    for name in ("lora_ga_trainer", *KEPT_OUT):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    # without a build environment of its own, which would be fetched
    command = [sys.executable, "-m", "build", "--no-isolation"]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / "dist"


def package_files() -> set[str]:
    """Every file of the package in the repository; all of them are needed."""
    folder = REPOSITORY / "lora_ga_trainer"
    files = {path.relative_to(REPOSITORY).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if "__pycache__" not in name}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built / f"{BASE}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        assert wheel.read(f"{BASE}.dist-info/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()
    package = {name for name in names if not name.startswith(f"{BASE}.dist-info/")}
    assert package == package_files()
    assert "lora_ga_trainer/py.typed" in package


def test_the_source_distribution_builds_and_has_no_tests(built):
    with tarfile.open(built / f"{BASE}.tar.gz") as archive:
        names = {name.removeprefix(f"{BASE}/") for name in archive.getnames()}
    assert package_files() | set(NEEDED) <= names
    assert not [name for name in names if name.split("/")[0] in KEPT_OUT]


def test_the_metadata(built):
    with zipfile.ZipFile(built / f"{BASE}-py3-none-any.whl") as wheel:
        metadata = message_from_string(wheel.read(f"{BASE}.dist-info/METADATA").decode())
    assert metadata["Name"] == "lora_ga_trainer" and metadata["Version"] == lora_ga_trainer.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (REPOSITORY / "README.md").read_text(encoding="utf-8").strip()
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.split("<")[0].split(">")[0] for line in required} == {
        "torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "numpy", "tqdm", "huggingface_hub",
    }  # fmt: skip
    assert {"demo", "test", "eval", "deepspeed", "quant", "plot", "lint"} <= set(metadata.get_all("Provides-Extra"))


def test_the_installed_wheel_works(built, tmp_path):
    wheel = built / f"{BASE}-py3-none-any.whl"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=120)
    finished = subprocess.run(
        [sys.executable, "-P", str(REPOSITORY / "tools/tiny_run.py")],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    version, imported_from = finished.stdout.split()
    assert version == lora_ga_trainer.__version__
    assert Path(imported_from) == tmp_path / "lora_ga_trainer/__init__.py"
