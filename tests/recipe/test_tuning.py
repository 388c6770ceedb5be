"""The `tuning` section becomes a config, and the config a selection from the run's own report."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from condft.analysis.analyze import analyze
from condft.recipe.model import compose
from condft.recipe.tuning import analyze_base, select_and_wrap, tuning_config
from condft.training import make_accelerator, make_engine
from tests.helpers.calls import count_calls

PROJECTOR = "multi_modal_projector"


def test_the_language_model_is_selected_from_and_the_projector_trains() -> None:
    tuned = tuning_config({"trainable_fraction": 0.2}, seed=3)
    assert (tuned.trainable_fraction, tuned.seed, tuned.modules_to_save) == (0.2, 3, [PROJECTOR])
    assert tuned.target_modules == r"model\.language_model\.layers\..*"
    own = tuning_config({"seed": 5, "target_modules": ["q_proj"]}, seed=3)
    assert (own.seed, own.target_modules) == (5, ["q_proj"])


@pytest.mark.parametrize(
    ("key", "hint"), [("trainable_fracton", "did you mean 'tuning.trainable_fraction'"), ("xyz", "valid: ")]
)
def test_an_unknown_key_names_the_nearest(key: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key 'tuning.{key}'; {hint}"):
        tuning_config({key: 1}, seed=0)


@pytest.mark.parametrize("key", ["report", "peft_type", "inference_mode"])
def test_what_the_recipe_sets_is_not_configurable(key: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key 'tuning.{key}'"):
        tuning_config({key: 1}, seed=0)


def test_the_selection_is_made_from_the_report_of_the_run(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = configure()
    model, processor = compose(config, max_seconds=1.0)
    tuning = tuning_config(config.tuning, seed=config.seed)
    analysis = analyze_base(model, processor.tokenizer, tuning, config, progress=False)
    assert analysis.seconds > 0
    analyses = count_calls(monkeypatch, analyze)
    engine = make_engine(make_accelerator(config, cpu=True))
    wrapped = select_and_wrap(model, tuning, analysis.report, engine)
    assert analyses == []
    assert tuning.report_fingerprint == analysis.report.fingerprint
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(tuning.target_units or ()) + 4  # the projector's two layers with their biases
    assert torch.equal(wrapped.get_base_model().lm_head.weight, compose(config, max_seconds=1.0)[0].lm_head.weight)
