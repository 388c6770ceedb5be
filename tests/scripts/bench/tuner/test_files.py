"""What a merged model's speed depends on, and the cache of reports during the benchmark."""

import os
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.tuner.files import kept_reports, layout
from scripts.bench.tuner.models import Adapted
from tests.helpers.models.tiny_models import tiny_moe

WHOLE = ["model.layers.0.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight"]


@pytest.mark.parametrize("before", [None, "off"])
def test_the_cache_is_an_empty_folder_and_is_restored(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONDFT_CACHE", raising=False)
    if before is not None:
        monkeypatch.setenv("CONDFT_CACHE", before)
    with kept_reports():
        assert not list(Path(os.environ["CONDFT_CACHE"]).iterdir())
    assert os.environ.get("CONDFT_CACHE") == before


def test_layout_differs_by_a_wrapper_and_by_a_dtype() -> None:
    base = tiny_moe()
    adapted: Any = Adapted.by_condft(tiny_moe(), WHOLE).model
    assert layout(adapted.base_model.model) != layout(base)
    assert layout(adapted.merge_and_unload()) == layout(base)
    assert layout(tiny_moe().bfloat16()) != layout(base)
