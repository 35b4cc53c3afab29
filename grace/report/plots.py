"""A run's curves, histograms and layers as figures; several runs share each axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from grace.report.read import RunLog, number, series

COLUMNS = 3


@dataclass(frozen=True)
class Curve:
    """One axis: a value over the steps.

    Attributes:
        band: names of values between which is shaded: the extremes of what the value is the mean of.
        error: name of its standard error; 95 % are drawn.
    """

    key: str
    title: str
    band: tuple[str, str] | None = None
    error: str | None = None
    validation: bool = False
    from_zero: bool = True


LOSSES = (
    Curve("loss/total", "total loss"),
    Curve("loss/ce", "cross-entropy, nats"),
    Curve("loss/gdkd", "distillation (GDKD or KL)"),
    Curve("loss/rcka", "relational CKA loss"),
)
CONTROLLER = (
    Curve("ib/beta", "beta, weight of distillation"),
    Curve("ib/ema", "m, moving average of distillation"),
    Curve("ib/m_minus_tau", "m - tau", from_zero=False),
)
SECTIONS: dict[str, tuple[Curve, ...]] = {
    "Losses": LOSSES,
    "Validation": (
        Curve("val/ce", "cross-entropy, nats", validation=True),
        Curve("val/exact_match", "exact match, 95 %", error="val/exact_match_se", validation=True),
    ),
    "Controller": CONTROLLER,
    "Teacher and images": (
        Curve("gate/mean", "gate, mean", from_zero=False),
        Curve("teacher/entropy", "teacher entropy, nats"),
        Curve("rcka/cka_mean", "CKA per image: mean, extremes", ("rcka/cka_min", "rcka/cka_max"), from_zero=False),
        Curve("rcka/degenerate_images", "degenerate images per step"),
    ),
    "Quantizer": (
        Curve("quant/snr_db", "SNR, dB: all, extreme layers", ("quant/snr_db_min", "quant/snr_db_max"), from_zero=False),
        Curve("quant/clipped", "share of weights clipped"),
        Curve("quant/flipped", "share of codes flipped since the last log"),
        Curve("quant/scale_drift", "scale drift, mean |theta - theta_0|"),
    ),
    "Optimizer": (
        Curve("optim/lr", "learning rate"),
        Curve("optim/grad_norm", "gradient norm before clipping"),
        Curve("grad_norm/matrices", "gradient norm: matrices"),
        Curve("grad_norm/vectors", "gradient norm: vectors"),
        Curve("grad_norm/scales", "gradient norm: scales"),
    ),
    "Speed and memory": (
        Curve("tokens_per_s", "supervised tokens/s"),
        Curve("perf/input_tokens_per_s", "input tokens/s"),
        Curve("perf/images_per_s", "images/s"),
        Curve("perf/data_wait", "share of time waiting for data"),
        Curve("data/padding_share", "share of positions that are padding"),
        Curve("perf/mfu", "model FLOPs utilisation"),
        Curve("perf/device_memory_gib", "peak device memory, GiB"),
        Curve("perf/host_memory_gib", "host memory, GiB"),
    ),
}  # fmt: skip
# Key, title, range of the bins, and the scale's name: as `grace.step_stats` has them.
HISTOGRAMS = (
    ("gate/histogram", "gate: share of tokens by bin", (0.36, 1.0)),
    ("rcka/cka_histogram", "CKA: share of images by bin", (0.0, 1.0)),
)


def draw_section(runs: Sequence[RunLog], curves: Sequence[Curve]) -> Figure | None:
    """An axis for each curve that some run has; None if there is none."""
    present = [curve for curve in curves if any(_points(run, curve)[0] for run in runs)]
    if not present:
        return None
    rows = math.ceil(len(present) / COLUMNS)
    figure = Figure(figsize=(12, 2.9 * rows + (0.35 if len(runs) > 1 else 0)), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis, curve in zip(axes.flat, present, strict=False):
        _draw_curve(axis, runs, curve)
    for axis in list(axes.flat)[len(present) :]:
        axis.axis("off")
    if len(runs) > 1:
        handles, labels = [], []
        for index, run in enumerate(runs):
            handles.append(axes.flat[0].plot([], [], color=f"C{index % 10}")[0])
            labels.append(plain(run.name))
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)
    return figure


def _draw_curve(axis: Axes, runs: Sequence[RunLog], curve: Curve) -> None:
    for index, run in enumerate(runs):
        steps, values = _points(run, curve)
        colour = f"C{index % 10}"
        axis.plot(steps, values, color=colour, marker="." if len(steps) < 40 else None, linewidth=1.2)
        lines = run.validation if curve.validation else run.steps
        if curve.band is not None:
            low, high = (dict(zip(*series(lines, key), strict=True)) for key in curve.band)
            both = [step for step in steps if step in low and step in high]
            axis.fill_between(
                both, [low[s] for s in both], [high[s] for s in both], color=colour, alpha=0.15, linewidth=0
            )
        if curve.error is not None:
            error = dict(zip(*series(lines, curve.error), strict=True))
            spread = [1.96 * error.get(step, 0.0) for step in steps]
            axis.errorbar(steps, values, yerr=spread, color=colour, capsize=2, linewidth=0.8)
    axis.set_title(curve.title, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.grid(alpha=0.3)
    if curve.from_zero and all(value >= 0 for run in runs for value in _points(run, curve)[1]):
        axis.set_ylim(bottom=0)


def _points(run: RunLog, curve: Curve) -> tuple[list[int], list[float]]:
    return series(run.validation if curve.validation else run.steps, curve.key)


def draw_histograms(run: RunLog) -> Figure | None:
    """How the histograms move: bins upwards, log windows to the right, brighter for more; None without any."""
    found = [(title, span, table) for key, title, span in HISTOGRAMS if (table := _histogram_table(run, key))]
    if not found:
        return None
    figure = Figure(figsize=(12, 2.9), layout="constrained")
    axes = figure.subplots(1, len(HISTOGRAMS), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, (low, high), (steps, rows)) in zip(axes.flat, found, strict=False):
        axis.axis("on")
        columns = [[row[bin] for row in rows] for bin in range(len(rows[0]))]
        edges = [low + (high - low) * i / len(columns) for i in range(len(columns) + 1)]
        before = [max(0, steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)), *steps]
        scale = PowerNorm(0.4, vmin=0)  # rare bins show beside the one that holds nearly all
        mesh = axis.pcolormesh(before, edges, columns, cmap="viridis", norm=scale, rasterized=True)
        figure.colorbar(mesh, ax=axis)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
    return figure


def _histogram_table(run: RunLog, key: str) -> tuple[list[int], list[list[float]]] | None:
    """Steps and shares of the lines that have a histogram of this name, all with as many bins."""
    rows = []
    for line in run.steps:
        value = line.get(key)
        if isinstance(value, list) and value and all(number(share) is not None for share in value):
            rows.append((line["step"], value))
    rows = [(step, value) for step, value in rows if len(value) == len(rows[-1][1])]
    return ([step for step, _ in rows], [value for _, value in rows]) if rows else None


def draw_layers(run: RunLog) -> Figure | None:
    """Quantization SNR of every layer as last measured: kinds of layer by depth; None if it was not."""
    if not run.snr:
        return None
    parsed = {name: _depth(name) for name in run.snr}
    depths = sorted({depth for depth, _ in parsed.values()})
    kinds = list(dict.fromkeys(kind for _, kind in parsed.values()))
    grid = [[math.nan] * len(depths) for _ in kinds]
    for name, (depth, kind) in parsed.items():
        grid[kinds.index(kind)][depths.index(depth)] = run.snr[name]
    figure = Figure(figsize=(12, 0.28 * len(kinds) + 1.2), layout="constrained")
    axis = figure.subplots()
    image = axis.pcolormesh(grid, cmap="viridis", rasterized=True)
    axis.set_xticks([i + 0.5 for i in range(len(depths))], [str(depth) for depth in depths], fontsize=8)
    axis.set_yticks([i + 0.5 for i in range(len(kinds))], [plain(kind) for kind in kinds], fontsize=8)
    axis.invert_yaxis()
    axis.set_title("quantization SNR by layer, dB", fontsize=10)
    axis.set_xlabel("decoder layer", fontsize=9)
    figure.colorbar(image, ax=axis)
    return figure


def _depth(name: str) -> tuple[int, str]:
    """Number and kind of a layer: (3, "mlp.up_proj") of "layers.3.mlp.up_proj"."""
    _, _, rest = name.partition(".")
    depth, _, kind = rest.partition(".")
    return (int(depth), kind) if depth.isdecimal() and kind else (0, name)


def plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
