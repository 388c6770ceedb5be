"""Features of a frozen audio tower: computed once, kept on disk, and fed to the model instead of audio.

    features = compute_features(model, processor, clips)
    with precomputed_features(model):          # replaces the tower by a module that passes features on
        trainer.train(...)                     # the stock forward and generate, on any engine

One file for each clip: `<cache>/<fingerprint of the tower>/<first two digits>/<SHA-256 of the audio>.safetensors`.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from condft.files.atomic import atomic_path
from condft.files.cache_folder import cache_folder
from condft.files.hashing import update_hash
from condft.runtime.process_group import ProcessGroup
from condft.tasks.speech.clips import Clip, SkippedClip, SpeechDataError, read_audio

__all__ = [
    "PassThroughTower",
    "compute_features",
    "default_cache_dir",
    "precomputed_features",
    "tower_fingerprint",
]

logger = logging.getLogger(__name__)

# Part of every fingerprint. Raise it when decoding or the computation of features changes: old files are then unused.
_FORMAT = 1
# Settings that say where a checkpoint came from, and do not change what it computes.
_NOT_NUMERIC = ("_name_or_path", "transformers_version", "architectures", "dtype", "processor_class")


def default_cache_dir() -> Path:
    """The folder `features` in condft's cache folder; see `condft.files.cache_folder`."""
    return cache_folder() / "features"


def tower_fingerprint(tower: nn.Module, feature_extractor: Any) -> str:
    """SHA-256 (64 hex digits) of what features depend on besides the audio.

    That is: the tower's weights and architecture, its window, and the settings of the mel spectrogram.

    Args:
        tower: An audio tower with a transformers `config`.
        feature_extractor: The feature extractor of its processor.
    """
    digest = hashlib.sha256()
    config: Any = tower.config
    for settings in (config.to_dict(), feature_extractor.to_dict()):
        numeric = {key: value for key, value in settings.items() if key not in _NOT_NUMERIC}
        digest.update(json.dumps([_FORMAT, numeric], sort_keys=True, default=str).encode())
    # update_hash includes the dtype, which is therefore not needed among the settings above.
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} ".encode())
        update_hash(digest, tensor)
    return digest.hexdigest()


def compute_features(
    model: nn.Module,
    processor: Any,
    clips: Sequence[Clip],
    *,
    cache_dir: str | Path | None = None,
    batch_size: int = 16,
    progress: bool = True,
    skipped: list[SkippedClip] | None = None,
) -> list[Tensor]:
    """The audio tower's last hidden state of every clip, from the cache if it is there.

    Under `torch.distributed` each process computes its own share and then reads the files of the others. If it does
    not see them (the cache folders are on separate disks), it computes their shares too. Several jobs may use a cache
    at the same time.

    Args:
        model: An audio LLM with its tower, on the device to compute on. It is not modified.
        processor: Its processor.
        clips: The clips. None may be longer than the processor's window.
        cache_dir: Root of the cache; None means `default_cache_dir()`.
        batch_size: Clips of a forward pass.
        progress: Show a progress bar (in the first process, and only if there is something to compute).
        skipped: A list that takes the clips which cannot be decoded or are too short; they get no tensor. Without a
            list they are errors.

    Returns:
        One tensor for each clip, in the order given: `(num_audio_tokens, tower_dim)`, fp32, on the CPU, without
        padding. A Whisper tower makes 25 audio tokens of a second.

    Raises:
        SpeechDataError: A clip is longer than the window; or it cannot be decoded or is too short for one feature, and
            there is no `skipped`.
        ValueError: The model has no audio tower.

    >>> from condft.tasks.speech import compose_audio_llm, load_manifest
    >>> model, processor = compose_audio_llm("whisper", "llama", max_seconds=2)
    >>> clips = load_manifest("clips/manifest.jsonl").clips
    >>> features = compute_features(model, processor, clips, progress=False)
    >>> clips[1].seconds, features[1].shape
    (1.5, torch.Size([37, 16]))
    """
    owner = _tower_owner(model)
    tower, extractor = owner.audio_tower, processor.feature_extractor
    if isinstance(tower, PassThroughTower):
        raise ValueError("the audio tower is replaced: call compute_features outside of precomputed_features")
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = root / tower_fingerprint(tower, extractor)
    paths = [folder / digest[:2] / f"{digest}.safetensors" for digest in (clip.audio_sha256 for clip in clips)]
    by_path = dict(zip(paths, clips, strict=True))  # equal recordings are computed once
    features = {path: tensor for path in by_path if (tensor := _load(path, tower.config.hidden_size)) is not None}
    order = sorted(by_path)  # by hash: every n-th path is a random share of the clips, long ones and short ones
    group = ProcessGroup()
    _check_lengths([by_path[path] for path in order if path not in features], extractor)

    # Shares of all clips, not of the missing ones: a process that looks later already sees files of a faster one, and
    # the shares would overlap.
    share = {path: by_path[path] for path in order[group.rank :: group.size] if path not in features}
    bad: dict[Path, SpeechDataError] | None = None if skipped is None else {}
    features |= _compute_share(tower, extractor, share, batch_size, progress and group.first, bad)
    if group.size > 1:
        group.barrier()
        for path in order:
            if path not in features and (tensor := _load(path, tower.config.hidden_size)) is not None:
                features[path] = tensor
        # Also the unusable clips of the other shares, for which there is no file: every process needs them in `bad`.
        unseen = {path: by_path[path] for path in order if path not in features}
        features |= _compute_share(tower, extractor, unseen, batch_size, progress and group.first, bad)
    if skipped is not None and bad:
        for path, clip in zip(paths, clips, strict=True):
            if path in bad:  # the message may name another clip with the same recording, which was the one decoded
                reason = str(bad[path]).removeprefix(f"{by_path[path].source}: ")
                skipped.append(SkippedClip(clip.source, reason))
    return [features[path] for path in paths if path in features]


class PassThroughTower(nn.Module):
    """Replaces an audio tower: takes features where the tower takes mel features, and passes them on.

    `forward(input_features, input_features_mask)` gets `(batch, num_audio_tokens, tower_dim)` and
    `(batch, num_audio_tokens)`. Features are cast to `dtype`, the tower's own, as the projector expects.

    >>> tower = PassThroughTower(torch.bfloat16)
    >>> tower(torch.zeros(2, 10, 16)).last_hidden_state.dtype
    torch.bfloat16
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(
        self, input_features: Tensor, input_features_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Passes the features on. Arguments for a real tower (`return_dict`, attention options) have no effect."""
        return BaseModelOutputWithPooling(last_hidden_state=input_features.to(self.dtype))

    def _get_feat_extract_output_lengths(self, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        return input_lengths, input_lengths  # transformers computes the number of audio tokens by this method


@contextmanager
def precomputed_features(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, `model` takes the output of `compute_features` instead of mel features.

    The tower is not in the model during that time: it is not moved, sharded, counted or saved with it. Afterwards it
    is back.

    Args:
        model: An audio LLM, wrapped by PEFT or not. Enter the context before FSDP or DDP wrap it.

    Yields:
        The same model.

    Raises:
        ValueError: The model has no audio tower.

    >>> from condft.tasks.speech import SpeechCollator, compose_audio_llm, load_manifest, make_examples
    >>> model, processor = compose_audio_llm("whisper", "llama", max_seconds=2)
    >>> clips = load_manifest("clips/manifest.jsonl").clips
    >>> examples = make_examples(clips, compute_features(model, processor, clips, progress=False))
    >>> batch = SpeechCollator.for_model(model, processor)(examples)
    >>> with precomputed_features(model):
    ...     loss = model(**batch).loss
    >>> loss.isfinite().item()
    True
    """
    owner = _tower_owner(model)
    tower = owner.audio_tower
    owner.audio_tower = PassThroughTower(next(tower.parameters()).dtype).train(tower.training)
    try:
        yield model
    finally:
        owner.audio_tower = tower


def _tower_owner(model: nn.Module) -> Any:
    for module in model.modules():
        if "audio_tower" in module._modules:  # not hasattr: PEFT's wrappers have the attributes of what they wrap
            return module
    raise ValueError(f"{type(model).__name__} holds no audio_tower")


def _check_lengths(clips: Sequence[Clip], extractor: Any) -> None:
    """Refuses clips longer than the window: Whisper's extractor would cut them without a warning."""
    for clip in clips:
        if clip.seconds * extractor.sampling_rate > extractor.n_samples + 1:  # + 1: resampling rounds up
            raise SpeechDataError(
                f"{clip.source}: the clip lasts {clip.seconds:.2f} s, the model's window is "
                f"{extractor.chunk_length} s. Compose the model with a larger max_seconds, "
                "or load the clips with a smaller one."
            )


def _compute_share(
    tower: Any,
    extractor: Any,
    share: dict[Path, Clip],
    batch_size: int,
    progress: bool,
    bad: dict[Path, SpeechDataError] | None,
) -> dict[Path, Tensor]:
    """Encodes clips. Each batch is written at once, so an interrupted run continues after the last one.

    `bad` takes the errors of clips that cannot be used; without it the first of them is raised.
    """
    features: dict[Path, Tensor] = {}
    paths = list(share)
    with tqdm(total=len(paths), desc="audio features", unit="clip", disable=not (progress and paths)) as shown:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            audio: dict[Path, np.ndarray] = {}
            for path in batch:
                try:
                    audio[path] = _decode(tower, extractor, share[path])
                except SpeechDataError as error:
                    if bad is None:
                        raise
                    bad[path] = error
            if audio:
                for path, tensor in zip(audio, _encode(tower, extractor, list(audio.values())), strict=True):
                    _save(path, tensor)
                    features[path] = tensor
            shown.update(len(batch))
    return features


def _decode(tower: Any, extractor: Any, clip: Clip) -> np.ndarray:
    audio = read_audio(clip, extractor.sampling_rate)
    frames = torch.tensor(math.ceil(len(audio) / extractor.hop_length))
    if tower._get_feat_extract_output_lengths(frames)[1] < 1:
        raise SpeechDataError(
            f"{clip.source}: the clip lasts {clip.seconds:.3f} s, too short for one feature (0.04 s)"
        )
    return audio


@torch.no_grad()
def _encode(tower: Any, extractor: Any, audio: list[np.ndarray]) -> list[Tensor]:
    parameter = next(tower.parameters())
    mel = extractor(audio, sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="pt")
    mask = mel["attention_mask"]
    _, lengths = tower._get_feat_extract_output_lengths(mask.sum(-1))
    training = tower.training
    tower.eval()
    try:
        hidden = tower(
            mel["input_features"].to(parameter.device, parameter.dtype),
            input_features_mask=mask.to(parameter.device),
            return_dict=True,
        ).last_hidden_state
    finally:
        tower.train(training)
    # clone: for an fp32 tower on the CPU the row is a view, which would keep the whole padded batch in memory.
    return [row[:length].float().cpu().clone() for row, length in zip(hidden, lengths.tolist(), strict=True)]


def _save(path: Path, features: Tensor) -> None:
    with atomic_path(path) as temporary:
        save_file({"features": features}, temporary)


def _load(path: Path, tower_dim: int) -> Tensor | None:
    """The cached features of a clip; None if there is no file, or (with a warning) if it is damaged."""
    if not path.exists():
        return None
    try:
        features = load_file(path).get("features")
    except SafetensorError as error:
        logger.warning("%s is damaged (%s); computing it again", path, error)
        return None
    if features is None or features.ndim != 2 or features.shape[1] != tower_dim or features.dtype != torch.float32:
        logger.warning("%s does not hold features of %d dimensions; computing it again", path, tower_dim)
        return None
    return features
