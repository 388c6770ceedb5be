"""Word error rate: normalization, known corpora, bounds; transcription of prompt batches, also on two ranks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condft.tasks.speech.wer import normalize, transcribe, word_error_rate

words = st.lists(st.sampled_from(["eins", "zwei", "drei", "one", "two"]), min_size=1, max_size=6).map(" ".join)


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("  Four, FIVE.\tSix! ", "four five six"),
        ("Dreißig; STRAẞE", "dreißig straße"),
        ("don't — don’t", "dont dont"),
        ("twenty-one", "twenty one"),
        ("U\u0308ber", "über"),  # decomposed
        ("ﬁve ５", "five 5"),
        ("…", ""),
    ],
)
def test_normalize(raw: str, plain: str) -> None:
    assert normalize(raw) == plain


@given(st.text())
def test_normalize_is_idempotent(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert once == once.strip()
    assert "  " not in once


def test_corpus_level_by_language() -> None:
    report = word_error_rate(
        ["One two three four", "eins zwei", "fünf"],
        ["one two, three five six", "", "fünf."],
        ["en", "de", "de"],
    )
    assert report.overall == pytest.approx(4 / 7)  # not the mean of 0.5, 1 and 0
    assert report.by_language == {"de": pytest.approx(2 / 3), "en": pytest.approx(2 / 4)}
    assert list(report.by_language) == ["de", "en"]
    assert (report.num_clips, report.num_words) == (3, 7)
    assert (report.substitutions, report.deletions, report.insertions) == (1, 2, 1)


def test_inventing_words_exceeds_one() -> None:
    assert word_error_rate(["one"], ["two three four"]).overall == 3
    assert word_error_rate(["one"], ["two three four"]).by_language == {}


@given(st.lists(st.tuples(words, words), min_size=1, max_size=5))
def test_bounds(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert word_error_rate(references, references).overall == 0
    assert word_error_rate(references, [""] * len(pairs)).overall == 1
    counts = [(len(r.split()), len(h.split())) for r, h in pairs]
    report = word_error_rate(references, hypotheses)
    assert abs(sum(r - h for r, h in counts)) / report.num_words <= report.overall
    assert report.overall <= sum(max(r, h) for r, h in counts) / report.num_words


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"reference 1 \('\.'\) has no word"):
        word_error_rate(["one", "."], ["one", "two"])
    with pytest.raises(ValueError, match="2 references, 1 hypotheses and no languages"):
        word_error_rate(["one", "two"], ["one"])
    with pytest.raises(ValueError, match="1 references, 1 hypotheses and 2 languages"):
        word_error_rate(["one"], ["one"], ["en", "de"])
    with pytest.raises(ValueError, match="no clips"):
        word_error_rate([], [])


def left_padded(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    return {**batch, "texts": texts}  # what rides along is not handed to the model


def test_transcribe_equals_greedy_decoding_one_by_one(tiny_llama: Any, tokenizer: Any) -> None:
    model = tiny_llama(3).train()
    frozen_part = model.model.layers[0].eval()
    prompts = ["one", "a longer prompt", "x y", "last"]
    expected = []
    with torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            for _ in range(5):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            expected.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip())
    batches = [left_padded(tokenizer, prompts[:3]), left_padded(tokenizer, prompts[3:])]
    model.generation_config.eos_token_id = None  # all five tokens, whatever they are
    model.generation_config.temperature = 0.7
    assert transcribe(model, tokenizer, batches, max_new_tokens=5, progress=False) == expected
    assert model.training
    assert not frozen_part.training
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        transcribe(model, tokenizer, batches, max_new_tokens=0)


WORKER = """
import json, sys
import torch
from accelerate import PartialState
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from condft.tasks.speech.wer import transcribe

torch.set_num_threads(1)
state = PartialState(cpu=True)
folder = sys.argv[1]
model, tokenizer = LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
batches = [dict(tokenizer([text], return_tensors="pt", return_token_type_ids=False)) for text in "abcde"]
texts = transcribe(model, tokenizer, batches, max_new_tokens=4, progress=False)
json.dump(texts, open(f"{folder}/{state.process_index}-of-{state.num_processes}.json", "w"))
state.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_processes_share_the_batches_and_each_gets_all_texts(tiny_llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    subprocess.run([*torchrun, str(tmp_path / "worker.py"), str(tmp_path)], check=True, timeout=120)
    batches = [left_padded(tokenizer, [text]) for text in "abcde"]
    expected = transcribe(model, tokenizer, batches, max_new_tokens=4, progress=False)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}-of-2.json").read_text()) == expected
