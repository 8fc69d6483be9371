"""Figures as PNG and SVG: legible in black and white and to colour-blind readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, and line styles so that colour is never the only difference
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
NAMED = 7  # curves of a trajectory that get a name


def weight_figures(folder: Path, weights: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> None:
    """`weights.png|svg`: final weights against uniform, sorted (the paper's figure 3). `trajectory.png|svg`: over time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tdro"  # the same figure is the same file
    from matplotlib import pyplot

    tasks = sorted(weights["tasks"].items(), key=lambda item: -item[1]["weight"])
    names = [name for name, _ in tasks]
    uniform = 1 / len(names)
    figure, axes = pyplot.subplots(figsize=(8, max(2.5, 0.32 * len(names) + 1.2)), layout="constrained")
    place = range(len(names))
    colours = [COLOURS[0] if task["weight"] >= uniform else "#B0B0B0" for _, task in tasks]
    axes.barh(
        place, [task["weight"] for _, task in tasks], color=colours, edgecolor="black", linewidth=0.5, label="last step"
    )
    axes.plot([task["mean"] for _, task in tasks], place, "D", color=COLOURS[1], markersize=5, label="mean over steps")
    axes.axvline(uniform, color="black", linestyle="--", linewidth=1, label="uniform")
    axes.set_yticks(place, [_short(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("task weight α")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, folder / "weights")

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    steps = [line["step"] + 1 for line in metrics]
    far = sorted(names, key=lambda name: -abs(weights["tasks"][name]["weight"] - uniform))[:NAMED]
    for name in names:
        curve = [line["tasks"][name]["weight"] for line in metrics]
        if name in far:
            number = far.index(name)
            style = STYLES[number % len(STYLES)]
            axes.plot([0, *steps], [uniform, *curve], style, color=COLOURS[number], linewidth=1.8, label=_short(name))
        else:
            axes.plot([0, *steps], [uniform, *curve], color="#B0B0B0", linewidth=0.8)
    axes.axhline(uniform, color="black", linestyle=(0, (1, 3)), linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("task weight α")
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="farthest from uniform")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, folder / "trajectory")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}…"
