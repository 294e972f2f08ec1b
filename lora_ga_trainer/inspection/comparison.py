"""Several runs side by side: their losses in one plot, their last numbers in one table."""

from os.path import commonpath
from pathlib import Path

from . import figures
from .runs import Log, read_log

NOTHING = ""
COLUMNS = ["run", "steps", "training loss", "evaluation loss", "lowest", "seconds", "initialization", "alignment"]


def compare(paths: list[Path], out: Path) -> tuple[str, Path]:
    """(the table as Markdown, the plot) of the runs in `paths`; any run of a `transformers.Trainer` works.

    Raises:
        ValueError: a run has no log or no loss in it, or is given twice.
        ModuleNotFoundError: matplotlib is missing.
    """
    logs = {name: read_log(path) for name, path in zip(run_names(paths), paths, strict=True)}
    curves = {name: (log.curve("loss"), log.curve("eval_loss")) for name, log in logs.items()}
    for name, (train, evaluation) in curves.items():
        if not train.values and not evaluation.values:
            raise ValueError(
                f"The log of {name} holds no loss yet. Wait until it has logged one (`logging_steps`), or leave it out."
            )
    out.mkdir(parents=True, exist_ok=True)
    plot = figures.save(figures.compared_losses(curves), out / "losses.png")
    table = "\n".join(
        f"| {' | '.join(cells)} |"
        for cells in (COLUMNS, ["---"] * len(COLUMNS), *(row(n, log) for n, log in logs.items()))
    )
    return table, plot


def run_names(paths: list[Path]) -> list[str]:
    """The parts of the runs' paths that differ, at least the last part of each.

    Raises:
        ValueError: the same run twice.
    """
    whole = [path.resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise ValueError(f"{path} is given twice. Name each run once.")
    if len(whole) == 1:
        return [whole[0].name]
    shared = Path(commonpath(whole))
    return [str(path.relative_to(shared)) if path != shared else path.name for path in whole]


def row(name: str, log: Log) -> list[str]:
    """One line of the table. Seconds come from `ga/seconds`, or else from `train_runtime` at the end of the run."""
    evaluation = log.curve("eval_loss").values
    seconds = log.last("ga/seconds") or log.last("train_runtime")
    numbers = {
        "training loss": (log.last("loss"), "{:.4f}"),
        "evaluation loss": (log.last("eval_loss"), "{:.4f}"),
        "lowest": (min(evaluation, default=None), "{:.4f}"),
        "seconds": (seconds, "{:,.1f}"),
        "initialization": (log.last("ga/init_seconds"), "{:,.2f} s"),
        "alignment": (log.last("ga/alignment_mean"), "{:.3f}"),
    }
    steps = str(max(entry["step"] for entry in log.entries))
    return [name, steps, *(NOTHING if value is None else form.format(value) for value, form in numbers.values())]
