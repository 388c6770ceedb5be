"""An output folder with a run is refused, kept or cleared, as asked."""

from pathlib import Path

import pytest

from condft.training import prepare_output_dir
from condft.training.output_dir import remove_run


def test_an_output_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    output = prepare_output_dir(tmp_path / "new" / "run")
    assert output.is_dir()
    prepare_output_dir(output)  # empty is fine
    (output / "metrics.jsonl").write_text("{}\n")
    (output / "adapter").mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"run already holds a run \(metrics.jsonl, adapter\); .*--overwrite"):
        prepare_output_dir(output)
    prepare_output_dir(output, resume=True)
    assert (output / "adapter").exists()
    prepare_output_dir(output, overwrite=True)
    assert (output / "adapter").exists()  # until the new run can begin
    remove_run(output)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        prepare_output_dir(output / "notes.txt")
    with pytest.raises(ValueError, match="give one of them"):
        prepare_output_dir(output, resume=True, overwrite=True)
