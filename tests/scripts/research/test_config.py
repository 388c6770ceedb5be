"""A study's YAML: what is checked, and what a run's key is made of."""

import json
from pathlib import Path

import pytest

from scripts.research.config import load_study
from scripts.research.study.arms import ARMS as BUILDERS
from tests.helpers.records.study_lines import STUDIES


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_length_of_answers_that_are_not_given_changes_no_key(path: Path) -> None:
    """Studies on text transcribe nothing; their runs have keys from when the default was 24."""
    study = load_study(path)
    limit = study.determining()["evaluation"]["max_new_tokens"]
    assert limit == (24 if study.text else study.evaluation.max_new_tokens)


def test_an_override_is_a_setting_of_the_file(tmp_path: Path) -> None:
    path = next(path for path in STUDIES if path.stem == "moe_bases")
    changed = load_study(path, ["training.self_distillation.weight=4", "seeds=[3]"])
    assert changed.training.self_distillation is not None
    assert (changed.training.self_distillation.weight, changed.seeds) == (4.0, [3])
    with pytest.raises(ValueError, match=r"training.self_distillation.wieght"):
        load_study(path, ["training.self_distillation.wieght=4"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_ship_are_valid(path: Path) -> None:
    study = load_study(path)
    assert set(study.arms) <= set(BUILDERS)
    # the MoE reads four times the text at every point instead, and less at the end
    enough = {
        "smallest": 2_000,
        "moe": 16_000,
        "moe_second": 16_000,
        "moe_bases": 16_000,
        "pilot_distillation": 2_000,
    }.get(path.stem, 30_000)
    assert study.final_text_tokens >= enough
    moved = study.model_copy(update={"results": "elsewhere", "levels": [9.0], "seeds": [7]})
    assert moved.digest() == study.digest()
    longer = study.model_copy(update={"trainable_fraction": 0.5})
    assert longer.digest() != study.digest()


def test_a_slip_in_a_study_is_named(tmp_path: Path) -> None:
    content = STUDIES[0].read_text().replace("points: [", "points: [0, ")
    (tmp_path / "s.yaml").write_text(content + "\ntypo: 1\n")
    with pytest.raises(ValueError, match="typo"):
        load_study(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ValueError, match="must rise from 1"):
        load_study(tmp_path / "s.yaml")
    with pytest.raises(FileNotFoundError, match="configs/study"):
        load_study(tmp_path / "none.yaml")
    assert json.dumps(load_study(STUDIES[0]).determining())


def test_the_texts_of_the_single_tensors_are_those_of_their_results() -> None:
    """The YAML of task (b) has changed since; with its texts the experiment would start again."""
    study = load_study(STUDIES[0].parents[1] / "damage" / "german.yaml")
    assert (study.training.steps, study.text.test_windows, study.evaluation.text) == (60, 48, "pydoc")
    assert study.arms["full_fine_tuning"].rates == [2e-5, 6e-5, 2e-4]
