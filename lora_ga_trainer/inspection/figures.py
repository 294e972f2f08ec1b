"""The plots of `lora-ga inspect` and `lora-ga compare`. Colours are Okabe and Ito's, viridis and cividis."""

import math
from pathlib import Path
from statistics import median

from .layer_names import layer_grid
from .runs import Curve

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "matplotlib, which draws the plots, is not installed. Install the extra `plot`: pip install 'lora_ga_trainer[plot]'."
    ) from error

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, YELLOW, BLACK = COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
)  # fmt: skip
RUN_COLOURS = (BLUE, VERMILION, GREEN, BLACK, PINK, ORANGE, SKY)
"""Without yellow, which is hard to see on white."""
LINES = ("-", "--", ":", "-.")
"""For further runs once all colours are used."""
WIDTH = 11.0
"""In inches; at `DPI` wider than the page, so that it is sharp there."""
DPI = 130
MANY = 12
"""With more depths, numbers do not fit into the cells of a heat map."""


def heat_map(values: dict[str, float], title: str, label: str, *, logarithmic: bool = False) -> Figure:
    """One number per layer over depth × kind of layer."""
    grid = layer_grid(list(values))
    rows = [[math.nan] * len(grid.depths) for _ in grid.kinds]
    for name, (kind, depth) in grid.places.items():
        rows[grid.kinds.index(kind)][grid.depths.index(depth)] = values[name]
    figure, axes = pyplot.subplots(figsize=(WIDTH, 1.6 + 0.34 * len(grid.kinds)), layout="constrained")
    shown = [value for value in values.values() if value > 0 or not logarithmic]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    norm = LogNorm(low, max(high, low * 1.001)) if logarithmic else Normalize(low, high if high > low else low + 1e-6)
    image = axes.imshow(rows, aspect="auto", cmap="cividis" if logarithmic else "viridis", norm=norm)
    axes.set_yticks(range(len(grid.kinds)), grid.kinds)
    every = math.ceil(len(grid.depths) / 40)
    ticks = range(0, len(grid.depths), every)
    axes.set_xticks(ticks, ["outside" if grid.depths[i] is None else str(grid.depths[i]) for i in ticks], fontsize=8)
    axes.set_xlabel("depth (block)")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label=label, pad=0.01)
    if len(grid.depths) <= MANY:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    dark = norm(value) < 0.6
                    text = f"{value:.1e}" if logarithmic else f"{value:.3f}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return figure


def spectra(singular_values: dict[str, list[float]], gradient_norm: dict[str, float]) -> Figure:
    """σᵢ/‖G‖ over i: a panel for each kind of layer, a line for each depth, coloured by depth."""
    grid = layer_grid(list(singular_values))
    columns = min(4, len(grid.kinds))
    rows = math.ceil(len(grid.kinds) / columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(WIDTH, 0.9 + 2.1 * rows), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    numbers = [depth for depth in grid.depths if depth is not None] or [0]
    norm, colours = Normalize(min(numbers), max(max(numbers), min(numbers) + 1)), pyplot.get_cmap("viridis")
    by_kind = dict(zip(grid.kinds, panels.flat, strict=False))
    for name, values in singular_values.items():
        kind, depth = grid.places[name]
        relative = [value / gradient_norm[name] for value in values]
        colour = BLACK if depth is None else colours(norm(depth))
        marker = "." if len(numbers) <= MANY else None
        by_kind[kind].plot(range(1, len(values) + 1), relative, color=colour, linewidth=1, marker=marker, markersize=4)
    for index, (kind, axes) in enumerate(by_kind.items()):
        axes.tick_params(labelbottom=index + columns >= len(grid.kinds))  # only where no panel is below
        axes.set_title(kind, fontsize=9)
        axes.set_yscale("log")
        axes.grid(True, color="0.9")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in list(panels.flat)[len(by_kind) :]:
        axes.set_axis_off()
    figure.supxlabel("singular value i of 2r", fontsize=10)
    figure.supylabel("σᵢ / ‖G‖", fontsize=10)
    mappable = pyplot.cm.ScalarMappable(norm, colours)
    bar = figure.colorbar(mappable, ax=panels, label="depth (block)", pad=0.01)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle("Leading singular values of each layer's gradient", fontsize=12)
    return figure


def norms_over_training(norms: dict[int, dict[str, list[float]]]) -> Figure:
    """Step -> part -> one norm per layer: the median as a line, the range over layers as a band."""
    figure, panels = pyplot.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True, layout="constrained")
    styles = {"A0": (BLUE, "--"), "dA": (BLUE, "-"), "B0": (VERMILION, "--"), "dB": (VERMILION, "-")}
    for axes, parts in zip(panels, (("A0", "dA"), ("B0", "dB")), strict=True):
        for part in parts:
            steps = [step for step, found in norms.items() if max(found.get(part, [0.0])) > 0]
            if not steps:
                continue
            values = [norms[step][part] for step in steps]
            colour, line = styles[part]
            marker = "o" if line == "-" else "s"
            middle = [median(each) for each in values]
            axes.plot(
                steps, middle, line, marker=marker, color=colour, label=f"‖{part.replace('0', '₀')}‖", markersize=4
            )
            axes.fill_between(
                steps, [min(v) or math.nan for v in values], [max(v) for v in values], color=colour, alpha=0.15
            )
        axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, color="0.9")
        if axes.lines:
            axes.legend()
    panels[0].set_ylabel("Frobenius norm")
    figure.suptitle("Factors over training: median over layers, band from smallest to largest", fontsize=12)
    return figure


def loss_curve(train: Curve, evaluation: Curve) -> Figure:
    """The losses of one run."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    for curve, colour, name in ((train, BLUE, "training"), (evaluation, VERMILION, "evaluation")):
        if curve.values:
            marker = "o" if name == "evaluation" or len(curve.values) < 20 else None
            axes.plot(curve.steps, curve.values, color=colour, label=name, marker=marker, markersize=4, linewidth=1.4)
    label_losses(axes, "optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    axes.set_title("Loss")
    return figure


def compared_losses(runs: dict[str, tuple[Curve, Curve]]) -> Figure:
    """Run -> (training, evaluation): a row for each that any run has, over steps and, for runs with a clock, over seconds."""
    rows = [index for index in (0, 1) if any(curves[index].values for curves in runs.values())]
    timed = any(curve.seconds for curves in runs.values() for curve in curves)
    columns = 2 if timed else 1
    legend_rows = math.ceil(len(runs) / 3)
    figure, panels = pyplot.subplots(
        len(rows), columns, figsize=(WIDTH, 0.8 + 3.2 * len(rows) + 0.25 * legend_rows),
        squeeze=False, sharex="col", sharey="row", layout="constrained",
    )  # fmt: skip
    handles = {}
    for panel_row, index in zip(panels, rows, strict=True):
        for number, (name, curves) in enumerate(runs.items()):
            curve = curves[index]
            colour, line = RUN_COLOURS[number % len(RUN_COLOURS)], LINES[number // len(RUN_COLOURS) % len(LINES)]
            marker = "o" if index == 1 or len(curve.values) < 20 else None
            for axes, xs in zip(panel_row, (curve.steps, curve.seconds), strict=False):
                if xs:
                    style = {"color": colour, "linestyle": line, "linewidth": 1.4, "marker": marker, "markersize": 4}
                    handles[name] = axes.plot(xs, curve.values, **style)[0]
        panel_row[0].set_ylabel(f"{('training', 'evaluation')[index]} loss (nats per token)")
    for axes_column, label in zip(panels.T, ("optimizer step", "seconds since training began"), strict=False):
        for axes in axes_column:
            label_losses(axes, label if axes is axes_column[-1] else "")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def label_losses(axes: Axes, x_label: str) -> None:
    axes.set_xlabel(x_label)
    if x_label == "optimizer step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="0.9")


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path
