"""The plugin on small suites of PEFT's shape: what it rewrites, drops, counts and refuses."""

import json
from pathlib import Path

import peft  # noqa: F401 (pytester forgets what a run imported, and numpy cannot be imported again)
import pytest

pytest_plugins = ["pytester"]

SUITE = """
import pytest
from peft import IA3Config, LoraConfig

ALL_CONFIGS = [(LoraConfig, {"task_type": "FEATURE_EXTRACTION"}), (IA3Config, {})]

@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("config_cls, config_kwargs", ALL_CONFIGS)
def test_rows(config_cls, config_kwargs, number):
    print("ran", config_cls.__name__, number)
    if number == 2:
        pytest.skip("not for two")

@pytest.mark.parametrize("config_cls, config_kwargs", list(ALL_CONFIGS))
def test_equal_but_another_list(config_cls, config_kwargs):
    raise AssertionError("must not run")

def test_without_rows():
    raise AssertionError("must not run")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch) -> pytest.Pytester:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    pytester.makepyfile(test_feature_extraction_models=SUITE)
    return pytester


def run(suite: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return suite.runpytest_inprocess("-p", "peft_suite.plugin", "-p", "no:cacheprovider", "-s", *arguments)


def test_only_the_very_list_is_rewritten_and_nothing_else_runs(suite):
    result = run(suite)
    result.assert_outcomes(passed=2, skipped=2, deselected=3)  # two rows of CondFT's, each with both numbers
    assert "ran CondFTConfig 1" in result.stdout.str()
    assert "LoraConfig" not in result.stdout.str()


def test_a_method_of_pefts_runs_its_own_rows(suite):
    result = run(suite, "--peft-method", "lora")
    result.assert_outcomes(passed=1, skipped=1, deselected=3)
    assert "ran LoraConfig 1" in result.stdout.str()


def test_a_method_without_rows_runs_nothing(suite):
    assert run(suite, "--peft-method", "lntuning").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_counts_and_reasons_of_each_method_go_into_one_file(suite):
    path = suite.path / "results.json"
    for method in ("condft", "lora"):
        run(suite, "--peft-method", method, "--peft-results", str(path))
    methods = json.loads(path.read_text())["methods"]
    assert {name: [methods[name][key] for key in ("passed", "skipped", "failed")] for name in methods} == {
        "condft": [2, 2, 0],
        "lora": [1, 1, 0],
    }
    assert methods["condft"]["skip_reasons"] == {"not for two": 2}
    assert methods["condft"]["files"]["test_feature_extraction_models.py"]["passed"] == 2


def test_what_is_listed_as_inapplicable_is_skipped_with_its_reason(suite, monkeypatch):
    from peft_suite.inapplicable import INAPPLICABLE

    monkeypatch.setitem(INAPPLICABLE, r"test_feature_extraction_models\.py::test_rows\[.*1\]", "one is odd")
    result = run(suite, "-rs")
    result.assert_outcomes(skipped=4, deselected=3)
    result.stdout.fnmatch_lines(["*not applicable to CondFT: one is odd*"])


def test_an_entry_without_a_test_is_an_error(suite, monkeypatch):
    from peft_suite.inapplicable import INAPPLICABLE

    monkeypatch.setitem(INAPPLICABLE, r"test_feature_extraction_models\.py::test_gone", "was there once")
    result = run(suite)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_gone*any more; remove them*"])


def test_a_list_that_pefts_suite_no_longer_has_is_an_error(suite, monkeypatch):
    from peft_suite.cases import CONDFT_CASES

    monkeypatch.setitem(CONDFT_CASES, ("test_feature_extraction_models", "OTHER_CONFIGS"), [])
    result = run(suite)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*OTHER_CONFIGS*any more*"])
