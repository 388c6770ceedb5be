"""pytest plugin: runs PEFT's own tests for one method, CondFT among them, without changing a line of them.

    python -m pytest -p peft_suite.plugin --peft-method condft tests/test_custom_models.py ...

PEFT's suite is driven by module-level lists of cases. Where a `parametrize` mark's values *are* one of those lists
(the same object), they are replaced by the method's cases: for CondFT those of `peft_suite.cases`, for a method of
PEFT's the rows of the list that name its config class. Tests without such a mark, or without a row for the method,
are deselected. `scripts/peft_suite.sh` fetches the suite and calls this.
"""

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest

from condft.files.atomic import write_json
from condft.recipe.provenance import code_commit, machine, versions

from .cases import CONDFT_CASES
from .inapplicable import INAPPLICABLE

METHODS = ("condft", "lora", "lntuning")
_PEFT_CONFIGS = {"lora": peft.LoraConfig, "lntuning": peft.LNTuningConfig}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("PEFT's suite")
    group.addoption("--peft-method", choices=METHODS, default="condft", help="the method to run the suite for")
    group.addoption("--peft-results", type=Path, help="JSON file to write this method's counts into")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Suite(config), "peft_suite")


class Suite:
    """One run of the suite for one method.

    Args:
        config: pytest's, with the options of `pytest_addoption`.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.method: str = config.getoption("--peft-method")
        self.kept: set[str] = set()  # node ids of the test functions that have a row for the method
        self.lists_found: set[tuple[str, str]] = set()
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)  # file -> outcome -> tests
        self.reasons: Counter[str] = Counter()
        self.began = time.perf_counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Puts the method's rows into the marks, before pytest reads them."""
        marks = metafunc.definition.own_markers
        for index, mark in enumerate(marks):
            if mark.name != "parametrize" or len(mark.args) != 2:
                continue
            names, values = mark.args
            rows = self._rows(metafunc.module, values)
            if rows:
                marks[index] = pytest.mark.parametrize(names, rows, **mark.kwargs).mark
                self.kept.add(metafunc.definition.nodeid)

    def _rows(self, module: ModuleType, values: Any) -> list[Any]:
        """The method's rows in the place of `values`; none if they are no list of cases or it has none there."""
        module_name = module.__name__.rpartition(".")[2]
        for (owner, name), rows in CONDFT_CASES.items():
            if owner == module_name and getattr(module, name, None) is values:
                self.lists_found.add((owner, name))
                return rows if self.method == "condft" else _rows_of(_PEFT_CONFIGS[self.method], values)
        return []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if item.nodeid.partition("[")[0] in self.kept]
        self.config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
        if self.method == "condft":
            stale = self._mark_inapplicable(items)
            if not any("::" in argument for argument in self.config.args):  # else a part of a file is meant
                self._refuse_stale(stale, {item.path.stem for item in items})

    def _mark_inapplicable(self, items: Iterable[pytest.Item]) -> set[str]:
        """Skips what the table lists; returns its entries that list nothing."""
        unused = set(INAPPLICABLE)
        for item in items:
            for pattern, reason in INAPPLICABLE.items():
                if re.search(pattern, item.nodeid):
                    unused.discard(pattern)
                    item.add_marker(pytest.mark.skip(reason=f"not applicable to CondFT: {reason}"))
        return unused

    def _refuse_stale(self, patterns: set[str], collected: set[str]) -> None:
        """A new PEFT may rename what the tables name: then nothing of it may go untested without a word."""
        stale = sorted(pattern for pattern in patterns if pattern.partition(r"\.py")[0] in collected)
        if stale:
            raise pytest.UsageError(f"inapplicable.py: no test matches {stale} any more; remove them")
        gone = sorted(key for key in CONDFT_CASES if key[0] in collected and key not in self.lists_found)
        if gone:
            raise pytest.UsageError(f"cases.py: no test is parametrized with {gone} any more; rename or remove them")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[Path(report.nodeid.partition("::")[0]).name][report.outcome] += 1
        if report.skipped:
            self.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def pytest_sessionfinish(self) -> None:
        path: Path | None = self.config.getoption("--peft-results")
        if path is None or hasattr(self.config, "workerinput"):  # the workers of pytest-xdist report to one controller
            return
        write_results(path, self.method, self.counts, self.reasons, time.perf_counter() - self.began)


def _rows_of(config_class: type, values: Iterable[Any]) -> list[Any]:
    """The rows of a list of cases that name `config_class` or hold a config of exactly that class."""
    return [
        row
        for row in values
        if any(
            part is config_class or type(part) is config_class for part in (row if isinstance(row, tuple) else [row])
        )
    ]


def write_results(
    path: Path, method: str, counts: Mapping[str, Counter[str]], reasons: Counter[str], seconds: float
) -> None:
    """Puts one method's counts into the file, beside those of the methods that ran before it."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"methods": {}}
    results |= {"machine": machine(), "commit": code_commit(), "versions": versions()}
    results["methods"][method] = {
        **_outcomes(sum(counts.values(), Counter())),
        "seconds": round(seconds, 1),
        "files": {name: _outcomes(counts[name]) for name in sorted(counts)},
        "skip_reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    }
    write_json(path, results)


def _outcomes(counts: Counter[str]) -> dict[str, int]:
    return {outcome: counts[outcome] for outcome in ("passed", "skipped", "failed")}
