"""pytest plugin: runs PEFT's own tests for one method, CondFT among them, without changing a line of them.

    python -m pytest -p peft_suite.plugin --peft-method condft tests/test_custom_models.py ...

PEFT's suite is driven by module-level lists of cases. Where a `parametrize` mark's values *are* one of those lists
(the same object), they are replaced by the method's cases: for CondFT those of `peft_suite.cases`, for a method of
PEFT's the rows of the list that name its config class. Tests without such a mark, or without a row for the method,
are deselected. `scripts/peft_suite.sh` fetches the suite and calls this.
"""

import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest

from condft.files import write_json
from condft.recipe.summary import code_commit, machine, versions
from peft_suite.cases import CONDFT_CASES
from peft_suite.inapplicable import INAPPLICABLE

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
        self.counts: Counter[str] = Counter()
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
            if owner == module_name and getattr(module, name) is values:
                return rows if self.method == "condft" else _rows_of(_PEFT_CONFIGS[self.method], values)
        return []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if item.nodeid.partition("[")[0] in self.kept]
        self.config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
        if self.method == "condft":
            self._mark_inapplicable(items)

    def _mark_inapplicable(self, items: Iterable[pytest.Item]) -> None:
        """Skips what the table lists, and refuses an entry that lists nothing any more."""
        unused = set(INAPPLICABLE)
        for item in items:
            for pattern, reason in INAPPLICABLE.items():
                if re.search(pattern, item.nodeid):
                    unused.discard(pattern)
                    item.add_marker(pytest.mark.skip(reason=f"not applicable to CondFT: {reason}"))
        collected = {item.path.name for item in items}
        stale = sorted(pattern for pattern in unused if pattern.partition("::")[0].replace("\\", "") in collected)
        if stale and not any("::" in argument for argument in self.config.args):
            raise pytest.UsageError(f"tests/peft_suite/inapplicable.py: no test matches {stale} any more; remove it")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
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


def write_results(path: Path, method: str, counts: Counter[str], reasons: Counter[str], seconds: float) -> None:
    """Adds one method's counts to the file; those of an earlier run of the same command stay beside it."""
    import json

    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"methods": {}}
    results |= {"command": "bash scripts/peft_suite.sh --all", "machine": machine(), "commit": code_commit()}
    results["versions"] = versions()
    results["methods"][method] = {
        **{outcome: counts[outcome] for outcome in ("passed", "skipped", "failed")},
        "seconds": round(seconds, 1),
        "skip_reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    }
    write_json(path, results)
