"""Pre-trains a small fused-expert MoE from scratch, and writes every weight's spectral facts while it learns."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from condft import analyze
from condft.files.atomic import atomic_directory, atomic_path
from condft.files.yaml import parse_yaml
from condft.recipe.provenance import code_commit, machine, versions
from condft.retention.measures import held_out_text, text_cross_entropy
from condft.selection.scores import score_of
from condft.training import read_metrics
from scripts.research.config import digest_of
from scripts.research.store import append_line
from scripts.research.tasks import inputs_digest

_END_OF_TEXT = "<|endoftext|>"
_TRAIN_LOSS_STEPS = 20  # a point's train loss is the mean of so many steps
_MAX_GRAD_NORM, _BETAS, _LAST_RATE = 1.0, (0.9, 0.95), 0.1


class PretrainingConfig(BaseModel):
    """A pre-training run.

    Attributes:
        output: Folder of the finished checkpoint, with its tokenizer; `{seed}` in it is the seed.
        workspace: Folder of the state that an interrupted run goes on from; may be deleted afterwards.
        results: JSONL that the points are appended to.
        train_text: UTF-8 prose; the vocabulary is made from it too.
        held_out_text: UTF-8 prose that is not trained on.
        vocabulary: Tokens of the byte-level BPE.
        model: Arguments of `Qwen3MoeConfig`.
        window: Tokens of a training example.
        points: Steps after which every weight is measured; 0 is the initialization.
        seed: Of the initialization and of the order of the text.
        held_out_tokens: That every point reads.
        save_every: Steps between two saved states.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str
    workspace: str
    results: str
    train_text: str
    held_out_text: str
    vocabulary: int = Field(ge=257)
    model: dict[str, Any]
    window: int = Field(ge=8)
    batch_size: int = Field(ge=1)
    steps: int = Field(ge=1)
    warmup_steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    seed: int = 0
    points: list[int] = Field(min_length=2)
    held_out_tokens: int = Field(ge=2)
    save_every: int = Field(ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "PretrainingConfig":
        if self.points != sorted(set(self.points)) or self.points[0] != 0 or self.points[-1] != self.steps:
            raise ValueError(f"points {self.points} must rise from 0 to steps={self.steps}")
        return self

    def key(self) -> str:
        """16 hex digits over everything that determines the run's figures, the texts' bytes too."""
        places = {"output", "workspace", "results", "train_text", "held_out_text", "save_every"}
        texts = inputs_digest([Path(self.train_text), Path(self.held_out_text)])
        return digest_of([self.model_dump(mode="json", exclude=places), texts])


def load_config(path: Path, *, seed: int | None = None) -> PretrainingConfig:
    """Reads and checks a YAML of configs/pretraining/; `seed` replaces the file's."""
    config = PretrainingConfig.model_validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    chosen = config.seed if seed is None else seed
    return config.model_copy(update={"seed": chosen, "output": config.output.replace("{seed}", str(chosen))})


def points_of(config: PretrainingConfig, key: str | None = None) -> list[dict[str, Any]]:
    """The points of a run that the results file holds, in the order of the steps, each step once.

    Args:
        config: Of the run.
        key: Of the run; by default that of the last line, so that a report needs no texts.
    """
    if not Path(config.results).is_file():
        return []
    lines = [line for line in read_metrics(config.results) if line["kind"] == "point"]
    by_step = {line["step"]: line for line in lines if line["key"] == (key or lines[-1]["key"])}
    return [by_step[step] for step in sorted(by_step)]


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a text: any other text can be written in it, only longer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[_END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END_OF_TEXT, pad_token=_END_OF_TEXT)


def learning_rate(config: PretrainingConfig, step: int) -> float:
    """Of a step (the first is 1): a linear rise, then half a cosine down to a tenth."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2)


class Pretraining:
    """One run, from its start or from where it was interrupted."""

    def __init__(self, config: PretrainingConfig) -> None:
        self.config, self.key = config, config.key()
        self.commit = code_commit()  # read now: the checkout may change during the run
        text = held_out_text(config.train_text)
        self.tokenizer = train_tokenizer(text, config.vocabulary)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        count = len(ids) // config.window
        self.windows = torch.tensor(ids[: count * config.window]).view(count, config.window)
        torch.manual_seed(config.seed)
        end = self.tokenizer.eos_token_id
        settings = {**config.model, "vocab_size": len(self.tokenizer), "bos_token_id": end, "eos_token_id": end}
        self.model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, output_router_logits=True))
        self.optimizer = torch.optim.AdamW(self._groups(), lr=config.learning_rate, betas=_BETAS)
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()
        self._state = Path(config.workspace) / f"{self.key}.pt"
        if self._state.exists():
            self._load()

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        decay = self.config.weight_decay
        return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]

    def run(self) -> None:
        """Trains to the end, measures at the points, saves the checkpoint; what is there already is not done again."""
        config = self.config
        measured = {point["step"] for point in points_of(config, self.key)}
        with tqdm(total=config.steps, initial=self.step, desc="pre-training", unit="step") as bar:
            while True:
                # First: a run that was interrupted before a measurement makes up for it when it continues.
                if self.step in config.points and self.step not in measured:
                    append_line(config.results, self._measure())
                if self.step == config.steps:
                    break
                self._train_step()
                bar.update()
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                if self.step % config.save_every == 0 or self.step == config.steps:
                    self._save()
        self._finish()

    def _batch(self, step: int) -> Tensor:
        """Every window once an epoch, in an order drawn by seed and epoch."""
        size, per_epoch = self.config.batch_size, len(self.windows) // self.config.batch_size
        epoch, index = divmod(step - 1, per_epoch)
        # A large factor, so that no epoch of one seed has the order of an epoch of the next.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.windows), generator=generator)
        return self.windows[order[index * size : (index + 1) * size]]

    def _train_step(self) -> None:
        began = time.perf_counter()
        self.model.train()
        self.step += 1
        tokens = self._batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        output = self.model(input_ids=tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRAD_NORM, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # the loss of the text alone, without what balances the experts
        loss = float(output.loss.detach() - self.model.router_aux_loss_coef * output.aux_loss.detach())
        self.losses = [*self.losses[1 - _TRAIN_LOSS_STEPS :], loss]
        self.seconds += time.perf_counter() - began

    def _measure(self) -> dict[str, Any]:
        """The point of the present step; raises ValueError where a weight's figures are not finite."""
        config, began = self.config, time.perf_counter()
        report = analyze(self.model, measures="all", cache=False, progress=False)
        held_out = text_cross_entropy(
            self.model,
            self.tokenizer,
            held_out_text(config.held_out_text),
            max_tokens=config.held_out_tokens,
            context_length=config.window,
            progress=False,
        )
        weights = {
            row.name: {
                "module_type": row.module_type,
                "role": str(row.role),
                "shape": list(row.shape),
                "condition_number": row.condition_number,
                "relative_condition_number": score_of(row, "relative_condition_number"),
                "log_volume": row.log_volume,
                "entropy_deficit": row.entropy_deficit,
                "stable_rank": row.stable_rank,
                "frobenius_norm": row.frobenius_norm,
            }
            for row in report.rows
        }
        return {
            "kind": "point",
            "key": self.key,
            "seed": config.seed,
            "step": self.step,
            "tokens": self.step * config.batch_size * config.window,
            "train_loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "held_out_loss": held_out.nats_per_token,
            "held_out_tokens": held_out.num_tokens,
            "seconds_training": round(self.seconds, 1),
            "seconds_measuring": round(time.perf_counter() - began, 1),
            "commit": self.commit,
            "weights": weights,
        }

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        with atomic_path(self._state) as temporary:
            torch.save(state, temporary)

    def _load(self) -> None:
        state = torch.load(self._state, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]

    def _finish(self) -> None:
        self.model.config.output_router_logits = False  # the loss that balances the experts is for pre-training only
        with atomic_directory(self.config.output) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        weights = inputs_digest([Path(self.config.output) / "model.safetensors"])
        lines = read_metrics(self.config.results)
        if any(line["kind"] == "run" and line["key"] == self.key for line in lines):
            return
        append_line(
            self.config.results,
            {
                "kind": "run",
                "key": self.key,
                "seed": self.config.seed,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
                "train_tokens": self.windows.numel(),
                "seconds_training": round(self.seconds, 1),
                "weights_digest": weights,
                "commit": self.commit,
                "versions": versions(),
                "machine": machine(),
            },
        )
