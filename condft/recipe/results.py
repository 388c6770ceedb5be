"""The files that a run leaves in its output folder, besides checkpoints and metrics (see `condft.training`)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from condft.files.atomic import write_json, write_text
from condft.plots import plot_condition_numbers, plot_training
from condft.report import SpectralReport
from condft.training import RunConfig, read_metrics
from condft.training.output_dir import METRICS

__all__ = ["ADAPTER", "CONFIG", "write_analysis", "write_results"]

ADAPTER, CONFIG = "adapter", "config.yaml"


def write_analysis(output_dir: Path, config: RunConfig, report: SpectralReport, selected: Collection[str]) -> None:
    """Writes what is known before training: configuration, spectral report, and a picture of the selection.

    Args:
        output_dir: The run's folder.
        config: Written with all defaults, so that a later version with other defaults can repeat the run.
        report: The spectral report of the base.
        selected: Names of the selected units.
    """
    write_text(output_dir / CONFIG, config.to_yaml())
    report.save(output_dir / "spectral_report.json")
    plot_condition_numbers(report, output_dir / "condition_numbers.png", selected=selected)


def write_results(output_dir: Path, summary: Mapping[str, Any]) -> None:
    """Writes the training curves, then the summary: a folder that holds a summary holds a finished run."""
    plot_training(read_metrics(output_dir / METRICS), output_dir / "training.png", title=str(output_dir))
    write_json(output_dir / "summary.json", summary)
