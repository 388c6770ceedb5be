"""Pictures of reports and runs, written to files (no display is needed, and no matplotlib backend is chosen)."""

from condft.runtime.extras import needs_extra

with needs_extra("plots"):
    from condft.plots.comparison import plot_comparison
    from condft.plots.condition_numbers import plot_condition_numbers
    from condft.plots.figures import check_picture_path
    from condft.plots.spectra import plot_spectra
    from condft.plots.training import plot_training

__all__ = ["check_picture_path", "plot_comparison", "plot_condition_numbers", "plot_spectra", "plot_training"]
