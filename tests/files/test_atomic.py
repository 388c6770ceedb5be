"""Atomic writes: all of the new content or all of the old, and nothing left lying about."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest

from condft.files.atomic import atomic_directory, atomic_path, write_json, write_text


def test_an_error_keeps_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="half way"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_keeps_the_old_folder(tmp_path):
    target = tmp_path / "d"
    with atomic_directory(target) as folder:
        (folder / "x").write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_directory(target) as folder:
        (folder / "y").write_text("half")
        raise RuntimeError("half way")
    assert os.listdir(target) == ["x"]
    with atomic_directory(target) as folder:
        (folder / "z").write_text("new")
    assert os.listdir(target) == ["z"]
    assert os.listdir(tmp_path) == ["d"]


def test_a_folder_is_no_place_for_a_file(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(IsADirectoryError, match="/d is a folder"):
        write_text(tmp_path / "d", "x")
    assert os.listdir(tmp_path) == ["d"]


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": math.nan})
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_the_old_content(tmp_path):
    """A real process, killed by a signal in the middle of writing."""
    target = tmp_path / "report.json"
    write_text(target, "old")
    code = (
        "import sys, time\nfrom condft.files.atomic import atomic_path\n"
        f"with atomic_path({str(target)!r}) as t:\n"
        "    t.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    time.sleep(0.05)
    assert target.read_text() == "old"


def test_written_files_are_readable_by_others(tmp_path):
    write_text(tmp_path / "a", "x")
    expected = tmp_path / "b"
    expected.write_text("x")
    assert (tmp_path / "a").stat().st_mode == expected.stat().st_mode
