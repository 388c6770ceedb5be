"""The tests that are marked `gpu`, as one part of the check."""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from scripts.bench.gpu.part import Place, Result

__all__ = ["counts_of", "gpu_tests"]


def gpu_tests(place: Place) -> Result:
    """`pytest -m gpu`; tests that need two devices skip themselves on one. On the CPU all of them skip themselves."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # at small size one file is enough: collecting all of them takes a minute
        command += ["tests/integration/test_cuda.py"] * place.small
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-1000:]}")
        counts = counts_of(report)
    problems = [f"failed: {name}" for name in counts["failed"]]
    if place.device == "cuda" and not counts["passed"]:
        problems.append("no test ran")
    return {**counts, "problems": problems}


def counts_of(report: Path) -> Result:
    """Passed and skipped tests, and the names of those that failed, of a JUnit file."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return {"passed": len(cases) - len(failed) - len(skipped), "skipped": len(skipped), "failed": names}
