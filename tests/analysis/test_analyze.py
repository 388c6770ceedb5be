"""analyze() on live models and folders."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from condft import NonFiniteWeightError, SpectralReport, analyze, select_units
from condft.report import SkipReason


def test_every_row_agrees_with_numpy(tiny_llama):
    model = tiny_llama()
    report = analyze(model, progress=False)
    assert len(report.rows) == 4 * 7 + 1
    parameters = dict(model.named_parameters())
    for row in report.rows:
        reference = np.linalg.svd(parameters[row.name].detach().double().numpy(), compute_uv=False)
        assert row.condition_number == pytest.approx(reference[0] / reference[-1], rel=1e-6)
        assert row.num_parameters == math.prod(row.shape)
        assert row.matrix_shape == row.shape


def test_folder_and_live_model_give_the_same_report(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    live, stored = analyze(model, progress=False), analyze(tmp_path, progress=False)
    assert stored.rows == live.rows
    assert stored.fingerprint == live.fingerprint


def test_a_convolution_is_analyzed_as_one_matrix():
    (row,) = analyze(nn.Conv1d(6, 4, 3, bias=False), progress=False).rows
    assert (row.shape, row.matrix_shape) == ((4, 6, 3), (4, 18))


def test_only_the_requested_names(tiny_llama):
    names = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    report = analyze(tiny_llama(), names=names, progress=False)
    assert {row.name for row in report.rows} == names
    assert sum(skip.reason is SkipReason.NOT_REQUESTED for skip in report.skipped) == 4 * 7 + 1 - 2


def test_non_finite_weights_are_all_named_and_the_rest_is_kept(tiny_llama):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    model.model.layers[2].self_attn.q_proj.weight.data[3, 1] = math.inf
    with pytest.raises(NonFiniteWeightError, match="NaN or infinity in 2 of 29 weights") as error:
        analyze(model, progress=False)
    assert error.value.names == ["model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    assert len(error.value.report.rows) == 27


def test_meta_models_say_what_to_do():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"nothing to analyze in Linear: .*1 meta_device.*Load the weights first"):
        analyze(model)


def test_the_model_and_the_random_state_are_left_alone(tiny_llama):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    analyze(model, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_basic_measures_leave_out_what_needs_the_whole_spectrum(tiny_llama):
    basic, whole = (analyze(tiny_llama(), measures=measures, progress=False) for measures in ("basic", "all"))
    assert {row.entropy_deficit for row in basic.rows} == {None}
    assert all(row.entropy_deficit > 0 for row in whole.rows)
    assert (basic.measures, whole.measures) == ("basic", "all")
    assert basic.fingerprint == whole.fingerprint


@pytest.mark.parametrize("stratify", [None, "module_type"])
@pytest.mark.parametrize("keep", [1, 3, 100])
def test_keep_lowest_keeps_the_units_that_a_whole_analysis_ranks_lowest(tiny_llama, keep, stratify):
    model = tiny_llama()
    whole = analyze(model, progress=False)
    kept = analyze(model, keep_lowest=keep, stratify=stratify, progress=False)
    assert {row.name for row in kept.rows} | {unit.name for unit in kept.screened} == {row.name for row in whole.rows}
    strata = {row.module_type for row in whole.rows} if stratify else {None}
    for stratum in strata:
        ranked = sorted(
            (row for row in whole.rows if stratum in (None, row.module_type)), key=lambda row: row.condition_number
        )
        assert {row.name for row in ranked[:keep]} <= {row.name for row in kept.rows}
    for unit in kept.screened:
        assert unit.condition_number_bound <= whole[unit.name].condition_number * (1 + 1e-3)


def test_screening_spares_most_units_a_factorization():
    """Squares among rectangles: their κ is tens of times higher, and a few products show it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"wide{i}": nn.Linear(400, 60) for i in range(3)})
    model.update({f"square{i}": nn.Linear(200, 200) for i in range(3)})
    kept = analyze(model, keep_lowest=3, progress=False)
    assert [row.name for row in kept.rows] == ["wide0.weight", "wide1.weight", "wide2.weight"]
    assert len(kept.screened) == 3


def test_a_screened_report_selects_only_among_what_it_holds(tiny_llama):
    model = tiny_llama()
    whole, kept = analyze(model, progress=False), analyze(model, keep_lowest=5, progress=False)
    assert kept.screened
    names = {row.name for row in kept.rows} & {row.name for row in whole.rows if row.role == "layer"}
    count = min(4, len(names))
    chosen = select_units(kept, num_tensors=count, stratify=None, candidates=names).names
    assert chosen == select_units(whole, num_tensors=count, stratify=None).names
    with pytest.raises(ValueError, match="keep_lowest"):
        select_units(kept, num_tensors=count)
    with pytest.raises(ValueError, match="keep_lowest"):
        select_units(kept, trainable_fraction=0.5, stratify=None)
    assert SpectralReport.from_dict(kept.to_dict()) == kept


def test_keeping_none_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="keep_lowest=0"):
        analyze(tiny_llama(), keep_lowest=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": "entropy"}, "measures='entropy' is unknown: choose one of 'basic', 'all'"),
        ({"keep_lowest": 1, "stratify": "none"}, "stratify='none' is unknown: choose one of 'module_type', None"),
        ({"granularity": "row"}, "granularity is one of tensor, head, not 'row'"),
        ({"names": "0.weight"}, r"names='0.weight' is one string: give a collection such as \['0.weight'\]"),
        ({"names": ["0.weight", "typo", "a"]}, "2 of 3 names are of no weight of Sequential, the first is 'a'"),
    ],
)
def test_unknown_options_and_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        analyze(nn.Sequential(nn.Linear(8, 6)), progress=False, **options)


def test_a_name_that_a_checkpoint_lacks_is_refused_from_the_cache_too(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 of 1 names are of no weight of .*/model, the first is 'typo'"):
            analyze(tmp_path / "model", names=["typo"], cache=tmp_path / "cache", progress=False)
        analyze(tmp_path / "model", cache=tmp_path / "cache", progress=False)


def test_a_name_that_was_skipped_keeps_its_reason(tiny_llama):
    asked = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    report = analyze(tiny_llama(), names=asked, progress=False)
    assert [row.name for row in report.rows] == asked[1:]
    assert {skip.reason for skip in report.skipped if skip.name == asked[0]} == {SkipReason.TIED}
