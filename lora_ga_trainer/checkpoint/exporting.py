"""From a checkpoint to a release: the adapter alone, in a form that its reader needs, or the base model with it merged in.

It takes one process, no trainer, and no model in memory: see `merging`.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig
from transformers import AutoConfig, PreTrainedConfig

from .companions import OTHER_WEIGHTS, companions, copy_files
from .mergeable import check_mergeable
from .merging import write_merged
from .pairs import Pairs, pairs_of_modules, pairs_on
from .portable import AdapterFile, Lost, at_rank, check_pairs, fold_scaling, in_plain_form, read_adapter


def export(
    checkpoint_dir: str | Path,
    out: str | Path,
    merge: bool = False,
    *,
    base_model: str | Path | None = None,
    rank: int | None = None,
    fold_scale: bool = False,
) -> dict[str, Lost]:
    """Write the adapter of `checkpoint_dir`, or the base model with it merged in, to the new folder `out`.

    `out` appears once everything is written, or not at all. It includes what a tokenizer or processor saved. The adapter's
    scaling is in plain form (α/r, no rsLoRA), whatever version saved it.

    Args:
        checkpoint_dir: a `checkpoint-N`, the folder that `save_model` wrote, or any LoRA adapter for linear layers.
        out: must be empty or not exist.
        merge: W0 + s·lora_B·lora_A, summed in float32 and rounded once to the dtype of W0, in the base's own files. Where
            memory and files name or hold weights otherwise (a mixture's experts, many vision-language models), PEFT merges in
            the dtype of W0, with the whole model in memory.
        base_model: folder or hub name of the untouched base model, for `merge`. Default: the one that the adapter names. Its
            configuration is read for `rank` and `fold_scale` of adapted parameters, too.
        rank: of the exported adapter, less than the file's: in each layer the best approximation of what was trained.
        fold_scale: multiply B by the scaling, so that `lora_alpha` is `r`, for readers that know nothing else.

    Returns:
        What each adapted weight loses at the `rank`, by its name in the model; empty without one.

    Raises:
        ValueError: `out` is not empty, a file is missing or damaged, or the adapter cannot be merged into the files of
            this base model (quantized, not in safetensors, other layers or shapes), or into any (see `check_mergeable`), or
            cannot be given the `rank` or another scaling (see `portable`).
    """
    checkpoint_dir, out = Path(checkpoint_dir), Path(out)
    adapter = read_adapter(checkpoint_dir)
    lost: dict[str, Lost] = {}
    is_plain = adapter.config is None or not adapter.config.use_rslora
    if rank is not None or fold_scale:
        check_pairs(adapter)
    if rank is not None or fold_scale or not is_plain:
        pairs = pairs_of(adapter, checkpoint_dir, base_model)
        if not is_plain:
            adapter = in_plain_form(adapter, pairs)
        if rank is not None:
            adapter, lost = at_rank(adapter, pairs, rank)
        if fold_scale:
            adapter = fold_scaling(adapter, pairs)
    with complete_or_absent(out) as directory:
        if merge:
            check_mergeable(adapter.document)
            assert adapter.config is not None  # only a LoRA has passed
            source = base_of(checkpoint_dir, base_model)
            with tempfile.TemporaryDirectory() as folder:
                adapter.write(Path(folder))
                write_merged(source, directory, adapter.tensors, adapter.config, Path(folder))
        else:
            adapter.write(directory)
        copy_files(
            checkpoint_dir, companions(checkpoint_dir), directory
        )  # overwrites the base's files of the same names
    return lost


def pairs_of(adapter: AdapterFile, checkpoint_dir: Path, base_model: str | Path | None) -> dict[str, Pairs]:
    """
    Raises:
        ValueError: the adapter has adapted parameters, and its base model is unknown, not found or another one.
    """
    assert adapter.config is not None  # it is a LoRA
    if not adapter.config.target_parameters:
        return pairs_of_modules(adapter.modules)
    return pairs_on(configuration_of_base(checkpoint_dir, base_model), adapter.config, adapter.shapes)


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """Yields a folder near `out` that becomes `out` on success and vanishes on failure.

    Raises:
        ValueError: `out` exists already and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already. Choose another folder, or remove it.")
    beside = next(folder for folder in out.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{out.name}.") as temporary:
        directory = Path(temporary, out.name)
        directory.mkdir()
        yield directory
        out.parent.mkdir(parents=True, exist_ok=True)
        directory.replace(out)


def base_of(checkpoint_dir: Path, base_model: str | Path | None) -> Path:
    """The folder of `base_model`, or of the base that the adapter in `checkpoint_dir` names, at the revision that it names.

    Raises:
        ValueError: it is unknown, not found, or not in safetensors.
    """
    return base_directory(*name_of_base(checkpoint_dir, base_model))


def configuration_of_base(checkpoint_dir: Path, base_model: str | Path | None) -> PreTrainedConfig:
    """Of the same base, of which nothing else is downloaded.

    Raises:
        ValueError: it is unknown or not found.
    """
    name, revision = name_of_base(checkpoint_dir, base_model)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The base model {name} has no configuration here nor on the hub ({error}). Pass `base_model`."
        ) from error


def name_of_base(checkpoint_dir: Path, base_model: str | Path | None) -> tuple[str | Path, str | None]:
    """(`base_model`, or what the adapter in `checkpoint_dir` names; the revision that it names).

    Raises:
        ValueError: it is unknown.
    """
    if base_model:
        return base_model, None
    config = LoraConfig.from_pretrained(checkpoint_dir)
    if not config.base_model_name_or_path:
        raise ValueError("The adapter does not name its base model. Pass `base_model`.")
    return config.base_model_name_or_path, config.revision


def base_directory(base_model: str | Path, revision: str | None) -> Path:
    """The folder with the base model's files, downloaded from the hub at its `revision` if necessary.

    Raises:
        ValueError: it is not found, or not in safetensors.
    """
    directory = Path(base_model)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(str(base_model), revision=revision, ignore_patterns=[*OTHER_WEIGHTS]))
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
            raise ValueError(
                f"The base model {base_model} is neither a folder nor available from the hub ({error}). Pass `base_model`."
            ) from error
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"{directory} has no .safetensors file, and no other format is read. Save the base model again with transformers' "
            "`save_pretrained`."
        )
    return directory
