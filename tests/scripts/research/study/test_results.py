"""What a results file holds of a study as it is set up now."""

from pathlib import Path

import pytest

from scripts.research.config import ArmSection, load_study
from scripts.research.store import append_line
from scripts.research.study.plan import RunSpec
from scripts.research.study.results import Results, best_rates
from tests.helpers.records.study_lines import STUDIES, append_run, line, study_of

ARMS = {
    "first": ArmSection(rates=[0.1, 0.2, 0.4], main=True),
}
COMMITTED = {
    "moe": 151,
    "moe_bases": 288,
    "moe_second": 95,
    "pilot_distillation": 6,
    "smallest": 3,
    "speech": 90,
    "text": 106,
}
"""Study -> runs in its results file that it would not do again; of the other lines, settings have changed since."""


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_no_committed_run_is_due_again(path: Path) -> None:
    """Renaming a setting must not change the keys of runs that took days."""
    study = load_study(path)
    assert len(Results(study).runs) == COMMITTED[path.stem]


def test_only_the_points_of_finished_attempts_of_this_study_count(tmp_path: Path) -> None:
    study, spec = study_of(tmp_path), RunSpec("lowest_within_type", 0.1, 0)
    append_line(study.results, line(study, "point", "cut off", spec, step=1, test_loss=9.0, kl_to_base=9.0))
    append_line(study.results, line(study, "point", "whole", spec, step=1, test_loss=1.0, kl_to_base=0.1))
    append_line(study.results, line(study, "run", "whole", spec, status="finished"))
    append_line(study.results, line(study, "run", "whole", RunSpec("no_more", 0.1, 0), status="finished"))
    another = study.model_copy(update={"trainable_fraction": 0.7})
    append_line(study.results, line(another, "run", "whole", spec, status="finished"))
    with Path(study.results).open("a") as file:
        file.write('{"torn')
    results = Results(study)
    (key,) = results.runs
    assert results.curve(key, "kl_to_base") == [(1.0, 0.1)]
    assert results.by_spec() == {spec: key}
    with pytest.raises(ValueError, match="JSON"):
        append_line(study.results, {"loss": float("nan")})


def test_another_self_distillation_is_another_run_in_the_arms_that_have_it_alone(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    plain, distilled = RunSpec("lowest_within_type", 0.1, 0), RunSpec("lowest_within_type_distilled", 0.1, 0)
    for spec in (plain, distilled):
        append_line(study.results, line(study, "run", "whole", spec, status="finished"))
    assert list(Results(study).by_spec()) == [plain, distilled]
    settings = study.training.self_distillation
    assert settings is not None
    heavier = study.training.model_copy(update={"self_distillation": settings.model_copy(update={"weight": 77.0})})
    assert list(Results(study.model_copy(update={"training": heavier})).by_spec()) == [plain]


def test_every_level_has_its_own_best_rate(tmp_path: Path) -> None:
    arms = {"first": ARMS["first"], "unfinished": ArmSection(rates=[0.1, 0.2])}
    study = study_of(tmp_path, arms=arms, seeds=[0, 1], levels=[2.0, 1.0, 1.9])
    for rate, loss, change in ((0.1, 1.8, 0.01), (0.2, 0.9, 0.2), (0.4, 0.5, 0.9)):
        append_run(study, RunSpec("first", rate, 0), [(4.0, 0.0), (loss, change)])
    append_run(study, RunSpec("unfinished", 0.2, 0), [(4.0, 0.0)])
    assert best_rates(study, Results(study)) == {"first": [0.1, 0.2], "unfinished": []}
