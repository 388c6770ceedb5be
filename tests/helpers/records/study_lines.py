"""Results files of studies that nobody ran."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.research.config import StudyConfig, load_study
from scripts.research.store import append_line
from scripts.research.study.plan import RunSpec, run_key
from tests.helpers.processes import ROOT

STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))


def study_of(tmp_path: Path, **changes: Any) -> StudyConfig:
    """A study that ships, with its results elsewhere and other settings."""
    study = load_study(next(path for path in STUDIES if path.stem == "moe_bases"))
    own = {"results": str(tmp_path / "results.jsonl"), "language_model": "the same for all seeds"}
    return study.model_copy(update={**own, **changes})


def line(study: StudyConfig, kind: str, attempt: str, spec: RunSpec, **content: Any) -> dict[str, Any]:
    """As the study writes it."""
    key = run_key(spec, study.of(spec.arm, spec.seed).determining(), "i")
    return {"kind": kind, "key": key, "attempt": attempt, "inputs": "i", **asdict(spec), **content}


def append_run(study: StudyConfig, spec: RunSpec, curve: Sequence[tuple[float, float]]) -> None:
    """A finished run that goes through (test loss, forgetting by either measure)."""
    for step, (loss, value) in enumerate(curve):
        figures = {"test_loss": loss, "text_ce_change": value, "kl_to_base": value, "cloze_change": 0.0}
        append_line(study.results, line(study, "point", "a", spec, step=step, **figures))
    end = {"status": "finished", "seconds": 1, "seconds_train": 1, "commit": None, "trainable_parameters": 1}
    append_line(study.results, line(study, "run", "a", spec, **end))
