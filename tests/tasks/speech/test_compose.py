"""compose_audio_llm: what was pre-trained arrives untouched, and the result is an ordinary transformers model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import TemplateError
from safetensors.torch import load_file
from transformers import (
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from condft.tasks.speech import Clip, components, compose_audio_llm, read_audio

SpeechLLM = tuple[AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor]
TEXT = "one two"


def logits_of(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_encoder_arrives_bit_for_bit_with_its_window_cut(checkpoints: tuple[str, str], speech_llm: SpeechLLM) -> None:
    model, processor = speech_llm
    saved = load_file(Path(checkpoints[0]) / "model.safetensors")
    encoder = {key.removeprefix("model.encoder."): value for key, value in saved.items() if ".encoder." in key}
    tower = model.model.audio_tower.state_dict()
    assert tower.keys() == encoder.keys()
    for name, weight in tower.items():
        assert torch.equal(weight, encoder[name][: len(weight)]), name
    assert model.config.audio_config.max_source_positions == 2 * 50  # 1.5 s asked for, whole seconds given
    extractor = processor.feature_extractor
    assert (extractor.chunk_length, extractor.n_samples, extractor.nb_max_frames) == (2, 32000, 200)


@pytest.mark.parametrize("tied", [True, False])
def test_language_model_grows_by_one_mean_row(
    checkpoints: tuple[str, str], make_language_model: Callable[..., str], tmp_path: Path, tied: bool
) -> None:
    folder = make_language_model(tmp_path / "llama", tied=tied)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model, processor = compose_audio_llm(checkpoints[0], folder, max_seconds=1)
    rows = plain.config.vocab_size
    assert model.config.audio_token_id == processor.audio_token_id == rows
    assert model.config.text_config.vocab_size == model.lm_head.out_features == rows + 1
    for grown, old in (
        (model.get_input_embeddings().weight, plain.get_input_embeddings().weight),
        (model.lm_head.weight, plain.get_output_embeddings().weight),
    ):
        assert torch.equal(grown[:rows], old)
        torch.testing.assert_close(grown[rows], old.mean(dim=0))
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    ids = processor.tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(logits_of(model, input_ids=ids)[..., :rows], logits_of(plain, input_ids=ids))


def test_a_spare_row_is_used_before_the_vocabulary_grows(
    checkpoints: tuple[str, str], make_language_model: Callable[..., str], tmp_path: Path
) -> None:
    folder = make_language_model(tmp_path / "llama", spare_rows=5)
    before = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    model, _ = compose_audio_llm(checkpoints[0], folder, max_seconds=1)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert model.config.audio_token_id == len(before) - 5


def test_saved_model_loads_with_auto_classes_and_gives_the_same_logits(
    speech_llm: SpeechLLM, clips: list[Clip], tmp_path: Path
) -> None:
    model, processor = speech_llm
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is AudioFlamingo3Processor
    conversation = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Transcribe."}]}]
    batches = []
    for each in (processor, again):
        text = each.apply_chat_template([conversation] * 2, add_generation_prompt=True)
        batches.append(each(text=text, audio=[read_audio(clip) for clip in clips[:2]]))
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    assert torch.equal(logits_of(model, **batches[0]), logits_of(loaded.eval(), **batches[1]))
    assert loaded.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]
    assert loaded.generate(**batches[1], max_new_tokens=3).shape[1] <= batches[1]["input_ids"].shape[1] + 3


def test_projector_depends_on_the_seed_alone_and_global_randomness_is_untouched(
    checkpoints: tuple[str, str], speech_llm: SpeechLLM
) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    same, _ = compose_audio_llm(*checkpoints, max_seconds=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    other, _ = compose_audio_llm(*checkpoints, max_seconds=1, seed=1)
    first, second, third = (components(model)["projector"].state_dict() for model in (speech_llm[0], same, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["linear_1.weight"], third["linear_1.weight"])
    assert not first["linear_2.bias"].any()
    assert first["linear_2.weight"].std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_reaches_every_parameter_but_the_projectors(checkpoints: tuple[str, str], dtype: torch.dtype) -> None:
    model, _ = compose_audio_llm(*checkpoints, max_seconds=1, dtype=dtype)
    projector = components(model)["projector"]
    assert {parameter.dtype for parameter in projector.parameters()} == {torch.float32}
    others = {id(p) for p in model.parameters()} - {id(p) for p in projector.parameters()}
    assert {p.dtype for p in model.parameters() if id(p) in others} == {dtype}
    same, _ = compose_audio_llm(*checkpoints, max_seconds=1)
    expected = components(same)["projector"].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in projector.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_other_language_models_fit(
    checkpoints: tuple[str, str], speech_llm: SpeechLLM, tmp_path: Path, family: str
) -> None:
    vocab_size = len(speech_llm[1].tokenizer) - 1
    if family == "qwen3":
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        plain = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, **small, **heads))
    else:
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
        plain = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **small))
    plain.eval().save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(checkpoints[1]).save_pretrained(tmp_path)
    model, processor = compose_audio_llm(checkpoints[0], str(tmp_path), max_seconds=1)
    ids = processor.tokenizer(TEXT, return_tensors="pt").input_ids
    torch.testing.assert_close(logits_of(model, input_ids=ids)[..., :-1], logits_of(plain, input_ids=ids))


def test_chat_template_takes_strings_and_lists_alike(checkpoints: tuple[str, str], speech_llm: SpeechLLM) -> None:
    processor = speech_llm[1]
    own = AutoProcessor.from_pretrained(checkpoints[1])  # a folder with a tokenizer alone gives that tokenizer
    plain = [{"role": "system", "content": "Short."}, {"role": "user", "content": "<sound>Hi"}]
    listed = [plain[0], {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Hi"}]}]
    expected = own.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    for conversation in (plain, listed):
        assert processor.apply_chat_template(conversation, add_generation_prompt=True) == expected
        rendered = processor.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert rendered == expected
    with pytest.raises(TemplateError, match="text and audio, not image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_a_language_model_without_chat_template_gets_a_plain_one(
    checkpoints: tuple[str, str], make_language_model: Callable[..., str], tmp_path: Path
) -> None:
    folder = make_language_model(tmp_path / "llama")
    (tmp_path / "llama" / "chat_template.jinja").unlink()
    _, processor = compose_audio_llm(checkpoints[0], folder, max_seconds=1)
    conversation = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Hi"}]}]
    rendered = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert rendered == "<|im_start|>User: <sound>Hi\nAssistant:"
    closed = processor.apply_chat_template([*conversation, {"role": "assistant", "content": "Yes"}])
    assert closed == "<|im_start|>User: <sound>Hi\nAssistant: Yes<|im_end|>"


@pytest.mark.parametrize("max_seconds", [0.0, -1.0, 30.5])
def test_window_out_of_range_is_refused(checkpoints: tuple[str, str], max_seconds: float) -> None:
    with pytest.raises(ValueError, match=f"max_seconds is {max_seconds:g}, the window of .* is 30 s"):
        compose_audio_llm(*checkpoints, max_seconds=max_seconds)


def test_wrong_checkpoints_are_refused(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    whisper, llama = checkpoints
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "audio" / "config.json").write_text((Path(llama) / "config.json").read_text())
    with pytest.raises(ValueError, match="'llama' checkpoint; the audio tower must be a Whisper"):
        compose_audio_llm(str(tmp_path / "audio"), llama, max_seconds=1)
    tiny = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(**tiny, intermediate_size=16)).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        with pytest.raises(ValueError, match=f"'{name}' checkpoint, not a decoder-only"):
            compose_audio_llm(whisper, str(tmp_path / name), max_seconds=1)


def test_pickled_weights_are_refused(
    checkpoints: tuple[str, str], make_language_model: Callable[..., str], tmp_path: Path
) -> None:
    folder = Path(make_language_model(tmp_path / "llama"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        compose_audio_llm(checkpoints[0], str(folder), max_seconds=1)
