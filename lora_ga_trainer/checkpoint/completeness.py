"""Which checkpoints are whole: a list of their files tells.

A run may be killed at any moment, also while it saves. `lora_ga_files.json` is written when every process has written all of
its files, and names them with their sizes; only `trainer_state.json` comes after it. A `checkpoint-N` without both is
half-written, or was not made to be resumed.
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
    """Find out now, not at the first checkpoint, whether files can be made in `output_dir`; by trying, since root may do more.

    Raises:
        ValueError: they cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"?")
    except OSError as error:
        raise ValueError(
            f"`output_dir` is {output_dir}, but no file can be written there ({error}). Choose another folder, or mend its "
            "rights."
        ) from error


def remove_former(directory: Path) -> None:
    """To be called before anything is written to `directory`, where an earlier run may have left a checkpoint.

    The list goes first, so that what is left of a killed removal is incomplete; all of the rest goes too, since nothing of
    an old checkpoint may pass for a part of the new one.
    """
    (directory / FILES_FILE).unlink(missing_ok=True)
    if directory.is_dir():
        shutil.rmtree(directory)


def mark_complete(directory: Path) -> None:
    """To be called when every process has written its files; the list is whole or absent."""
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
        ValueError: it is none, or a file is missing or has another size than when it was saved.
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
            "with `save_only_model`, or is not one of a LoRA-GA trainer. Resume from another checkpoint; "
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
                "checkpoint is not complete. Resume from another one, or copy the file again from where it came."
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
                logger.warning(f"Passing over an incomplete checkpoint. {error}")
        else:
            return steps[step]
    raise ValueError(
        f"{output_dir} has no complete checkpoint to resume from, {len(steps)} incomplete. Start from the beginning: leave out "
        "`resume_from_checkpoint`."
    )


def check_can_resume(adapter: LoRAGAAdapter, directory: Path, launch: Launch) -> None:
    """Check all that can be known before anything is loaded: `directory` is whole and belongs to this run.

    Raises:
        ValueError: it is not complete, has other LoRA or `ga_*` settings, does not fit the model, or was saved by a launch
            whose optimizer state this one cannot read; or DeepSpeed would not find it.
    """
    check_complete(directory)
    saved = check_adapter(adapter, adapter_directory(directory, adapter.name))
    if saved.launch is None:
        raise ValueError(
            f"{directory} was saved by a loop of one's own, not by a LoRA-GA trainer, so there is no optimizer state to go on "
            "from. Resume from a `checkpoint-N` that a trainer wrote."
        )
    check_resumable_launch(saved.launch, launch)
    check_resume_path(launch, directory)
    if saved.launch != launch and rank() == 0:
        logger.warning(
            f"{directory} was saved by {saved.launch}, this is {launch}: training goes on from its weights and optimizer "
            "state, but with the examples dealt out differently, so not to the same numbers."
        )
