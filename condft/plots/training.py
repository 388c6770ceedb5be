"""Training curves of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from condft.plots.figures import save_figure

__all__ = ["plot_training"]

Metrics = Sequence[Mapping[str, Any]]


def plot_training(metrics: Metrics, path: str | Path, *, title: str = "Training") -> None:
    """Draws loss, learning rates and gradient norm over all optimizer steps, with the boundaries of the stages.

    Args:
        metrics: One record for each step, as in `metrics.jsonl`: `stage`, `loss` (nats), `grad_norm`, `learning_rate`
            (component -> rate), and `self_distillation_kl` (nats per token) for steps with self-distillation.
        path: Image file, written atomically.
        title: Above the figure.

    Raises:
        ValueError: A suffix that is no picture format.

    Example:
        >>> rates = {"projector": 2e-3, "language_model": 1.5e-4}
        >>> steps = [
        ...     {"stage": "adapt", "loss": 3.0 / step, "grad_norm": 1.0, "learning_rate": rates}
        ...     for step in range(1, 20)
        ... ]
        >>> plot_training(steps, "training.png")
    """
    figure = Figure(figsize=(9.5, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_losses(top, metrics)
    _draw_rates(bottom, metrics)
    # Between the last step of a stage and the first of the next one.
    for position in (i + 0.5 for i in range(1, len(metrics)) if metrics[i]["stage"] != metrics[i - 1]["stage"]):
        for axes in (top, bottom):
            axes.axvline(position, color="0.5", linestyle=":")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _draw_losses(axes: Axes, metrics: Metrics) -> None:
    steps = range(1, len(metrics) + 1)
    losses = [line["loss"] for line in metrics]
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="loss of a step")
    axes.plot(steps, _smoothed(losses), color="C0", label="running mean")
    axes.set_ylabel("cross-entropy of answer tokens (nats)")
    axes.set_ylim(bottom=0)
    key = "self_distillation_kl"
    distilled = {step: line[key] for step, line in zip(steps, metrics, strict=True) if key in line}
    if distilled:  # on an axis of its own: some hundredths of a nat, a flat line on the scale of the losses
        right = axes.twinx()
        right.plot(list(distilled), list(distilled.values()), color="C1", linewidth=0.8)
        right.set_ylabel("KL from the base (nats/token)", color="C1")
        right.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_rates(axes: Axes, metrics: Metrics) -> None:
    steps = range(1, len(metrics) + 1)
    for component in sorted({name for line in metrics for name in line["learning_rate"]}):
        # A component that does not learn in a stage has no rate there.
        axes.plot(steps, [line["learning_rate"].get(component, 0.0) for line in metrics], label=f"lr {component}")
    axes.set_ylabel("learning rate")
    axes.set_xlabel("optimizer step")
    norms = axes.twinx()
    norms.plot(steps, [line["grad_norm"] for line in metrics], color="0.6", linewidth=0.8, label="gradient norm")
    norms.set_ylabel("gradient norm")
    norms.set_yscale("log")
    handles = [*axes.get_lines(), *norms.get_lines()]
    axes.legend(handles, [str(line.get_label()) for line in handles], frameon=False, fontsize=8)


def _smoothed(values: Sequence[float], window: int = 10) -> list[float]:
    """The mean of each value and those before it, `window` at most."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
