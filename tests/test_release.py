"""What a release says of itself is true: the public names, the versions, the commands that continuous integration runs."""

import configparser
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

import lora_ga_trainer
from lora_ga_trainer.checkpoint import export
from lora_ga_trainer.checkpoint.adapter_files import FROZEN_FILE
from lora_ga_trainer.checkpoint.completeness import FILES_FILE
from lora_ga_trainer.checkpoint.state import STATE_FILE
from lora_ga_trainer.initialization import attach_lora_ga

REPOSITORY = Path(__file__).resolve().parents[1]
BEYOND_ALL = {
    f"{export.__module__.rpartition('.')[0]}.export",
    f"{attach_lora_ga.__module__.rpartition('.')[0]}.attach_lora_ga",
}
"""Public, but not among the names of the package itself."""


def text(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read_string(text("setup.cfg"))
    return config


def section(title: str) -> str:
    """That part of docs/api_stability.md."""
    _, _, rest = text("docs/api_stability.md").partition(f"\n## {title}\n")
    return rest.partition("\n## ")[0]


# --- what is public -------------------------------------------------------------------------------------------------


def test_the_public_names():
    documented = set(re.findall(r"`(lora_ga_trainer\.[\w.]+)`", section("From Python")))
    assert documented == {f"lora_ga_trainer.{name}" for name in lora_ga_trainer.__all__} | BEYOND_ALL


def test_the_public_options():
    assert set(re.findall(r"`(ga_\w+)`", section("Options"))) == {
        option.name for option in fields(lora_ga_trainer.LoRAGAArguments)
    }


def test_the_public_commands():
    config = setup_cfg()
    scripts = config.get("options.entry_points", "console_scripts", fallback="")
    modules = {path.parent.relative_to(REPOSITORY) for path in REPOSITORY.glob("lora_ga_trainer/**/__main__.py")}
    commands = {line.partition(" = ")[0] for line in scripts.splitlines() if line}
    commands |= {f"python -m {'.'.join(path.parts)}" for path in modules}
    assert set(re.findall(r"^\| `([^`]+)` \|$", section("Command line"), re.MULTILINE)) == commands


def test_the_public_files():
    documented = set(re.findall(r"`([\w.]+\.(?:json|safetensors|tensors))`", section("Files")))
    assert documented == {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, FROZEN_FILE, STATE_FILE, FILES_FILE}


# --- versions -------------------------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## \[(\d[^\]]*)\]", text("CHANGELOG.md"), re.MULTILINE)
    assert newest[1] == lora_ga_trainer.__version__
    assert yaml.safe_load(text("CITATION.cff"))["version"] == lora_ga_trainer.__version__


def lower_bounds() -> dict[str, str]:
    printed = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/lower_bounds.py")], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split("==") for line in printed.splitlines())


def test_the_lower_bounds_are_the_lowest_that_setup_cfg_admits():
    requirements = [Requirement(line) for line in setup_cfg()["options"]["install_requires"].split("\n")[1:]
                    if not line.startswith("#")]  # fmt: skip
    found = lower_bounds()
    assert list(found) == [requirement.name for requirement in requirements]
    for requirement in requirements:
        assert found[requirement.name] in requirement.specifier
        assert {Version(bound.version) for bound in requirement.specifier if bound.operator == ">="} == {
            Version(found[requirement.name])
        }
        pinned = re.search(rf"^{requirement.name}==(.+)$", text("constraints.txt"), re.MULTILINE)
        assert pinned[1] in requirement.specifier  # what everything else is tested on


def test_a_requirement_without_a_lower_bound_is_an_error(tmp_path):
    sys.path.insert(0, str(REPOSITORY / "tools"))
    try:
        from lower_bounds import lower_bounds
    finally:
        sys.path.pop(0)
    (tmp_path / "setup.cfg").write_text("[options]\ninstall_requires =\n    torch>=2.13,<3\n    numpy<3\n")
    with pytest.raises(ValueError, match="'numpy<3' in .* has no lower bound"):
        lower_bounds(tmp_path / "setup.cfg")


def jobs() -> list[dict[str, str]]:
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    return workflow["jobs"]["make"]["strategy"]["matrix"]["include"]


def test_the_oldest_and_the_newest_python_are_tested():
    config = setup_cfg()
    oldest = config["options"]["python_requires"].removeprefix(">=")
    named = re.findall(r"Python :: (3\.\d+)$", config["metadata"]["classifiers"], re.MULTILINE)
    assert named == sorted(named, key=Version) and named[0] == oldest
    pythons = {job["target"]: job.get("python") for job in jobs()}
    assert (pythons["test-lower-bounds"], pythons["test-latest"]) == (oldest, named[-1])
    assert f'python_version = "{oldest}"' in text("pyproject.toml")
    assert f'target-version = "py{oldest.replace(".", "")}"' in text("pyproject.toml")


# --- continuous integration -----------------------------------------------------------------------------------------


def test_every_job_is_a_target_of_the_makefile():
    asked = {job["target"] for job in jobs()}
    targets = set(re.search(r"^\.PHONY: (.+)$", text("Makefile"), re.MULTILINE)[1].split())
    assert asked <= targets and {
        "lint", "test-one-process", "test-two-processes", "test-lower-bounds", "test-latest", "package",
    } <= asked  # fmt: skip


def files_of(target: str) -> tuple[list[str], list[str]]:
    """The test files that `make TARGET` names to run, and those it ignores."""
    dry = subprocess.run(
        ["make", "--dry-run", target], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"(?<!=)(tests/test_\w+\.py)", dry), re.findall(r"--ignore=(\S+)", dry)


def test_the_two_halves_are_the_whole_suite():
    """What `make test-two-processes` runs and `make test-one-process` leaves out: the files that launch."""
    run, _ = files_of("test-two-processes")
    _, ignored = files_of("test-one-process")
    assert sorted(ignored) == sorted(run) and "tests/test_backends.py" in run


def test_the_quick_part_launches_nothing_and_loads_no_real_model():
    quick, _ = files_of("test-quick")
    launching, _ = files_of("test-two-processes")
    assert len(quick) > 10 and all((REPOSITORY / name).is_file() for name in quick)
    assert not {*launching, "tests/test_real_model.py"} & set(quick)


def test_one_version_of_each_linter():
    pinned = dict(line.split("==") for line in text("constraints.txt").splitlines() if "==" in line)
    (ruff,) = [repo for repo in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"] if "ruff" in repo["repo"]]
    assert ruff["rev"] == f"v{pinned['ruff']}"
    assert installed_version("pytest") in Requirement("pytest>=9,<10").specifier and {"mypy", "types-tqdm"} <= set(
        pinned
    )
