"""A finished run, loaded and measured again: its figures and its logits are those of the run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from condft.recipe import evaluate_run, load_run, run
from condft.recipe.model import compose
from tests.helpers.processes import ROOT
from tests.helpers.runs import answer_logits


def test_a_saved_adapter_gives_the_same_logits_in_a_fresh_process(
    configure: Callable[..., Any], tmp_path: Path
) -> None:
    """And the base's own under disable_adapter, bit for bit."""
    _, config = configure()
    run(config, cpu=True)
    model, processor, _ = load_run(tmp_path / "run")
    adapted = answer_logits(model, processor, config)
    base, _ = compose(config, max_seconds=1.0)
    with model.disable_adapter():
        assert torch.equal(answer_logits(model, processor, config), answer_logits(base, processor, config))
    torch.save(adapted, tmp_path / "logits.pt")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from tests.helpers.runs import answer_logits\n"
        "from condft.recipe import load_run\n"
        "torch.set_num_threads(1)\n"
        "model, processor, config = load_run(sys.argv[2] + '/run')\n"
        "logits = answer_logits(model, processor, config)\n"
        "assert torch.equal(logits, torch.load(sys.argv[2] + '/logits.pt', weights_only=True))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path)], check=True)


def test_evaluate_agrees_with_the_run(configure: Callable[..., Any], tmp_path: Path, parts: dict[str, str]) -> None:
    _, config = configure()
    summary = run(config, cpu=True)
    figures = evaluate_run(tmp_path / "run")
    assert figures["wer"] == summary["wer_after"]
    assert figures["text_ce"] == pytest.approx(summary["text_ce_after"], rel=1e-12)
    assert figures["text_ce_base"] == pytest.approx(summary["text_ce_before"], rel=1e-12)
    assert figures["kl_to_base"] == pytest.approx(summary["kl_to_base"], rel=1e-12)
    assert evaluate_run(tmp_path / "run", manifest=parts["manifest"], split="train")["num_clips"] == 8
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        evaluate_run(tmp_path)
