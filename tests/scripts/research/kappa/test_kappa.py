"""Small changes, the statistics of the atlas, and both experiments end to end on tiny models."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from condft.training import read_metrics
from scripts.research.config import StudyConfig
from scripts.research.kappa.columns import load_atlases, load_changes
from scripts.research.kappa.measure import FINE_TUNING, Stability, fine_tune, measure_atlas
from scripts.research.kappa.report import write_report
from scripts.research.kappa.squares import kept_of_lowest, random_square_spread, square_quantiles, square_ratio
from scripts.research.kappa.variants import add_noise, int8_round_trip, nf4_round_trip, variants
from scripts.research.statistics import explained_by_chance, explained_by_groups, spread_within
from tests.helpers.tiny_speech import save_language_model


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_int8_keeps_each_row_within_half_a_step_and_its_largest_entry_exactly() -> None:
    weight = gaussian(5, 3, 8) * torch.tensor([1e-3, 1.0, 10.0, 1e3, 0.0])[:, None, None]
    rounded = int8_round_trip(weight)
    step = weight.flatten(1).abs().amax(1) / 127
    assert rounded.shape == weight.shape
    assert ((rounded - weight).flatten(1).abs() <= 0.5001 * step[:, None]).all()
    torch.testing.assert_close(rounded.flatten(1).abs().amax(1), 127 * step)
    assert (int8_round_trip(rounded) - rounded).abs().max() <= 1e-3 * step.max()
    assert len(rounded[1].unique()) > 16  # more levels than nf4 has


def test_nf4_takes_the_nearest_of_sixteen_levels_in_each_block() -> None:
    weight = gaussian(7, 30)  # blocks of 64 cross the rows, the last one is short
    rounded = nf4_round_trip(weight)
    flat, found = weight.flatten(), rounded.flatten()
    from scripts.research.kappa.variants import _NF4_CODES

    for start in range(0, flat.numel(), 64):
        block = flat[start : start + 64]
        levels = torch.tensor(_NF4_CODES) * block.abs().max()
        nearest = (block[:, None] - levels).abs().min(dim=1).values
        torch.testing.assert_close((found[start : start + 64] - block).abs(), nearest, atol=1e-6, rtol=0)
    assert not nf4_round_trip(torch.zeros(2, 3)).any()


def test_the_round_trips_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(64, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(nf4_round_trip(weight), functional.dequantize_4bit(packed, state), atol=1e-5, rtol=1e-5)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    theirs = functional.int8_vectorwise_dequant(codes, scales)
    difference = (int8_round_trip(weight.half()) - theirs.float()).abs()
    assert (difference > 1e-3).float().mean() < 1e-3  # theirs scales in fp16: now and then a level's edge lies apart
    assert (difference <= 1.01 * scales[:, None] / 127).all()


def test_noise_has_the_norm_asked_for_and_belongs_to_the_name() -> None:
    weight = gaussian(12, 9)
    noisy = add_noise("a", weight, relative_norm=0.03)
    assert (noisy - weight).norm() / weight.norm() == pytest.approx(0.03, rel=1e-4)
    assert torch.equal(noisy, add_noise("a", weight, relative_norm=0.03))
    assert not torch.equal(noisy, add_noise("b", weight, relative_norm=0.03))


def test_variance_explained_is_one_zero_or_chance() -> None:
    groups = np.repeat(np.arange(4), 25)
    assert explained_by_groups(groups * 2.0, groups) == pytest.approx(1.0)
    assert explained_by_groups(np.tile([0.0, 1.0, 2.0, 3.0, 4.0], 20), groups) == pytest.approx(0.0)
    assert math.isnan(explained_by_groups(np.ones(100), groups))
    generator = np.random.default_rng(0)
    noise = [explained_by_groups(generator.normal(size=100), groups) for _ in range(500)]
    assert np.mean(noise) == pytest.approx(explained_by_chance(groups), rel=0.1)


def test_spread_within_groups_leaves_out_their_means() -> None:
    groups = np.repeat(np.arange(50), 10)
    values = np.random.default_rng(0).normal(scale=2.0, size=500) + 100.0 * groups
    assert spread_within(values, groups) == pytest.approx(2.0, rel=0.1)


def test_kept_of_lowest_counts_group_by_group() -> None:
    before = np.concatenate([np.arange(20.0), 100 + np.arange(20.0), [7.0]])
    groups = np.array(["a"] * 20 + ["b"] * 20 + ["lonely"])
    assert kept_of_lowest(before, before, groups) == (4, 4)
    after = before.copy()
    after[[0, 1]] = 50.0  # both lowest of group a leave; group b keeps its own though it is higher
    assert kept_of_lowest(before, after, groups) == (2, 4)
    assert kept_of_lowest(before, -before, groups) == (0, 4)


def test_random_squares_have_uniform_quantiles_and_the_spread_of_their_law() -> None:
    kappa = torch.linalg.cond(gaussian(400, 24, 24).double()).numpy()
    quantiles = square_quantiles(kappa, np.full(400, 24))
    assert np.quantile(quantiles, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.06)
    assert np.log(kappa).std() == pytest.approx(random_square_spread(), rel=0.1)
    assert square_quantiles([square_ratio(0.3) * 7], [7])[0] == pytest.approx(0.3)


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    torch.set_num_threads(1)  # layers this small only wait for a second thread
    (tmp_path / "german.txt").write_text("Der schnelle braune Fuchs springt über den faulen Hund. " * 20)
    content: dict[str, Any] = {
        "results": "unused",
        "workspace": str(tmp_path / "workspace"),
        "language_model": save_language_model(tmp_path / "llama"),
        "text": {"file": str(tmp_path / "german.txt"), "window": 16, "test_windows": 6},
        "trainable_fraction": 0.2,
        "training": {"projector_steps": 0, "steps": 3, "per_device_batch_size": 2, "mixed_precision": "bf16"},
        "evaluation": {},
        "final_text_tokens": 16,
        "points": [3],
        "seeds": [0],
        "levels": [1.0],
        "arms": {},
    }
    return StudyConfig.model_validate(content)


def test_atlas_stability_and_report_end_to_end(config: StudyConfig, tmp_path: Path) -> None:
    folder, results = Path(config.language_model), tmp_path / "results"
    assert measure_atlas([folder], results / "atlas.jsonl") == 15
    assert measure_atlas([folder], results / "atlas.jsonl") == 0  # it is there

    path = results / "stability.jsonl"
    stability = Stability(folder, path)
    stability.measure_variants()
    assert all(torch.equal(stability.model.get_parameter(name), weight) for name, weight in stability.base.items())
    fine_tune(stability, config, [1e-2])
    count = len(variants()) + 1
    assert len(read_metrics(path)) == count
    again = Stability(folder, path)
    again.measure_variants()
    fine_tune(again, config, [1e-2])
    assert len(read_metrics(path)) == count

    (atlas,) = load_atlases(results / "atlas.jsonl")
    assert len(atlas.lines) == 14
    assert [line["role"] for line in atlas.others] == ["embedding"]
    low, deficit, high = map(atlas.column, ("deficit_at_least", "entropy_deficit", "deficit_at_most"))
    assert (low <= deficit).all()
    assert (deficit <= high).all()
    changes = {change.label: change for change in load_changes(path, atlas)}
    assert changes["noise 0.1"].moved == pytest.approx(0.1, rel=1e-2)
    assert 1e-4 < np.median(changes["fp16"].moved) < np.median(changes["bf16"].moved) < 3e-3
    tuned = changes[f"{FINE_TUNING} at 0.01"]
    assert (tuned.moved > 1e-2).all()
    assert tuned.line["test_loss"] < tuned.line["test_loss_before"]
    # the atlas reads the checkpoint, stability a live model: the same weights under the same names
    for place, line in enumerate(sorted(atlas.lines, key=lambda line: line["name"])):
        assert changes["bf16"].scores["κ"][0, place] == pytest.approx(line["condition_number"], rel=1e-5)

    paths = write_report(results)
    assert [item.name for item in paths] == ["kappa.md", "deficit.png", "atlas_llama.png", "stability.png"]
    assert all(item.stat().st_size > 1000 for item in paths)
    text = paths[0].read_text(encoding="utf-8")
    assert "14 of 14" in text
    assert "| noise 0.1 | 0.1 |" in text


def test_the_report_needs_an_atlas_of_one_version_a_model(tmp_path: Path) -> None:
    path = tmp_path / "atlas.jsonl"
    with pytest.raises(ValueError, match=r"no weights: python scripts/kappa\.py measure"):
        load_atlases(path)
    path.write_text("".join(json.dumps({"model": "m", "inputs": inputs}) + "\n" for inputs in "ab"))
    with pytest.raises(ValueError, match="several versions of m"):
        load_atlases(path)
