"""The tasks: a base model made anew for every run, what it learns from, and what it is tested on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from condft.files.atomic import atomic_path
from condft.recipe.data import load_speech, usable_examples
from condft.recipe.measure import measure_transcription
from condft.recipe.model import compose
from condft.runtime.model_mode import measuring
from condft.tasks.speech import SpeechCollator, precomputed_features
from condft.training import RunConfig, Stage, make_engine, train_stage
from condft.training.objective import answer_loss_sum, count_answer_tokens
from condft.training.stage import PROJECTOR
from scripts.research.config import StudyConfig, TextSection, digest_of
from scripts.research.store import waiting_for

Batch = Mapping[str, Any]


class Task(Protocol):
    """What a run needs of its task.

    Attributes:
        tokenizer: Of the language model.
        inputs: Digest of the model's and the data's bytes.
        layers: Prefix of the names of the weights that may be trained.
        modules_to_save: Modules that train in every arm.
        train: Training examples.
        collate: Makes a batch of examples.
        test: Batches that the test loss is taken over.
    """

    tokenizer: Any
    inputs: str
    layers: str
    modules_to_save: list[str]

    @property
    def test(self) -> Sequence[Batch]: ...

    @property
    def train(self) -> Sequence[Any]: ...

    def collate(self, examples: list[Any], /) -> Batch: ...

    def fresh(self, seed: int, accelerator: Accelerator) -> Any:
        """A context manager of a new base model, frozen; inside, it can be trained."""

    def error_rates(self, model: Any) -> dict[str, float]:
        """Word error rates, overall and by language; empty for a task without transcriptions."""


class SpeechTask:
    """Task (a): a text LLM learns to transcribe through a frozen speech encoder, whose features are shared."""

    layers = "model.language_model.layers."

    def __init__(self, config: StudyConfig) -> None:
        assert config.speech is not None
        self._config, self._speech, self.modules_to_save = config, config.speech, ["multi_modal_projector"]
        clips = load_speech(self._run_config(0).data, num_test_clips=config.evaluation.num_clips)
        self._seconds = clips.longest_seconds
        model, self._processor = compose(self._run_config(0), max_seconds=self._seconds)
        self.tokenizer = self._processor.tokenizer
        self.collate = SpeechCollator.for_model(
            model, self._processor, prompt=self._speech.prompt, system_prompt=self._speech.system_prompt
        )
        self.train, self._transcribed = (
            usable_examples(model, self.collate, split, self._run_config(0), skip_bad=False, compared=compared)[0]
            for split, compared in ((clips.train, False), (clips.test, True))
        )
        size = config.training.per_device_batch_size
        by_length = sorted(self._transcribed, key=lambda example: len(example["features"]))
        self.test = [self.collate(by_length[start : start + size]) for start in range(0, len(by_length), size)]
        folders = [Path(config.language_model), Path(self._speech.audio_tower)]
        self.inputs = inputs_digest([Path(self._speech.manifest), *map(_weights_file, folders)])

    def _run_config(self, seed: int) -> RunConfig:
        config, speech = self._config, self._speech
        return RunConfig.model_validate(
            {
                "seed": seed,
                "output_dir": config.workspace,
                "model": {
                    "language_model": config.language_model,
                    "audio_tower": speech.audio_tower,
                    "prompt": speech.prompt,
                    "system_prompt": speech.system_prompt,
                },
                "data": {"manifest": speech.manifest},
                "training": config.training.model_dump(),
                "evaluation": config.evaluation.model_dump(),
            }
        )

    @contextmanager
    def fresh(self, seed: int, accelerator: Accelerator) -> Iterator[nn.Module]:
        model, _ = compose(self._run_config(seed), max_seconds=self._seconds)
        model.requires_grad_(False).to(accelerator.device)
        with precomputed_features(model):
            self._load_projector(model, seed, accelerator)
            yield model

    def _load_projector(self, model: Any, seed: int, accelerator: Accelerator) -> None:
        """Stage 1 is the same for all arms of a seed, so its projector is trained once and stored."""
        if not self._config.training.projector_steps:
            return
        projector = model.model.multi_modal_projector
        name = f"projector-{digest_of([self._config.determining(), self.inputs, seed])}"
        path = Path(self._config.workspace) / f"{name}.safetensors"
        with waiting_for(self._config.workspace, name):
            if not path.exists():
                projector.requires_grad_(True)
                rates = {PROJECTOR: self._speech.projector_rate}
                stage = Stage("projector", self._config.training.projector_steps, rates, seed)
                train_stage(make_engine(accelerator), model, self.train, self.collate, stage, self._config.training)
                projector.requires_grad_(False)
                with atomic_path(path) as temporary:
                    save_file({key: value.cpu() for key, value in projector.state_dict().items()}, temporary)
        projector.load_state_dict(load_file(path))

    def error_rates(self, model: Any) -> dict[str, float]:
        report = measure_transcription(model, self.collate, self._transcribed, self._config.evaluation).report
        return {"wer": report.overall, **{f"wer_{name}": rate for name, rate in report.by_language.items()}}


class TextTask:
    """Tasks (b) and (c): an LLM is trained further on prose of another language."""

    layers = "model.layers."

    def __init__(self, config: StudyConfig) -> None:
        assert config.text is not None
        self._config, self.modules_to_save = config, list[str]()
        self.tokenizer = AutoTokenizer.from_pretrained(config.language_model)
        self.train, held_out = _windows(self.tokenizer, config.text)
        size = config.training.per_device_batch_size
        self.test = [self.collate(held_out[start : start + size]) for start in range(0, len(held_out), size)]
        read = [Path(config.text.file), _weights_file(Path(config.language_model))]
        if Path(config.evaluation.text).is_file():  # else a text that ships with Python or lies on the hub
            read.append(Path(config.evaluation.text))
        self.inputs = inputs_digest(read)

    @staticmethod
    def collate(examples: Sequence[Mapping[str, Tensor]]) -> Batch:
        """Whole windows: the loss is over every token but the first."""
        tokens = torch.stack([example["features"] for example in examples])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}

    @contextmanager
    def fresh(self, seed: int, accelerator: Accelerator) -> Iterator[nn.Module]:
        model = AutoModelForCausalLM.from_pretrained(self._config.language_model, dtype=torch.float32)
        yield model.requires_grad_(False).to(accelerator.device)

    def error_rates(self, model: Any) -> dict[str, float]:
        return {}


def make_task(config: StudyConfig) -> Task:
    """The study's task, its data loaded."""
    return SpeechTask(config) if config.speech is not None else TextTask(config)


@contextmanager
def precision(accelerator: Accelerator) -> Iterator[None]:
    """bf16 autocast if the study trains in bf16. accelerate's own wraps `forward` alone and so misses `generate`."""
    enabled = accelerator.mixed_precision == "bf16"
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=enabled):
        yield


@contextmanager
def full_precision(model: Any) -> Iterator[None]:
    """Inside, a model that accelerate has prepared runs without the autocast that it wraps around `forward`."""
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def mean_test_loss(model: Any, task: Task) -> float:
    """Mean cross entropy of the test split's answer tokens, teacher forced, in nats."""
    total, tokens = 0.0, 0
    with measuring(model) as device:
        for batch in task.test:
            total += float(answer_loss_sum(model, send_to_device(batch, device)))
            tokens += int(count_answer_tokens(batch["labels"]))
    return total / tokens


def inputs_digest(files: Sequence[Path]) -> str:
    """16 hex digits over the bytes of the files, in order."""
    hasher = xxhash.xxh3_128()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(2**24):
                hasher.update(piece)
    return hasher.hexdigest()[:16]


def _weights_file(folder: Path) -> Path:
    # A study needs checkpoints that do not change: a folder with a single file of weights, as get_models makes.
    return folder / "model.safetensors"


def _windows(tokenizer: Any, text: TextSection) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    ids = tokenizer(Path(text.file).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // text.window
    if count <= text.test_windows:
        raise ValueError(f"{text.file} has {count} windows of {text.window} tokens; {text.test_windows} are for tests")
    windows = [{"features": torch.tensor(ids[i * text.window : (i + 1) * text.window])} for i in range(count)]
    return windows[: -text.test_windows], windows[-text.test_windows :]
