"""The single-tensor experiment: each tensor moved alone along its direction, and what that gains and damages."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from condft import SpectralRow, analyze
from condft.files.atomic import atomic_path
from condft.recipe.provenance import code_commit, machine, versions
from condft.report import Role
from condft.retention.measures import held_out_text, text_windows
from condft.retention.sampling import sample_from_base
from condft.selection.random_matrix import relative_condition_number
from condft.training import read_metrics
from condft.weights.walk import Unit, iter_units
from scripts.research.config import StudyConfig, digest_of
from scripts.research.damage.continuation import Continuation, FixedText
from scripts.research.gradients import adam_directions, fisher_information, language_loss
from scripts.research.selections import kind_of, layer_of
from scripts.research.store import append_line, claimed, lines_by_name, waiting_for
from scripts.research.tasks import TextTask

VERSION = 1
"""Part of every key: raise it when the experiment computes something else."""
SCORES = "scores"
TENSOR = "tensor"
_NAMES_IN_RECORDS = {"sampled_sequences": "own_sequences", "sampled_tokens": "own_tokens"}


@dataclass(frozen=True)
class Protocol:
    """Everything that determines the figures, except the inputs.

    Attributes:
        seed: Of the training windows, and of the text sampled from the base.
        gradient_batches: German batches that the directions are computed from.
        batch_windows: Windows in each.
        gain_windows: German windows, held out, that the gain is measured on.
        damage_windows: English windows of the same length.
        sampled_sequences: Sequences sampled from the base, for the Fisher information.
        sampled_tokens: Tokens of each.
        relative_norm: ‖ΔW‖/‖W‖ of the first point, the same for all tensors.
        equal_gain: Nats per token. The second point has the norm that should gain this much, judged by the first.
        narrowest: The second norm is at least this many times the first.
        widest: At most this many times: for queries and keys a larger norm soon gains less.
    """

    seed: int = 0
    gradient_batches: int = 12
    batch_windows: int = 2
    gain_windows: int = 6
    damage_windows: int = 4
    sampled_sequences: int = 32
    sampled_tokens: int = 32
    relative_norm: float = 0.01
    equal_gain: float = 0.01
    narrowest: float = 0.1
    widest: float = 2.0

    def digest(self, inputs: str) -> str:
        """16 hex digits over the protocol and the bytes of model and text."""
        return digest_of([VERSION, self.record(), inputs])

    def record(self) -> dict[str, Any]:
        """As plain JSON, under the names of the committed records: a renamed field must not start a new experiment."""
        return {_NAMES_IN_RECORDS.get(name, name): value for name, value in asdict(self).items()}


def second_norm(protocol: Protocol, gain: float) -> float:
    """The norm that reaches `equal_gain` if gain grows with the norm; the widest for a tensor that gained nothing."""
    factor = protocol.equal_gain / gain if gain > 0 else protocol.widest
    return protocol.relative_norm * min(max(factor, protocol.narrowest), protocol.widest)


def spread_order(names: Sequence[str]) -> list[str]:
    """Tensors in an order of which every beginning covers the depth evenly, all types of a layer together.

    Layers follow the van der Corput sequence of base 2: first, middle, quarters, eighths, ...
    """
    layers = sorted({layer_of(name) for name in names})
    bits = max(1, (len(layers) - 1).bit_length())
    fractions = (int(f"{index:0{bits}b}"[::-1], 2) / 2**bits for index in range(2**bits))
    order = list(dict.fromkeys(layers[int(fraction * len(layers))] for fraction in fractions))
    return sorted(names, key=lambda name: (order.index(layer_of(name)), name))


class Experiment:
    """The base model with fixed texts and every tensor's direction; made once a process."""

    def __init__(self, config: StudyConfig, protocol: Protocol, results: Path, workspace: Path) -> None:
        self.config, self.protocol, self.results, self.workspace = config, protocol, results, workspace
        self.task = TextTask(config)
        self.digest = protocol.digest(self.task.inputs)
        self.model = AutoModelForCausalLM.from_pretrained(config.language_model, dtype=torch.float32)
        self.model.requires_grad_(False).eval()
        units = [unit for unit in iter_units(self.model) if isinstance(unit, Unit) and unit.role is Role.LAYER]
        self.names = spread_order([unit.name for unit in units if unit.name.startswith(self.task.layers)])
        with waiting_for(workspace, f"prepare-{self.digest}"):
            if not self._directions.exists() or len(self.lines(SCORES)) < len(self.names):
                self._prepare()
        continuation = Continuation(self.model)
        length = self.task.train[0]["features"].numel()
        english = text_windows(
            self.task.tokenizer,
            held_out_text(config.evaluation.text),
            max_tokens=protocol.damage_windows * length,
            context_length=length,
        )
        self.english = FixedText(continuation, english, with_kl=True)
        self.german = FixedText(continuation, self._held_out(), with_kl=False)

    @property
    def _directions(self) -> Path:
        return self.workspace / f"directions-{self.digest}.safetensors"

    def lines(self, kind: str) -> dict[str, dict[str, Any]]:
        """Name -> line of this experiment, of those that there are by now."""
        return lines_by_name(read_metrics(self.results), kind, self.digest)

    def _held_out(self) -> Tensor:
        windows = torch.cat([batch["input_ids"] for batch in self.task.test])
        count = self.protocol.gain_windows
        return windows[[index * len(windows) // count for index in range(count)]]

    def _train_batches(self) -> list[Tensor]:
        count, size = self.protocol.gradient_batches, self.protocol.batch_windows
        generator = torch.Generator().manual_seed(self.protocol.seed)
        chosen = torch.randperm(len(self.task.train), generator=generator)[: count * size].tolist()
        return list(torch.stack([self.task.train[index]["features"] for index in chosen]).split(size))

    def _prepare(self) -> None:
        """Directions into the workspace, a line of scores for every tensor into the results."""
        protocol = self.protocol
        losses = [partial(language_loss, self.model, tokens) for tokens in self._train_batches()]
        found = adam_directions(self.model, self.names, losses)
        sampled = sample_from_base(
            self.model,
            self.task.tokenizer,
            num_sequences=protocol.sampled_sequences,
            num_tokens=protocol.sampled_tokens,
            seed=protocol.seed,
            progress=False,
        )
        directions = {name: facts.pop("direction") for name, facts in found.items()}
        fisher = fisher_information(self.model, directions, sampled)
        report = analyze(self.model, names=self.names, measures="all", progress=False)
        with atomic_path(self._directions) as temporary:
            save_file(directions, temporary)
        # A preparation that was interrupted may have written some of the lines.
        done = self.lines(SCORES)
        rows = {row.name: row for row in report.rows}
        for name in self.names:
            if name not in done:
                trace, along = fisher[name]
                facts = {**found[name], "fisher_trace": trace, "fisher_along": along}
                self._append({"kind": SCORES, "name": name, **_spectral(rows[name]), **facts})

    def measure(self, name: str) -> None:
        """Moves one tensor, measures at both norms, restores it bit for bit, and appends the line."""
        began, worked = time.perf_counter(), time.process_time()
        weight = self.model.get_parameter(name)
        base = weight.detach().clone()
        with safe_open(self._directions, "pt") as file:
            direction = file.get_tensor(name)
        points: list[dict[str, float | None]] = []

        def measure_at(relative_norm: float) -> float:
            weight.data.copy_(base + direction * (relative_norm * base.norm()))
            german, english = (text.change(layer_of(name)) for text in (self.german, self.english))
            points.append(
                {
                    "relative_norm": relative_norm,
                    "gain": -german.cross_entropy,
                    "gain_error": german.standard_error,
                    "damage_ce": english.cross_entropy,
                    "damage_ce_error": english.standard_error,
                    "damage_kl": english.kl,
                }
            )
            return -german.cross_entropy

        try:
            measure_at(second_norm(self.protocol, measure_at(self.protocol.relative_norm)))
        finally:
            weight.data.copy_(base)
        # wall time in addition: with a busy machine or a stopped process it is longer than processor time
        spent = {"cpu_seconds": time.process_time() - worked, "seconds": time.perf_counter() - began}
        self._append({"kind": TENSOR, "name": name, "points": points, **spent})

    def _append(self, line: dict[str, Any]) -> None:
        facts = {"experiment": self.digest, "seed": self.protocol.seed, "commit": code_commit(), "machine": machine()}
        append_line(self.results, {**line, **facts})

    def describe(self) -> None:
        """The line of the experiment itself, once: protocol, inputs, what the base scores, versions."""
        if not self.lines("experiment"):
            base = {"base_german_ce": self.german.cross_entropy, "base_english_ce": self.english.cross_entropy}
            content = {"protocol": self.protocol.record(), "inputs": self.task.inputs, "versions": versions()}
            self._append({"kind": "experiment", "name": "experiment", **content, **base})


def run_experiment(
    config: StudyConfig, protocol: Protocol, results: Path, workspace: Path, *, only: Sequence[str] | None = None
) -> int:
    """Measures the tensors that are not done yet; several processes may share them. Returns how many this one did."""
    experiment = Experiment(config, protocol, results, workspace)
    with waiting_for(workspace, f"describe-{experiment.digest}"):
        experiment.describe()
    done = 0
    for name in tqdm([name for name in experiment.names if not only or name in only], unit="tensor"):
        with claimed(workspace / "claims", f"{experiment.digest}-{name}") as free:
            if free and name not in experiment.lines(TENSOR):
                experiment.measure(name)
                done += 1
    return done


def _spectral(row: SpectralRow) -> dict[str, Any]:
    assert row.entropy_deficit is not None  # measures="all"
    return {
        "type": kind_of(row.name),
        "layer": layer_of(row.name),
        "shape": list(row.shape),
        "condition_number": row.condition_number,
        "relative_condition_number": relative_condition_number(row.condition_number, *row.matrix_shape),
        "entropy_deficit": row.entropy_deficit / min(row.matrix_shape),
        "stable_rank": row.stable_rank,
        "frobenius_norm": row.frobenius_norm,
    }
