"""How the notebooks show things: curves and pictures with matplotlib, or tables and numbers without.

Nothing of the science is here. The four notebooks import it next to ebm_at, which lies one folder up.
"""

import csv
import json
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that `import ebm_at` works from inside tutorials/
SHORT = os.environ.get("EBM_AT_SHORT") == "1"  # the tests' mode: fewer epochs, fewer images
torch.set_num_threads(1)  # two threads on so small a network mostly wait for each other

# Okabe and Ito's palette: told apart by colour-blind readers too. Markers differ as well.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-o", "--s", "-.^", ":d", "-v", "--x", "-."]


def pyplot():
    """matplotlib.pyplot, or None where matplotlib is not installed."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return None
    return plt


def table(rows, title=""):
    """A list of dicts as a table. Floats are rounded to three digits; None stays empty."""
    shown = Table(title=title)
    for name in rows[0]:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*(text(v) for v in row.values()))
    Console(width=120, force_jupyter=False, force_terminal=False).print(shown)  # plain text


def text(value):
    """A table's cell."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def log(name):
    """A stored history.csv as a list of dicts, numbers as floats. name: below tutorials/results/."""
    with open(HERE / "results" / name, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k == "verdict" else float(v) for k, v in row.items()} for row in rows]


def result(name):
    """A stored result.json as a dict. name: below tutorials/results/."""
    return json.loads((HERE / "results" / name).read_text())


def curves(runs, panels, xlabel="epoch", x="epoch"):
    """Curves of several runs side by side, one panel per quantity.

    runs: {name: list of dicts}; panels: {key: (label of the y axis, factor)}.
    """
    plt = pyplot()
    if plt is None:
        for key, (label, factor) in panels.items():
            print(f"{label}, by {xlabel}:")
            for name, rows in runs.items():
                print(f"  {name:>16}: " + " ".join(f"{factor * row[key]:.3g}" for row in rows))
        return
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.2), layout="constrained", squeeze=False
    )
    for ax, (key, (label, factor)) in zip(axes[0], panels.items()):
        for (name, rows), colour, style in zip(runs.items(), COLOURS, STYLES):
            values = [factor * row[key] for row in rows]
            ax.plot([row[x] for row in rows], values, style, color=colour, label=name, markersize=3)
        ax.set(xlabel=xlabel, ylabel=label)
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    if xlabel == "epoch":
        for ax in axes[0]:
            ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    plt.show()


def histograms(values, xlabel):
    """Distributions on one axis. values: {name: tensor (N,)}. Without matplotlib: their quantiles."""
    plt = pyplot()
    if plt is None:
        levels = torch.tensor([0.1, 0.5, 0.9])
        for name, v in values.items():
            low, middle, high = v.float().quantile(levels).tolist()
            print(f"{name:>16}: {xlabel}, 10% {low:.2f}, median {middle:.2f}, 90% {high:.2f}")
        return
    figure, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    low = min(v.min().item() for v in values.values())
    high = max(v.max().item() for v in values.values())
    for (name, v), colour in zip(values.items(), COLOURS):
        ax.hist(v.tolist(), 40, (low, high), histtype="step", color=colour, label=name, linewidth=2)
    ax.set(xlabel=xlabel, ylabel="images")
    ax.legend(fontsize=8)
    plt.show()


def landscapes(maps, points=None, labels=None):
    """Heat maps over the unit square, side by side, one colour scale. maps: {title: (S, S) tensor}.

    points (N, 2) in [0, 1] and labels (N,) are drawn on top. Without matplotlib: the maps as
    numbers, on a coarse 5 x 5 grid.
    """
    plt = pyplot()
    if plt is None:
        for title, values in maps.items():
            print(title)
            steps = torch.linspace(0, len(values) - 1, 5).long()
            for row in values[steps][:, steps].flip(0).tolist():
                print("   " + " ".join(f"{v:7.2f}" for v in row))
        return
    figure, axes = plt.subplots(
        1, len(maps), figsize=(4.2 * len(maps), 3.6), layout="constrained", squeeze=False
    )
    low = min(v.min().item() for v in maps.values())
    high = max(v.max().item() for v in maps.values())
    for ax, (title, values) in zip(axes[0], maps.items()):
        shown = ax.imshow(
            values.tolist(),
            origin="lower",
            extent=(0, 1, 0, 1),
            cmap="cividis",
            vmin=low,
            vmax=high,
        )
        if points is not None:
            for k, marker in zip(labels.unique().tolist(), "o^sdv"):
                a, b = points[labels == k].T.tolist()
                ax.plot(a, b, marker, color="white", markeredgecolor="black", markersize=4)
        ax.set(title=title, xlabel="first coordinate", ylabel="second coordinate")
    figure.colorbar(shown, ax=axes[0].tolist(), label="energy (nats)", shrink=0.9)
    plt.show()


def images(rows, scale=2):
    """Rows of images, {label: float tensor (N, C, H, W) in [0, 1]}, as one picture in a notebook.

    Outside a notebook it only says what it would show.
    """
    import ebm_at

    ebm_at.import_torchvision()
    from torchvision.utils import make_grid

    length = max(len(x) for x in rows.values())
    stack = torch.cat(
        [torch.cat([x, x.new_ones(length - len(x), *x.shape[1:])]) for x in rows.values()]
    )
    grid = make_grid(
        stack.expand(-1, 3, -1, -1).float().cpu(), nrow=length, padding=1, pad_value=1.0
    )
    picture = (
        (grid.clamp(0, 1) * 255).byte().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    )
    print("rows, from the top: " + ", ".join(rows))
    try:
        from IPython.display import display
    except ImportError:
        print(f"({len(rows)} rows of images, {picture.shape[2]} x {picture.shape[1]} pixels)")
        return
    from torchvision.transforms.functional import to_pil_image

    display(to_pil_image(picture))
