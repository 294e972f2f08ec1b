"""One run as a page: the results of the initialization, the growth of the factors, the losses."""

import json
import logging
from html import escape
from pathlib import Path
from typing import NamedTuple

from peft.utils import CONFIG_NAME

from ..checkpoint.model_card import settings
from ..checkpoint.run_folder import checkpoints_of, step_of
from ..checkpoint.state import LoRAGAState, read_state
from ..report import InitReport
from . import figures
from .norms import Norms, factor_norms
from .page import Picture, facts_table, figure_html, html_page, number_table
from .runs import STATE_FILE, Log, adapter_folder, check_folder, last_step, read_log

logger = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """A saved adapter."""

    adapter: Path
    state: LoRAGAState
    report: InitReport
    norms: Norms


def inspect(path: Path, out: Path) -> Path:
    """Draw the run in `path`, or up to the checkpoint `path`, into the folder `out`; returns the page.

    Raises:
        ValueError: `path` holds no LoRA-GA run; see `read_snapshots`.
        ModuleNotFoundError: matplotlib is missing.
    """
    snapshots = read_snapshots(path)
    last = snapshots[max(snapshots)]
    notes = []
    try:
        log = read_log(path)
    except ValueError as error:  # a custom training loop keeps none
        log = Log([])
        notes.append(str(error))
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(last.report, {step: found.norms for step, found in snapshots.items()}, log, out)
    if not last.report.singular_values:
        notes.append(
            f"{last.adapter / STATE_FILE} was written by a version that did not keep the gradients' singular values."
        )
    page = out / "index.html"
    page.write_text(
        html_page(f"LoRA-GA: {path.resolve().name}", sections(path, last, notes, pictures)), encoding="utf-8"
    )
    return page


def read_snapshots(path: Path) -> dict[int, Snapshot]:
    """By step, the readable checkpoints of the run `path`, or those up to the checkpoint `path`; else the adapter in `path`.

    Raises:
        ValueError: the folder is missing, nothing has been saved yet, or LoRA-GA did not make the adapter.
    """
    check_folder(path)
    step = step_of(path)
    if step is not None:
        folders = {n: folder for n, folder in checkpoints_of(path.resolve().parent).items() if n < step} | {step: path}
    else:
        folders = checkpoints_of(path)
        if not folders and adapter_folder(path) is not None:  # `save_model` at the end, or a custom training loop
            folders = {last_step(path): path}
    snapshots, problems = {}, []
    for n, folder in folders.items():
        adapter = adapter_folder(folder) or folder
        try:
            state = read_state(adapter)
            if state.report is None:
                raise ValueError(f"{adapter} was saved before its initialization, so there is nothing to draw.")
            snapshots[n] = Snapshot(adapter, state, state.report, factor_norms(adapter, state))
        except ValueError as error:  # half-written, or not one of ours
            problems.append(str(error))
    if not snapshots:
        check_is_ours(path, bool(folders))
        raise ValueError(f"{path} has no readable checkpoint: {problems[0]}")
    for problem in problems:
        logger.warning(f"Skipping a checkpoint. {problem}")
    return snapshots


def check_is_ours(path: Path, has_checkpoints: bool) -> None:
    """
    Raises:
        ValueError: `path` holds no checkpoint, or an adapter that LoRA-GA did not make.
    """
    configs = [*path.glob(CONFIG_NAME), *path.glob(f"*/{CONFIG_NAME}")]
    if configs and not any((config.parent / STATE_FILE).is_file() for config in configs):
        raise ValueError(
            f"{configs[0].parent} holds an adapter but no {STATE_FILE}, so it was not made by LoRA-GA, or was exported without "
            "it. Pass a `checkpoint-N` or the `output_dir` of a LoRA-GA run."
        )
    if not has_checkpoints:
        raise ValueError(
            f"{path} has no `checkpoint-N` and no adapter: the run has not started, or has not saved yet. Wait for its first "
            "checkpoint (`save_steps`), or pass the `output_dir` of another run."
        )


def draw(report: InitReport, norms: dict[int, Norms], log: Log, out: Path) -> list[Picture]:
    """Draw everything that is known and save it in `out`."""
    pictures = []

    def add(name: str, figure: figures.Figure, heading: str, caption: str) -> None:
        pictures.append(Picture(figures.save(figure, out / f"{name}.png"), heading, caption))

    label = "cos(G, B₀B₀ᵀG + GA₀ᵀA₀)"
    add(
        "alignment",
        figures.heat_map(report.alignment, "Alignment of the first step with the full gradient", label),
        "Alignment",
        "How much of each layer's gradient the adapter's first step can follow; 1 is all of it. A layer far below the others "
        "has a gradient of higher rank than 2r.",
    )
    if report.singular_values:
        add(
            "spectra",
            figures.spectra(report.singular_values, report.gradient_norm),
            "Spectra of the gradients",
            "The 2r singular values that A₀ and B₀ were taken from, as shares of the gradient's norm. A steep line means that "
            "r could be smaller, a flat one that a larger r would capture more.",
        )
        add(
            "gradient_norm",
            figures.heat_map(
                report.gradient_norm, "Norm of the gradient", "‖G‖ (loss in nats per token)", logarithmic=True
            ),
            "Norms of the gradients",
            "Frobenius norm of the mean gradient over the sampled tokens, with respect to the full weights; logarithmic.",
        )
    add(
        "norms",
        figures.norms_over_training(norms),
        "Factors over training",
        "A₀ and B₀ are frozen, dA and dB train from zero; one point per checkpoint. Without the offset there is no B₀.",
    )
    train, evaluation = log.curve("loss"), log.curve("eval_loss")
    if train.values or evaluation.values:
        add("loss", figures.loss_curve(train, evaluation), "Loss", "As logged by the trainer.")
    return pictures


def sections(path: Path, last: Snapshot, notes: list[str], pictures: list[Picture]) -> list[str]:
    """The page's parts as HTML."""
    state, report = last.state, last.report
    memory = "not measured" if report.extra_peak_bytes is None else f"{report.extra_peak_bytes / 2**20:,.1f} MiB extra"
    config = json.loads((last.adapter / CONFIG_NAME).read_text(encoding="utf-8"))
    facts = {
        "base model": config.get("base_model_name_or_path") or "made in memory",
        **{name: value.replace("`", "") for name, value in settings(state).items()},
    }
    took = {"layers": str(len(report.alignment)), "time": f"{report.seconds:,.2f} s", "peak memory": memory}
    if state.launch is not None:
        took["launched as"] = str(state.launch)
    if any(report.all_reduced_bytes):
        took["all-reduced per process"] = f"{sum(report.all_reduced_bytes) / 2**20:,.2f} MiB"
    return [
        f"<p class=note>{escape(str(path))}</p>",
        f"<div class=tables>{facts_table(facts)}{facts_table(took)}</div>",
        *(f"<p class=note>{escape(text)}</p>" for text in notes),
        *map(figure_html, pictures),
        f"<h2>Layers</h2><details><summary>{len(report.alignment)} layers, lowest alignment first</summary>"
        f"{layer_table(report)}</details>",
    ]


def layer_table(report: InitReport) -> str:
    """Every layer's alignment and, where known, its gradient's norm and how much of it the leading 2r hold. Idle ones last."""
    header, rows = ["layer", "alignment"], []
    known = bool(report.singular_values)
    if known:
        header += ["‖G‖", "σ₁", "share of ‖G‖² in the leading 2r"]
    for name in sorted(report.alignment, key=report.alignment.__getitem__):
        row = [name, f"{report.alignment[name]:.4f}"]
        if known:
            values, norm = report.singular_values[name], report.gradient_norm[name]
            row += [f"{norm:.3e}", f"{values[0]:.3e}", f"{sum(value**2 for value in values) / norm**2:.4f}"]
        rows.append(row)
    rows += [[name, "no gradient", *["–"] * (len(header) - 2)] for name in report.idle]
    return number_table(header, rows, "layers")
