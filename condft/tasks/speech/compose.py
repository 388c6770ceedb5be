"""Joins a speech encoder and a text LLM to one of transformers' own audio LLMs, without modeling code of our own.

    model, processor = compose_audio_llm("models/whisper-tiny.en", "models/smollm2-135m-instruct", max_seconds=4)
    model.save_pretrained("speech-llm"), processor.save_pretrained("speech-llm")
    AutoModelForSeq2SeqLM.from_pretrained("speech-llm")  # the Auto class that knows audioflamingo3, head included

Why AudioFlamingo3's classes: the tower has Whisper's encoder parameters one for one (and a pooling without
parameters), the projector is two linear layers, the language model is any that `text_config` describes, and attention
masks the padding of short clips.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.audioflamingo3.modeling_audioflamingo3 import AudioFlamingo3MultiModalProjector
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

__all__ = ["AUDIO_TOKEN", "components", "compose_audio_llm", "encoder_window"]

AUDIO_TOKEN = "<sound>"

# Runs before the LLM's own chat template, which expects strings: turns lists of text and audio items into strings.
# The last tag ends in `+%}`: jinja must not trim the beginning of the template that follows.
_FLATTEN_TEMPLATE = """\
{%- set flattened = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.content is string or message.content is not iterable -%}
    {%- set flattened.messages = flattened.messages + [message] -%}
  {%- else -%}
    {%- set flat = namespace(text='') -%}
    {%- for item in message.content -%}
      {%- if item.type == 'audio' -%}
        {%- set flat.text = flat.text + '<sound>' -%}
      {%- elif item.type == 'text' -%}
        {%- set flat.text = flat.text + item.text -%}
      {%- else -%}
        {{- raise_exception('This model reads text and audio, not ' ~ item.type) -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set flattened.messages = flattened.messages + [dict(message, content=flat.text)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flattened.messages +%}"""

# For a language model without a chat template of its own.
_PLAIN_TEMPLATE = """\
{{- bos_token | default('', true) -}}
{%- for message in messages -%}
  {{- message.role | capitalize + ': ' + message.content -}}
  {{- eos_token if message.role == 'assistant' else '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""


def compose_audio_llm(
    audio_checkpoint: str,
    language_model_checkpoint: str,
    *,
    max_seconds: float,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor]:
    """Joins a Whisper encoder, a new projector and a causal language model.

    The pre-trained tensors are unchanged, bit for bit, after the cast to `dtype`, with three exceptions:

    - The tower's position table is cut to the window.
    - If the language model's embedding has no spare row for the `<sound>` token, embedding and head get one more row,
      the mean of the others.
    - AudioFlamingo3 does not support tied embeddings: **a tied head becomes a copy of the embedding**.

    The projector is in fp32 for any `dtype`, because it trains. (A model that is saved and loaded by transformers has
    one dtype again.) At the end, the logits of plain text are compared with the language model's.

    Args:
        audio_checkpoint: Folder or hub name of any Whisper checkpoint (safetensors).
        language_model_checkpoint: Folder or hub name of a decoder-only causal language model (safetensors).
        max_seconds: Length of the longest clip, in seconds. The tower's window is the next full second. The tower
            always encodes a whole window, so a short one is faster (Whisper's own is 30 s).
        seed: Seed of the projector's initialization. The global random state is neither read nor changed.
        dtype: Dtype of all parameters except the projector's.
        trust_remote_code: Whether a checkpoint may run its own Python code.

    Returns:
        The model, on the CPU in eval mode, and its processor. Both save with `save_pretrained` and load with
        `AutoModelForSeq2SeqLM` and `AutoProcessor`.

    Raises:
        ValueError: `max_seconds` is not positive or above the encoder's window; the audio checkpoint is not a
            Whisper; the language model is not decoder-only, or has an output head that AudioFlamingo3 does not.
        OSError: A checkpoint does not exist or has no safetensors.

    >>> model, processor = compose_audio_llm("whisper", "llama", max_seconds=1.5)
    >>> processor.feature_extractor.chunk_length  # the window, in seconds
    2
    >>> messages = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Transcribe."}]}]
    >>> processor.apply_chat_template(messages, add_generation_prompt=True).splitlines()[-2:]
    ['<sound>Transcribe.<|im_end|>', '<|im_start|>assistant']
    """
    feature_extractor = _cut_feature_extractor(audio_checkpoint, max_seconds)
    with torch.random.fork_rng(devices=[]):  # transformers draws what a checkpoint lacks (Whisper's decoder)
        encoder = _load_encoder(audio_checkpoint, dtype)
        language_model = _load_language_model(language_model_checkpoint, dtype, trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(language_model_checkpoint, trust_remote_code=trust_remote_code)
        audio_token_id = _add_audio_token(tokenizer, language_model)
        config = AudioFlamingo3Config(
            audio_config=_tower_config(encoder, feature_extractor),
            text_config=language_model.config,
            audio_token_id=audio_token_id,
            tie_word_embeddings=False,
        )
        # On the meta device: the values would be drawn only to be replaced by the pre-trained ones below.
        with torch.device("meta"):
            model = AudioFlamingo3ForConditionalGeneration(config)
            model.model.multi_modal_projector = _Projector(config)
        _fill_tower(model.model.audio_tower, encoder)
        _fill_projector(model.model.multi_modal_projector, config, seed)
        _fill_language_model(model, language_model)
    model.config.dtype = dtype
    model.generation_config = _generation_config(language_model, tokenizer)
    model.eval()
    processor = AudioFlamingo3Processor(
        feature_extractor, tokenizer, chat_template=tokenizer.chat_template, audio_token=AUDIO_TOKEN
    )
    return model, processor


def encoder_window(audio_checkpoint: str) -> int:
    """Seconds of the longest clip that a Whisper checkpoint takes.

    Raises:
        OSError: The checkpoint does not exist.
    """
    settings, _ = WhisperFeatureExtractor.get_feature_extractor_dict(audio_checkpoint)
    return WhisperFeatureExtractor(**settings).chunk_length


def components(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of an audio LLM, by name.

    Args:
        model: An `AudioFlamingo3ForConditionalGeneration`, or a module that contains one, such as a PEFT model.

    Returns:
        `audio_tower`, `projector`, `language_model` (without head) and `lm_head`.

    Raises:
        ValueError: The model contains no such model.

    >>> model, _ = compose_audio_llm("whisper", "llama", max_seconds=2)
    >>> {name: sum(p.numel() for p in part.parameters()) for name, part in components(model).items()}
    {'audio_tower': 10160, 'projector': 1600, 'language_model': 23840, 'lm_head': 8320}
    """
    for module in model.modules():
        if isinstance(module, AudioFlamingo3ForConditionalGeneration):
            return {
                "audio_tower": module.model.audio_tower,
                "projector": module.model.multi_modal_projector,
                "language_model": module.model.language_model,
                "lm_head": module.lm_head,
            }
    raise ValueError(f"{type(model).__name__} holds no AudioFlamingo3ForConditionalGeneration")


def _cut_feature_extractor(checkpoint: str, max_seconds: float) -> WhisperFeatureExtractor:
    """Whisper's feature extractor with a window of the next full second of `max_seconds` instead of its own."""
    settings, _ = WhisperFeatureExtractor.get_feature_extractor_dict(checkpoint)
    window = encoder_window(checkpoint)
    if not 0 < max_seconds <= window:
        raise ValueError(
            f"max_seconds is {max_seconds:g}, the window of {checkpoint} is {window} s: "
            f"use a positive number of seconds up to {window}, and split or leave out longer clips"
        )
    # A new one, not a changed one: the constructor computes n_samples and nb_max_frames from chunk_length.
    derived = {"n_samples", "nb_max_frames", "mel_filters", "feature_extractor_type", "processor_class"}
    kept = {key: value for key, value in settings.items() if key not in derived}
    return WhisperFeatureExtractor(**{**kept, "chunk_length": math.ceil(max_seconds), "return_attention_mask": True})


def _load_encoder(checkpoint: str, dtype: torch.dtype) -> WhisperEncoder:
    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type != "whisper":
        raise ValueError(f"{checkpoint} is a {config.model_type!r} checkpoint; the audio tower must be a Whisper")
    encoder_only = config.architectures == ["WhisperEncoder"]
    loader = WhisperEncoder if encoder_only else WhisperModel
    loaded, info = loader.from_pretrained(checkpoint, use_safetensors=True, dtype=dtype, output_loading_info=True)
    # transformers only logs missing tensors and draws them at random. Whisper's decoder is not used and may lack.
    missing = sorted(key for key in info["missing_keys"] if encoder_only or key.startswith("encoder."))
    if missing:
        raise ValueError(f"{checkpoint} lacks {len(missing)} encoder tensors, the first is {missing[0]}")
    return loaded if encoder_only else loaded.encoder


def _load_language_model(checkpoint: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    # Encoders such as BERT have a class with a causal head too, but they attend in both directions.
    if not known or config.is_encoder_decoder or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ValueError(
            f"{checkpoint} is a {config.model_type!r} checkpoint, not a decoder-only causal language model; "
            "use one that AutoModelForCausalLM loads, for example a Llama or Qwen"
        )
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, use_safetensors=True, dtype=dtype, trust_remote_code=trust_remote_code
    )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"{checkpoint} has the output head {head}; AudioFlamingo3's is a Linear without bias")
    return model


def _add_audio_token(tokenizer: PreTrainedTokenizerBase, language_model: PreTrainedModel) -> int:
    """Adds `<sound>`, a padding token and the flattening chat template to the tokenizer, and rows to the embedding."""
    if AUDIO_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.chat_template = _FLATTEN_TEMPLATE + (tokenizer.chat_template or _PLAIN_TEMPLATE)
    embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    tied = head.weight is embedding.weight
    num_rows = max(tokenizer.get_vocab().values()) + 1
    if num_rows > embedding.num_embeddings:
        embedding.weight = _with_mean_rows(embedding.weight, num_rows)
        head.weight = embedding.weight if tied else _with_mean_rows(head.weight, num_rows)
        embedding.num_embeddings = head.out_features = num_rows
        language_model.config.vocab_size = num_rows
    return int(tokenizer.convert_tokens_to_ids(AUDIO_TOKEN))


def _with_mean_rows(weight: nn.Parameter, num_rows: int) -> nn.Parameter:
    # With the mean of the rows, the new token's logit is the mean of the logits: neither likely nor unlikely.
    # transformers' own resizing draws the row at random.
    mean = weight.detach().mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return nn.Parameter(torch.cat([weight.detach(), mean.expand(num_rows - len(weight), -1)]))


def _tower_config(encoder: WhisperEncoder, feature_extractor: WhisperFeatureExtractor) -> AudioFlamingo3EncoderConfig:
    whisper = encoder.config
    return AudioFlamingo3EncoderConfig(
        num_mel_bins=whisper.num_mel_bins,
        num_hidden_layers=whisper.encoder_layers,
        num_attention_heads=whisper.encoder_attention_heads,
        intermediate_size=whisper.encoder_ffn_dim,
        hidden_size=whisper.d_model,
        layerdrop=whisper.encoder_layerdrop,
        dropout=whisper.dropout,
        attention_dropout=whisper.attention_dropout,
        activation_dropout=whisper.activation_dropout,
        activation_function=whisper.activation_function,
        scale_embedding=whisper.scale_embedding,
        initializer_range=whisper.init_std,
        max_source_positions=feature_extractor.nb_max_frames // 2,  # the second convolution has stride 2
    )


def _fill_tower(tower: PreTrainedModel, encoder: WhisperEncoder) -> None:
    weights = encoder.state_dict()
    positions = weights["embed_positions.weight"]
    weights["embed_positions.weight"] = positions[: tower.config.max_source_positions].clone()
    tower.load_state_dict(weights, strict=True, assign=True)  # strict: the names are the same, one for one


class _Projector(AudioFlamingo3MultiModalProjector):
    """transformers' own, in fp32 within a model of any dtype: in bf16, small steps of AdamW would round to nothing."""

    def forward(self, audio_features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = super().forward(audio_features.to(self.linear_1.weight.dtype))
        return projected  # the model casts it to the dtype of its embeddings


def _fill_projector(projector: nn.Module, config: AudioFlamingo3Config, seed: int) -> None:
    """Initializes as transformers does, but from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    std = config.audio_config.initializer_range
    projector.to_empty(device="cpu").float()
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, std, generator=generator)


def _fill_language_model(model: AudioFlamingo3ForConditionalGeneration, language_model: PreTrainedModel) -> None:
    """Puts the language model in without a copy, and checks that its logits of plain text are unchanged."""
    base, head = language_model.base_model, language_model.get_output_embeddings()
    if type(base) is not type(model.model.language_model):
        raise ValueError(
            f"{type(language_model).__name__} holds a {type(base).__name__}, but its configuration describes a "
            f"{type(model.model.language_model).__name__}: it cannot be saved inside an audio LLM"
        )
    # Any tokens will do. The remainder keeps them inside of a vocabulary of fewer than 8.
    tokens = torch.arange(8).remainder(len(head.weight))[None]
    with torch.no_grad():
        # Before the parts are joined: afterwards both models share these modules.
        expected = language_model(tokens).logits
    tied = head.weight is language_model.get_input_embeddings().weight
    model.model.language_model = base
    model.config.text_config = base.config
    model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(head.weight.detach().clone()) if tied else head.weight
    with torch.no_grad():
        actual = model(input_ids=tokens).logits
    if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{type(language_model).__name__} does more than a linear head on its last hidden state (its logits "
            f"differ by up to {(actual - expected).abs().max():g}); AudioFlamingo3 cannot hold it"
        )


def _generation_config(language_model: PreTrainedModel, tokenizer: Any) -> GenerationConfig:
    """Greedy decoding, with the language model's start and stop tokens and the tokenizer's end-of-turn token."""
    own = language_model.generation_config
    listed = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stops = dict.fromkeys([tokenizer.eos_token_id, *listed])  # a set that keeps its order
    stops.pop(None, None)
    return GenerationConfig(
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=list(stops),
        pad_token_id=tokenizer.pad_token_id,
    )
