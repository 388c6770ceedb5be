"""Training curves of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from condft.plots.figures import save_figure

__all__ = ["plot_training"]


def plot_training(metrics: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "Training") -> None:
    """Loss, learning rates and gradient norm over all optimizer steps, stage boundaries drawn.

    Args:
        metrics: Lines of `metrics.jsonl`: `stage`, `loss`, `grad_norm` and `learning_rate` (component -> rate); those
            of steps that distilled, `self_distillation_kl`.
        path: Image file, written atomically.
        title: Above the figure.
    """
    figure = Figure(figsize=(9.5, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    steps = range(1, len(metrics) + 1)
    losses = [line["loss"] for line in metrics]
    top.plot(steps, losses, color="0.75", linewidth=0.8, label="loss of a step")
    top.plot(steps, _smoothed(losses), color="C0", label="running mean")
    top.set_ylabel("cross-entropy of answer tokens (nats)")
    top.set_ylim(bottom=0)
    key = "self_distillation_kl"
    distilled = {step: line[key] for step, line in zip(steps, metrics, strict=True) if key in line}
    if distilled:  # some hundredths of a nat: on the losses' scale nothing would be seen
        beside = top.twinx()
        beside.plot(list(distilled), list(distilled.values()), color="C1", linewidth=0.8)
        beside.set_ylabel("KL from the base (nats/token)", color="C1")
        beside.set_ylim(bottom=0)
    top.legend(frameon=False)
    for component in sorted({name for line in metrics for name in line["learning_rate"]}):
        bottom.plot(steps, [line["learning_rate"].get(component, 0.0) for line in metrics], label=f"lr {component}")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    norms = bottom.twinx()
    norms.plot(steps, [line["grad_norm"] for line in metrics], color="0.6", linewidth=0.8, label="gradient norm")
    norms.set_ylabel("gradient norm")
    norms.set_yscale("log")
    handles = bottom.get_lines() + norms.get_lines()
    bottom.legend(handles, [str(line.get_label()) for line in handles], frameon=False, fontsize=8)
    for position in (i + 0.5 for i in range(1, len(metrics)) if metrics[i]["stage"] != metrics[i - 1]["stage"]):
        for axes in (top, bottom):
            axes.axvline(position, color="0.5", linestyle=":")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _smoothed(values: Sequence[float], window: int = 10) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
