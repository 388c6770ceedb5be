"""A frozen tower's features, computed once and kept on disk; the model then trains on them without its tower.

    features = compute_features(model, processor, clips)
    with precomputed_features(model):          # the tower steps aside for a module that hands features through
        trainer.train(...)                     # stock forward and generate, any engine

A file a clip: `<cache>/<fingerprint of the tower>/<first two digits>/<sha256 of the audio>.safetensors`.
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
from condft.tasks.speech.data import Clip, SkippedClip, SpeechDataError, read_audio

logger = logging.getLogger(__name__)

# Part of every fingerprint: raise it when decoding or the way features are computed changes.
_FORMAT = 1
# Settings that say where a checkpoint came from, not what it computes.
_NOT_NUMERIC = ("_name_or_path", "transformers_version", "architectures", "dtype", "processor_class")


def default_cache_dir() -> Path:
    """`$CONDFT_CACHE/features`, else `condft/features` in the user's cache folder (XDG).

    `CONDFT_CACHE=off` concerns reports; features must lie somewhere, since all ranks read them from there.
    """
    return cache_folder() / "features"


def tower_fingerprint(tower: nn.Module, feature_extractor: Any) -> str:
    """What the features depend on besides the audio: weights, architecture, window, mel settings.

    Args:
        tower: An audio tower with a transformers `config`.
        feature_extractor: The one that feeds it.

    Returns:
        64 hex digits.
    """
    digest = hashlib.sha256()
    config: Any = tower.config
    for settings in (config.to_dict(), feature_extractor.to_dict()):
        numeric = {key: value for key, value in settings.items() if key not in _NOT_NUMERIC}
        digest.update(json.dumps([_FORMAT, numeric], sort_keys=True, default=str).encode())
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
    """The audio tower's last hidden state of every clip, from the cache where it holds it.

    Under `torch.distributed` each rank computes its own share first and then reads what the others wrote; a share
    that is not to be seen (cache folders on separate disks) is computed here too. Several jobs may share a cache.

    Args:
        model: An audio LLM with its tower in place, on the device to compute on. Not modified.
        processor: Its processor.
        clips: None longer than the processor's window.
        cache_dir: Root of the cache; None means `default_cache_dir()`.
        batch_size: Clips a forward pass.
        progress: Show a progress bar (rank 0 only, and only if there is something to compute).
        skipped: Takes the clips that cannot be decoded or are too short, which then have no tensor; without it they
            are errors.

    Returns:
        A tensor a clip, in the order given: `(num_audio_tokens, tower_dim)` fp32 on the CPU, padding cut off.

    Raises:
        SpeechDataError: A clip cannot be decoded, is longer than the window, or too short for a single feature;
            see `skipped`.
        ValueError: The model has no audio tower.
    """
    owner = _tower_owner(model)
    tower, extractor = owner.audio_tower, processor.feature_extractor
    if isinstance(tower, PassThroughTower):
        raise ValueError("the audio tower is swapped out: call compute_features outside of precomputed_features")
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = root / tower_fingerprint(tower, extractor)
    paths = [folder / digest[:2] / f"{digest}.safetensors" for digest in (clip.audio_sha256 for clip in clips)]
    wanted = dict(zip(paths, clips, strict=True))  # equal recordings are computed once
    features = {path: tensor for path in wanted if (tensor := _load(path, tower.config.hidden_size)) is not None}
    order = sorted(wanted)  # by hash: any stride through it is a fair share
    group = ProcessGroup()
    _check_lengths([wanted[path] for path in order if path not in features], extractor)

    # Shares of all clips, not of the missing ones: a rank that looks later already sees what a quicker one wrote.
    share = {path: wanted[path] for path in order[group.rank :: group.size] if path not in features}
    bad: dict[Path, SpeechDataError] | None = None if skipped is None else {}
    features |= _compute_share(tower, extractor, share, batch_size, progress and group.first, bad)
    if group.size > 1:
        group.barrier()
        for path in order:
            if path not in features and (tensor := _load(path, tower.config.hidden_size)) is not None:
                features[path] = tensor
        # the unusable ones of the others' shares too: every rank finds out for itself
        unseen = {path: wanted[path] for path in order if path not in features}
        features |= _compute_share(tower, extractor, unseen, batch_size, progress and group.first, bad)
    if skipped is not None and bad:
        for path, clip in zip(paths, clips, strict=True):
            if path in bad:  # of equal recordings, the message names the one that was decoded
                reason = str(bad[path]).removeprefix(f"{wanted[path].source}: ")
                skipped.append(SkippedClip(clip.source, reason))
    return [features[path] for path in paths if path in features]


class PassThroughTower(nn.Module):
    """Stands in for an audio tower: takes its features where mel features are expected and hands them on.

    `forward(input_features, input_features_mask)` gets `(batch, num_audio_tokens, tower_dim)` and
    `(batch, num_audio_tokens)`. Features are cast to `dtype`, the tower's own, as the projector expects them.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(
        self, input_features: Tensor, input_features_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Keyword arguments meant for a real tower (`return_dict`, attention options) change nothing here."""
        return BaseModelOutputWithPooling(last_hidden_state=input_features.to(self.dtype))

    def _get_feat_extract_output_lengths(self, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        return input_lengths, input_lengths


@contextmanager
def precomputed_features(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, `model` takes `compute_features`' output in place of mel features; afterwards all is as before.

    The tower leaves the model meanwhile: it is not moved, sharded, counted or saved with it.

    Args:
        model: An audio LLM, also wrapped by PEFT. Enter before FSDP or DDP wrap it.

    Yields:
        The same model.

    Raises:
        ValueError: The model has no audio tower.
    """
    owner = _tower_owner(model)
    tower = owner.audio_tower
    stand_in = PassThroughTower(next(tower.parameters()).dtype).train(tower.training)
    owner.audio_tower = stand_in
    try:
        yield model
    finally:
        owner.audio_tower = tower


def _tower_owner(model: nn.Module) -> Any:
    for module in model.modules():
        if "audio_tower" in module._modules:  # not hasattr: PEFT's wrappers answer for what they wrap
            return module
    raise ValueError(f"{type(model).__name__} holds no audio_tower")


def _check_lengths(clips: Sequence[Clip], extractor: Any) -> None:
    """Whisper's extractor would cut a longer clip in silence."""
    for clip in clips:
        if clip.seconds * extractor.sampling_rate > extractor.n_samples + 1:  # 1: resampling rounds up
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
    """Encodes clips and writes each to its path at once: an interrupted run goes on where it stopped.

    `bad` takes what is wrong with clips that cannot be used; without it the first of them is an error.
    """
    features: dict[Path, Tensor] = {}
    paths = list(share)
    with tqdm(total=len(paths), desc="Audio features", unit="clip", disable=not (progress and paths)) as shown:
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
    return [row[:length].float().cpu().clone() for row, length in zip(hidden, lengths.tolist(), strict=True)]


def _save(path: Path, features: Tensor) -> None:
    with atomic_path(path) as temporary:
        save_file({"features": features}, temporary)


def _load(path: Path, tower_dim: int) -> Tensor | None:
    """A cached clip; None if there is none, or (with a warning) if the file is damaged."""
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
