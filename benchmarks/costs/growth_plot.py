"""The picture of `scaling.py`: one column per axis, seconds above memory, both axes logarithmic."""

from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter
from measuring.results import PLOTS

from costs.growth import Curve

X_LABELS = {
    "samples": "samples",
    "width": "width (hidden size)",
    "layers": "depth (decoder layers)",
    "rank": "LoRA rank r",
    "processes": "processes",
}
MIB = 2**20
# By row: the label of its y axis, its unit, and the quantities in it with name, colour (Okabe-Ito) and marker.
ROWS = [
    ("time, seconds", 1, {"seconds": ("time", "#0072B2", "o")}),
    (
        "memory, MiB",
        MIB,
        {
            "extra_peak_bytes": ("extra peak", "#D55E00", "o"),
            "sketch_bytes": ("sketch", "#009E73", "s"),
            "gradient_bytes": ("full gradient", "#000000", "x"),
        },
    ),
]


def draw(found: dict[str, dict[str, Curve]], title: str, path: Path = PLOTS / "scaling.png") -> Path:
    """Every repeat as a marker, the fitted power law as a line over the points it was fitted to."""
    matplotlib.use("Agg")
    # 1200 pixels at 100 dpi, with letters of 10 pixels and more; drawn finer
    figure, panels = pyplot.subplots(len(ROWS), len(found), figsize=(12, 6.5), sharey="row", squeeze=False)
    for panel_row, (y_label, unit, quantities) in zip(panels, ROWS, strict=True):
        for axes, (axis, by_quantity) in zip(panel_row, found.items(), strict=True):
            for quantity, style in quantities.items():
                plot_curve(axes, by_quantity[quantity], unit, *style)
            label_axes(axes, by_quantity["seconds"].xs, X_LABELS[axis])
        panel_row[0].set_ylabel(y_label)
        room_for_legends(panel_row[0])
    figure.suptitle(f"{title}\nThe full gradient is for comparison: the sketch is held instead.", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def plot_curve(axes: Axes, curve: Curve, unit: int, name: str, colour: str, marker: str) -> None:
    points = [(x, y / unit) for x, ys in zip(curve.xs, curve.repeats, strict=True) for y in ys if y]
    label = name
    if curve.fit:
        p, c = curve.fit
        label = f"{name} ∝ $x^{{{p:z.2f}}}$"
        xs = curve.fitted_xs
        axes.plot(xs, [c * x**p / unit for x in xs], color=colour, linewidth=1.5)
    xs, ys = zip(*points, strict=True) if points else ((), ())
    axes.plot(xs, ys, marker, color=colour, markersize=5, markerfacecolor="none", label=label)


def label_axes(axes: Axes, xs: list[int], x_label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlim(xs[0] / 1.3, xs[-1] * 1.3)
    axes.set_xlabel(x_label)
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color="0.9")
    axes.legend(fontsize=8, loc="upper left", handlelength=1, borderpad=0.3)


def room_for_legends(axes: Axes) -> None:
    """Two fifths more height, in decades, for a row's shared y axis."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.4)
