"""Loss curves as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SMOOTH_FROM, SMOOTH_OVER = 50, 10  # steps


def plot_losses(metrics: Sequence[Mapping[str, Any]], path: Path, title: str = "Chat fine-tuning") -> None:
    """Train loss per step (with its mean over SMOOTH_OVER steps in longer runs) and the test NLL where it was measured.

    metrics: rows with `step` and `loss` or `test_nll`, in nats per trained token.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    test = [(row["step"], row["test_nll"]) for row in metrics if "test_nll" in row]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    smooth = len(train) >= SMOOTH_FROM
    axes.plot(*_columns(train), color="tab:blue", linewidth=1.8, alpha=0.35 if smooth else 1, label="train, per batch")
    if smooth:
        axes.plot(*_columns(_running_mean(train)), color="tab:blue", linewidth=2, label=f"train, {SMOOTH_OVER} steps")
    axes.plot(*_columns(test), "o--", color="tab:orange", label="test")
    for step, value in {test[0], test[-1]} if test else ():
        axes.annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", title=title)
    axes.margins(x=0.06, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    means = []
    for i, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, i + 1 - SMOOTH_OVER) : i + 1]]
        means.append((step, sum(window) / len(window)))
    return means
