"""Training curves."""

import matplotlib.image
import numpy as np

from condft.plots import plot_training


def test_training_curves(tmp_path):
    metrics = [
        {"stage": 1 + (i > 3), "loss": 5.0 / (i + 1), "grad_norm": 1.0, "learning_rate": {"projector": 1e-3}}
        for i in range(9)
    ]
    plot_training(metrics, tmp_path / "t.png")
    plain = matplotlib.image.imread(tmp_path / "t.png")
    assert plain.ndim == 3
    distilled = [line | ({"self_distillation_kl": 0.01 * i} if i % 2 else {}) for i, line in enumerate(metrics)]
    plot_training(distilled, tmp_path / "t.png")
    assert not np.array_equal(matplotlib.image.imread(tmp_path / "t.png"), plain)


def test_the_boundary_of_stages_is_drawn(tmp_path):
    metrics = [{"stage": "a", "loss": 1.0, "grad_norm": 1.0, "learning_rate": {"projector": 1e-3}}] * 4
    plot_training(metrics, tmp_path / "one.png")
    plot_training([*metrics[:2], *({**line, "stage": "b"} for line in metrics[2:])], tmp_path / "two.png")
    one, two = (matplotlib.image.imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert not np.array_equal(one, two)
