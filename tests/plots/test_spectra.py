"""Pictures of singular values."""

import matplotlib.image
import pytest

from condft import analyze
from condft.plots import plot_spectra


def test_spectra(tiny_llama, tmp_path):
    names = [f"model.layers.0.self_attn.{part}.weight" for part in ("q_proj", "v_proj")]
    report = analyze(tiny_llama(), names=names, spectrum=True, progress=False)
    plot_spectra(report, names, tmp_path / "s.png")
    assert matplotlib.image.imread(tmp_path / "s.png").shape[1] > 800
    without = analyze(tiny_llama(), names=names, progress=False)
    with pytest.raises(ValueError, match="no singular values of 2 of 2 units"):
        plot_spectra(without, names, tmp_path / "t.png")
    with pytest.raises(ValueError, match="0 spectra for one picture"):
        plot_spectra(report, [], tmp_path / "t.png")
    assert not (tmp_path / "t.png").exists()
