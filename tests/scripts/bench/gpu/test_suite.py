"""Counts of a JUnit file."""

from pathlib import Path

from scripts.bench.gpu.suite import counts_of

REPORT = """<testsuites><testsuite>
<testcase classname="a" name="one"/>
<testcase classname="a" name="two"><failure message="no"/></testcase>
<testcase classname="b" name="three"><error message="no"/></testcase>
<testcase classname="b" name="four"><skipped/></testcase>
</testsuite></testsuites>"""


def test_failures_and_errors_are_named(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert counts_of(tmp_path / "report.xml") == {"passed": 1, "skipped": 1, "failed": ["a::two", "b::three"]}
