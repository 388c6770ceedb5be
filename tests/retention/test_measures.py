"""Forgetting: cross-entropy against the model's own loss, sampling against the model's own law, KL against sums."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from condft.retention.measures import held_out_text, kl_to_base, text_cross_entropy, text_windows

TEXT = "The quick brown fox jumps over the lazy dog; " * 20


class CharacterTokenizer:
    """The tokenizer's interface as far as windows need it, for texts of any length."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}


def adapted(model: Any, scale: float = 0.5) -> Any:
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return peft_model


@given(st.integers(2, 300), st.integers(2, 400), st.integers(2, 64))
def test_windows_are_whole_disjoint_and_within_budget(length: int, max_tokens: int, context: int) -> None:
    windows = text_windows(CharacterTokenizer(), "x" * length, max_tokens=max_tokens, context_length=context)
    flat = windows.flatten().tolist()
    assert flat == sorted(set(flat))
    assert windows.shape[1] == min(context, length)
    assert windows.numel() <= max(max_tokens, windows.shape[1])
    assert all(row[-1] - row[0] == windows.shape[1] - 1 for row in windows.tolist())


def test_windows_spread_over_the_text() -> None:
    windows = text_windows(CharacterTokenizer(), "x" * 1000, max_tokens=40, context_length=10)
    assert windows[:, 0].tolist() == [0, 250, 500, 750]


def test_cross_entropy_is_the_models_own_loss(tiny_llama: Any, tokenizer: Any) -> None:
    model = tiny_llama(7).train()
    windows = text_windows(tokenizer, TEXT, max_tokens=300, context_length=50)
    with torch.no_grad():
        expected = model(input_ids=windows, labels=windows).loss.item()
    result = text_cross_entropy(
        model, tokenizer, TEXT, max_tokens=300, context_length=50, batch_size=4, progress=False
    )
    assert result.num_tokens == 6 * 49
    assert result.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_a_text_shorter_than_a_window_is_read_whole(tiny_llama: Any, tokenizer: Any) -> None:
    result = text_cross_entropy(tiny_llama(), tokenizer, "short", max_tokens=100, context_length=50, progress=False)
    assert result.num_tokens == 4
    with pytest.raises(ValueError, match="held-out text of 1 tokens"):
        text_cross_entropy(tiny_llama(), tokenizer, "s", max_tokens=100, context_length=50)


def test_a_model_gone_to_nan_is_an_error(tiny_llama: Any, tokenizer: Any) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the text cross-entropy is nan"):
        text_cross_entropy(model, tokenizer, TEXT, max_tokens=20, context_length=10, progress=False)
    with pytest.raises(ValueError, match="the KL divergence to the base is nan"):
        kl_to_base(model, torch.ones(1, 4, dtype=torch.long), nullcontext, progress=False)


def test_kl_is_zero_for_an_untouched_adapter_and_as_defined_for_another(tiny_llama: Any) -> None:
    tokens = torch.randint(0, 96, (5, 9), generator=torch.Generator().manual_seed(3))
    untouched = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert kl_to_base(untouched, tokens, untouched.disable_adapter, progress=False) == 0

    model, base = adapted(tiny_llama()), tiny_llama()
    with torch.no_grad():
        ours = model(input_ids=tokens[:, :-1]).logits.double().log_softmax(-1)
        theirs = base(input_ids=tokens[:, :-1]).logits.double().log_softmax(-1)
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    measured = kl_to_base(model, tokens, model.disable_adapter, batch_size=2, progress=False)
    assert expected > 1e-4
    assert measured == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match=r"tokens of shape \(5, 1\)"):
        kl_to_base(model, tokens[:, :1], model.disable_adapter)


def test_pydoc_is_much_english_text() -> None:
    text = held_out_text("pydoc")
    assert text == held_out_text("pydoc")
    assert len(text) > 400_000
    assert " the " in text


def test_text_files_and_their_errors(tmp_path: Path) -> None:
    path = tmp_path / "held_out.txt"
    path.write_text("Größe", encoding="utf-8")
    assert held_out_text(str(path)) == "Größe"
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"held_out\.txt is empty"):
        held_out_text(str(path))
    with pytest.raises(FileNotFoundError, match="'wikitxt' is no file and none of: pydoc, wikitext"):
        held_out_text("wikitxt")


def test_wikitext_without_a_hub_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match=r"WikiText-2 is not cached, and the hub does not answer .* evaluation\.text: pydoc"
    ):
        held_out_text("wikitext")
