"""Which checkpoints are complete, by a list of their files.

A run may be killed at any moment, even while it saves. `lora_ga_files.json` is written once every process has written all of
its files, and lists them with their sizes; only `trainer_state.json` comes after it. A `checkpoint-N` without both is
half-written, or was not meant to be resumed.
"""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ..adapter.adapter import LoRAGAAdapter
from ..distributed.backends import rank
from ..distributed.launches import Launch, check_resumable_launch, check_resume_path
from .adapter_files import adapter_directory, check_adapter
from .run_folder import checkpoints_of

logger = logging.getLogger(__name__)

FILES_FILE = "lora_ga_files.json"
NOT_LISTED = (FILES_FILE, TRAINER_STATE_NAME, "README.md")
"""`trainer_state.json` is written after the list, and checked by parsing it; a README may be edited."""


def check_writable(output_dir: Path) -> None:
    """Find out now, not at the first checkpoint, whether files can be created in `output_dir`. Try it: root may do more.

    Raises:
        ValueError: they cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"?")
    except OSError as error:
        raise ValueError(
            f"`output_dir` is {output_dir}, but no file can be written there ({error}). Choose another folder, or fix its "
            "permissions."
        ) from error


def remove_former(directory: Path) -> None:
    """Call this before anything is written to `directory`, where an earlier run may have left a checkpoint.

    The list is removed first, so that an interrupted removal leaves an incomplete checkpoint; then everything else, so that no
    part of an old checkpoint can pass for a part of the new one.
    """
    (directory / FILES_FILE).unlink(missing_ok=True)
    if directory.is_dir():
        shutil.rmtree(directory)


def mark_complete(directory: Path) -> None:
    """Call this once every process has written its files; the list is whole or absent."""
    sizes = {
        str(path.relative_to(directory)): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in NOT_LISTED
    }
    unfinished = directory / f"{FILES_FILE}.part"
    unfinished.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, directory / FILES_FILE)


def check_complete(directory: Path) -> None:
    """Check that `directory` is a whole checkpoint.

    Raises:
        ValueError: it is not one, or a file is missing or has changed in size since it was saved.
    """
    if not directory.is_dir():
        raise ValueError(f"There is no checkpoint {directory}. Check the path.")
    try:
        sizes = json.loads((directory / FILES_FILE).read_text(encoding="utf-8"))
        if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
            raise ValueError("it holds no sizes by name")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory} has no readable {FILES_FILE}, so it cannot be resumed: the run was killed while it saved, or saved "
            "with `save_only_model`, or no LoRA-GA trainer wrote it. Resume from another checkpoint; "
            "`resume_from_checkpoint=True` takes the last complete one."
        ) from error
    for name, size in sizes.items():
        path = directory / name
        if not _is_inside(name):
            raise ValueError(
                f"{directory / FILES_FILE} names {name!r}, which is not in the checkpoint's folder, so no LoRA-GA "
                "trainer wrote it. Do not trust this checkpoint."
            )
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(
                f"{path} {'is missing' if found is None else f'has {found:,} bytes'}, but {size:,} bytes were saved, so this "
                "checkpoint is not complete. Resume from another one, or copy the file again from its source."
            )
    try:
        json.loads((directory / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory / TRAINER_STATE_NAME} is missing or damaged ({error}), so this checkpoint is not complete. Resume "
            "from another one."
        ) from error


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def last_complete(output_dir: Path) -> Path:
    """The complete `checkpoint-N` in `output_dir` with the largest N.

    Raises:
        ValueError: there is none.
    """
    steps = checkpoints_of(output_dir)
    for step in sorted(steps, reverse=True):
        try:
            check_complete(steps[step])
        except ValueError as error:
            if rank() == 0:
                logger.warning(f"Skipping an incomplete checkpoint. {error}")
        else:
            return steps[step]
    incomplete = f", only {len(steps)} incomplete" if steps else ""
    raise ValueError(
        f"{output_dir} has no complete checkpoint to resume from{incomplete}. Start from the beginning: leave out "
        "`resume_from_checkpoint`."
    )


def check_can_resume(adapter: LoRAGAAdapter, directory: Path, launch: Launch) -> None:
    """Check everything possible before anything is loaded: `directory` is complete and belongs to this run.

    Raises:
        ValueError: it is not complete, has other LoRA or `ga_*` settings, does not fit the model, or was saved by a launch
            whose optimizer state this one cannot read; or DeepSpeed would not find it.
    """
    check_complete(directory)
    saved = check_adapter(adapter, adapter_directory(directory, adapter.name))
    if saved.launch is None:
        raise ValueError(
            f"{directory} was saved by a custom training loop, not by a LoRA-GA trainer, so there is no optimizer state to "
            "resume from. Resume from a `checkpoint-N` that a trainer wrote."
        )
    check_resumable_launch(saved.launch, launch)
    check_resume_path(launch, directory)
    if saved.launch != launch and rank() == 0:
        logger.warning(
            f"{directory} was saved by {saved.launch}, this is {launch}: training continues from its weights and optimizer "
            "state, but the examples are distributed differently, so the numbers will differ."
        )
