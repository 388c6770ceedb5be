"""Arms built on a tiny Llama: what trains, and what is refused."""

from functools import partial

import pytest
import torch

from condft import SpectralReport, analyze
from scripts.research.gradients import language_loss
from scripts.research.study.arms import ARMS, Context, build_arm
from tests.helpers.models.tiny_llama import build_tiny_llama

TOKENS = torch.arange(48).reshape(4, 12) % 31
BUILT_DIRECTLY = [name for name in ARMS if name != "projector_only"]


@pytest.fixture(scope="module")
def report() -> SpectralReport:
    model = build_tiny_llama()
    names = [name for name, _ in model.named_parameters() if "layers." in name and "norm" not in name]
    return analyze(model, names=names, measures="all", spectrum=True, progress=False)


def context_of(report: SpectralReport, fraction: float = 0.15) -> Context:
    model = build_tiny_llama().requires_grad_(False)
    losses = [partial(language_loss, model, batch) for batch in TOKENS.split(2)]
    return Context(model, report, fraction, 0, [], TOKENS, losses)


@pytest.mark.parametrize("name", BUILT_DIRECTLY)
def test_an_arm_starts_at_the_base_and_trains_something(name: str, report: SpectralReport) -> None:
    expected = build_tiny_llama()(input_ids=TOKENS).logits
    arm = build_arm(name, context_of(report))
    assert sum(parameter.numel() for parameter in arm.model.parameters() if parameter.requires_grad) > 0
    with torch.no_grad(), arm.base():
        torch.testing.assert_close(arm.model(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=1e-4)


def test_selections_keep_to_the_budget_and_kinds(report: SpectralReport) -> None:
    sizes = {row.name: row.num_parameters for row in report.rows}
    budget = 0.15 * sum(sizes.values())
    for name in ("lowest_within_type", "random_across_types", "attention_only", "spectrum_snr"):
        chosen = build_arm(name, context_of(report)).selected
        assert 0.5 * budget < sum(sizes[unit] for unit in chosen) <= budget + 1, name
        if name == "attention_only":
            assert all("self_attn" in unit for unit in chosen)
    everything = build_arm("full_fine_tuning", context_of(report)).selected
    assert set(everything) == set(sizes)


def test_what_does_not_exist_or_fit_is_refused(report: SpectralReport) -> None:
    with pytest.raises(ValueError, match="no arm 'typo'"):
        build_arm("typo", context_of(report))
    with pytest.raises(ValueError, match="no projector to train alone"):
        build_arm("projector_only", context_of(report))
