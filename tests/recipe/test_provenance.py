"""What is noted of the code and the machine."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from condft.recipe import provenance
from condft.recipe.provenance import code_commit, machine, versions


def test_versions_are_those_that_run() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "condft", "peft", "transformers", "accelerate"} <= found.keys()


def test_the_machine_is_described() -> None:
    found = machine()
    assert found["processor"]
    assert 1 <= found["cores"] <= 4096
    assert found["threads"] == torch.get_num_threads()


def test_the_commit_says_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "condft" / "recipe" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert code_commit() is None  # no checkout

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert code_commit() == head
    (tmp_path / "untracked").write_text("")
    assert code_commit() == head
    (tmp_path / "file").write_text("two")
    assert code_commit() == f"{head}-dirty"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "condft" / "recipe" / "provenance.py"))

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(
        provenance, "subprocess", SimpleNamespace(run=missing, CalledProcessError=subprocess.CalledProcessError)
    )
    assert code_commit() is None
