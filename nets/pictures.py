"""Pictures of a run: curves, the confusion matrix, the first layer's filters, the worst mistakes.

Each function returns a `matplotlib.figure.Figure`. `png` turns a figure into the bytes of a file.
The functions make figures directly and not with pyplot: so there is no window, no global state and
nothing to close.

The colours are Okabe and Ito's (https://jfly.uni-koeln.de/color), which colour-blind readers can
tell apart. Blue means the held-out data or a right answer; orange means the training data or a
wrong answer.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor
from torch.nn import functional as F

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8a8a8a", "#222222"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#e4e4e4",
    "figure.dpi": 100,
}
_RIGHT = LinearSegmentedColormap.from_list("right", ["#ffffff", BLUE])
_WRONG = LinearSegmentedColormap.from_list("wrong", ["#ffffff", ORANGE])


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file, at twice the usual resolution (200 dpi)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


@rc_context(STYLE)
def curves(history: Sequence[dict], losses: Tensor) -> Figure:
    """Draw the loss and the accuracy over the epochs.

    Args:
        history: one dict of metrics for each epoch, as in metrics.jsonl.
        losses: [steps], the training loss of every step, in nats.
    """
    epochs = [line["epoch"] for line in history]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = np.maximum(np.asarray(losses, dtype=np.float64), 1e-6)  # 0 has no logarithm.
    held_out = [max(line["test_loss"], 1e-6) for line in history]
    steps = np.arange(1, len(losses) + 1) * epochs[-1] / len(losses)
    left.plot(steps, losses, color=ORANGE, alpha=0.25, linewidth=1)
    left.plot(steps, _smooth(losses), color=ORANGE, linewidth=2, label="training, running mean")
    left.plot(
        epochs,
        held_out,
        color=BLUE,
        linewidth=2,
        marker="o",
        label="held out",
    )
    left.set(title="Loss", ylabel="cross-entropy (nats)", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())
    right.plot(
        epochs,
        [line["train_accuracy"] for line in history],
        color=ORANGE,
        linewidth=2,
        marker="o",
        label="training, on the way",
    )
    right.plot(
        epochs,
        [line["accuracy"] for line in history],
        color=BLUE,
        linewidth=2,
        marker="o",
        label="held out",
    )
    right.annotate(
        f"{history[-1]['accuracy']:.1%}",
        (epochs[-1], history[-1]["accuracy"]),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        color=BLUE,
        weight="bold",
    )
    right.set(title="Accuracy", ylabel="images classified correctly")
    right.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
    right.margins(y=0.15)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.legend(frameon=False, loc="best")
    left.set_xlim(0, epochs[-1] * 1.03)
    right.set_xlim(0, epochs[-1] * 1.06)
    return figure


def _smooth(values: np.ndarray, share: float = 0.08) -> np.ndarray:
    """Return a running mean. Its window has 8% of all values, and is smaller at both ends."""
    half = max(1, int(len(values) * share / 2))
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


@rc_context(STYLE)
def confusion(matrix: Tensor, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix, with the recall at the right and the precision below.

    Args:
        matrix: integers [classes, classes]; rows are true classes, columns are predicted ones.
        classes: the names of the classes.
    """
    matrix = np.asarray(matrix, dtype=np.int64)
    count, hits = len(matrix), matrix.diagonal()
    true, predicted = matrix.sum(1), matrix.sum(0)
    size = min(4.2 + 0.46 * count, 14)
    figure = Figure(figsize=(size, size * 0.93), layout="constrained")
    axes = figure.subplots()
    # Hits and errors have a scale each. On one scale, a few errors beside 100 hits look white.
    share = np.where(np.eye(count, dtype=bool), 0, matrix / np.maximum(true, 1)[:, None])
    axes.imshow(share, cmap=_WRONG, vmin=0, vmax=max(0.05, share.max()))
    recall = np.where(np.eye(count, dtype=bool), (hits / np.maximum(true, 1))[:, None], np.nan)
    axes.imshow(recall, cmap=_RIGHT, vmin=0, vmax=1.3)
    few = count <= 30  # With more classes, nobody could read the numbers in the cells.
    if few:
        for row, column in np.argwhere((matrix > 0) | np.eye(count, dtype=bool)):
            strong = row == column and hits[row] > 0.6 * true[row]
            axes.text(
                column,
                row,
                f"{matrix[row, column]:,}",
                ha="center",
                va="center",
                color="white" if strong else INK,
                fontsize=11 if count <= 12 else 8,
                weight="bold" if row == column else "normal",
            )
        for i in range(count):
            small = {
                "ha": "center",
                "va": "center",
                "fontsize": 9 if count <= 12 else 7,
                "color": INK,
            }
            axes.text(count - 0.05, i, _percent(hits[i], true[i]), **small)
            axes.text(i, count - 0.2, _percent(hits[i], predicted[i]), **small)
        axes.text(count - 0.05, -0.6, "recall", ha="center", fontsize=9, color=GREY)
        axes.text(-0.6, count - 0.2, "precision", ha="right", va="center", fontsize=9, color=GREY)
    rotate = max(map(len, classes)) > 2
    ticks = range(count)
    axes.set_xticks(
        ticks,
        classes[:count],
        rotation=45 if rotate and few else 0,
        ha="right" if rotate and few else "center",
        fontsize=None if few else 7,
    )
    axes.set_yticks(ticks, classes[:count], fontsize=None if few else 7)
    axes.set(
        xlim=(-0.5, count + (0.4 if few else -0.5)),
        ylim=(count + (0.2 if few else -0.5), -0.5),
        xlabel="predicted",
        ylabel="true",
    )
    axes.set_title(
        f"Confusion matrix: {hits.sum():,} of {matrix.sum():,} held-out images right "
        f"({hits.sum() / max(matrix.sum(), 1):.1%})",
        fontsize=12,
    )
    lines = {"colors": "#e4e4e4", "linewidth": 0.8}
    axes.hlines(np.arange(count + 1) - 0.5, -0.5, count - 0.5, **lines)
    axes.vlines(np.arange(count + 1) - 0.5, -0.5, count - 0.5, **lines)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


@rc_context(STYLE)
def filters(weight: Tensor, bias: Tensor, image: Tensor, limit: int = 32) -> Figure:
    """Draw the filters of the first layer. For a convolution, also draw each one's output.

    Args:
        weight: [K, C, R, S] of a convolution, or [K, H * W] of a linear layer.
        bias: [K].
        image: [H, W], the input for the outputs, standardised as for the network.
        limit: draw at most this many filters.
    """
    linear = weight.dim() == 2
    tiles = weight[:limit].reshape(-1, *image.shape) if linear else weight[:limit, 0]
    rows, band = math.ceil(len(tiles) / COLUMNS), 1.1 if linear else 2.3
    if linear:
        title = f"The first layer: {len(tiles)} of {len(weight)} units"
    else:
        height, width = weight.shape[2:]
        title = f"The first layer: {len(tiles)} filters of {height} x {width} pixels, "
        title += "and what each sees in one image"
    figure, axes = _tiled(title, rows * band, scale=0.9)
    high = float(tiles.abs().max()) or 1.0
    scale = {"cmap": "PuOr", "vmin": -high, "vmax": high}
    for i, tile in enumerate(tiles.numpy()):
        drawn = _tile(axes, tile, i % COLUMNS, i // COLUMNS * band, **scale)
    if not linear:
        seen = F.conv2d(image[None, None], weight[:limit, :1], bias[:limit]).relu()[0]
        for i, response in enumerate(seen.numpy()):
            _tile(axes, response, i % COLUMNS, i // COLUMNS * band + 1.06, cmap="Greys", vmin=0)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7, aspect=25, pad=0.02)
    bar.set_label("weight")
    bar.outline.set_visible(False)
    return figure


@rc_context(STYLE)
def mistakes(
    images: Tensor, labels: Tensor, probability: Tensor, classes: Sequence[str], limit: int = 16
) -> Figure:
    """Draw the images that the network got wrong; its most confident mistakes come first.

    Args:
        images: uint8 [N, H, W].
        labels: int64 [N].
        probability: [N, classes], computed by the network.
        classes: the names of the classes.
        limit: draw at most this many images.
    """
    guess = probability.argmax(1)
    wrong = (guess != labels).nonzero()[:, 0]
    confidence = probability.amax(1)
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:limit].tolist()
    if worst:
        title = f"{len(wrong):,} of {len(labels):,} held-out images wrong"
        title += f"; the {len(worst)} worst" if len(worst) < len(wrong) else ""
        title += " (true → predicted, with its probability)"
    else:
        title = f"No mistake in {len(labels):,} held-out images"
    band = 1.62
    figure, axes = _tiled(title, math.ceil(len(worst) / COLUMNS) * band, top=-0.32)
    size = 11 if max(map(len, classes)) <= 3 else 7
    for place, i in enumerate(worst):
        column, y = place % COLUMNS, place // COLUMNS * band
        _tile(axes, images[i].numpy(), column, y, frame=True, cmap="Greys", vmin=0, vmax=255)
        middle = column * 1.08 + 0.5
        axes.text(
            middle,
            y - 0.06,
            f"{classes[labels[i]]} → {classes[guess[i]]}",
            ha="center",
            va="bottom",
            fontsize=size,
            weight="bold",
        )
        axes.text(
            middle,
            y + 1.05,
            f"{confidence[i]:.0%}",
            ha="center",
            va="top",
            fontsize=10,
            color=ORANGE,
        )
    return figure


COLUMNS = 8  # A picture that is made of small images has this many columns.


def _tiled(title: str, height: float, top: float = 0.0, scale: float = 1.02) -> tuple[Figure, Axes]:
    """Return a figure, and its only axes. Their unit is a tile, the room of one small image.

    y points down, and a tile is `scale` inches wide and high. All tiles share one axes object,
    because matplotlib takes seconds to lay out dozens of them.
    """
    width, height = COLUMNS * 1.08 - 0.08, max(height, 0.1)
    figure = Figure(figsize=(9, 0.5 + scale * height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(-0.01, width + 0.01), ylim=(top + height, top), aspect="equal", anchor="NW")
    axes.set_autoscale_on(False)
    return figure, axes


def _tile(axes: Axes, image: np.ndarray, column: int, y: float, frame=False, **options):
    """Draw an image [H, W] into the square in `column` whose upper edge is at y."""
    height, width = image.shape
    x, long = column * 1.08, max(height, width)
    x, y = x + (1 - width / long) / 2, y + (1 - height / long) / 2
    right, bottom = x + width / long, y + height / long
    if frame:
        axes.add_patch(
            Rectangle((x, y), right - x, bottom - y, fill=False, edgecolor="#cccccc", linewidth=0.8)
        )
    return axes.imshow(image, extent=(x, right, bottom, y), **options)
