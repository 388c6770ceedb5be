"""analyze() on live models and folders."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from condft import NonFiniteWeightError, analyze
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


def test_a_convolution_is_analysed_as_one_matrix():
    (row,) = analyze(nn.Conv1d(6, 4, 3, bias=False), progress=False).rows
    assert (row.shape, row.matrix_shape) == ((4, 6, 3), (4, 18))


def test_only_the_names_asked_for(tiny_llama):
    wanted = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    report = analyze(tiny_llama(), names=wanted, progress=False)
    assert {row.name for row in report.rows} == wanted
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
