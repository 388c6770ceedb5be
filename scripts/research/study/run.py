"""Runs of a study: builds the arm, trains it, measures it at its points, and appends what it finds."""

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm.auto import tqdm

from condft import SpectralReport, analyze
from condft.recipe.provenance import code_commit, machine, versions
from condft.runtime.memory import peak_rss_bytes
from condft.selection.select import CANDIDATE_ROLES
from condft.training import RunConfig, Stage, make_accelerator, make_engine, train_stage
from condft.training.objective import answer_loss_sum, count_answer_tokens
from condft.training.stage import LANGUAGE_MODEL, PROJECTOR, component_of, trainable_parameters
from condft.weights.walk import Unit, iter_units
from scripts.research.config import StudyConfig
from scripts.research.store import append_line, claimed, waiting_for
from scripts.research.study.arms import Arm, Context, build_arm
from scripts.research.study.measure import (
    Baseline,
    make_self_distillation,
    measure_end,
    measure_point,
)
from scripts.research.study.plan import RunSpec, count_runs, plan_runs, run_key
from scripts.research.study.results import Results, best_rates
from scripts.research.tasks import Task, make_task, mean_test_loss, precision

_GRADIENT_BATCHES = 8  # of the arms that select by gradients
_TRAIN_LOSS_STEPS = 8  # a point's train loss is the mean of so many steps


class Study:
    """A study's shared parts, made when the first run needs them."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.accelerator: Accelerator = make_accelerator(
            # the accelerator only looks at training and output_dir
            RunConfig.model_construct(output_dir=config.workspace, training=config.training)
        )
        self._parts: dict[str, Parts] = {}

    def parts(self, seed: int) -> "Parts":
        """What the runs on a seed's base share."""
        config = self.config.of("", seed)
        if config.language_model not in self._parts:
            self._parts[config.language_model] = Parts(config, self.accelerator)
        return self._parts[config.language_model]

    def key(self, spec: RunSpec) -> str:
        determining = self.config.of(spec.arm, spec.seed).determining()
        return run_key(spec, determining, self.parts(spec.seed).task.inputs)

    def run(self, spec: RunSpec) -> None:
        """Does one run and appends its points and its end; a diverged run ends as `failed`, with the reason."""
        # PEFT draws the initial values of LoRA from the global state.
        torch.manual_seed(spec.seed)
        run = _Run(self, spec)
        try:
            ending = run.through()
        except (ValueError, RuntimeError) as error:  # no finite loss, or an arm that this model cannot have
            ending = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        run.append({"kind": "run", **ending, **run.facts(), "seconds": round(time.perf_counter() - run.began, 1)})


class Parts:
    """What the runs on one base share."""

    def __init__(self, config: StudyConfig, accelerator: Accelerator) -> None:
        self._config, self._accelerator = config, accelerator
        self.task: Task = make_task(config)

    @cached_property
    def base(self) -> Baseline:
        return Baseline.of(self._config, self.task, self._accelerator)

    @cached_property
    def report(self) -> SpectralReport:
        """Of the weights that may be trained, spectra and all."""
        path = Path(self._config.workspace) / f"spectra-{self.task.inputs}.json"
        with waiting_for(self._config.workspace, path.stem):
            if not path.exists():
                with self.task.fresh(self._config.seeds[0], self._accelerator) as model:
                    units = [
                        unit for unit in iter_units(model) if isinstance(unit, Unit) and unit.role in CANDIDATE_ROLES
                    ]
                    names = [unit.name for unit in units if unit.name.startswith(self.task.layers)]
                    analyze(model, names=names, measures="all", spectrum=True).save(path)
        return SpectralReport.load(path)


class _Run:
    def __init__(self, study: Study, spec: RunSpec) -> None:
        self.study, self.spec, self.key = study, spec, study.key(spec)
        self.config = study.config.of(spec.arm, spec.seed)
        parts = study.parts(spec.seed)
        # shared by all runs: an error here is no failed run
        self.task, self.base, self.report = parts.task, parts.base, parts.report
        self.attempt = datetime.now(UTC).isoformat(timespec="seconds")
        self.began = time.perf_counter()
        self.losses: list[float] = []
        self.seconds = {"train": 0.0, "measure": 0.0}

    def append(self, line: dict[str, Any]) -> None:
        names = {"key": self.key, "attempt": self.attempt, "study": self.config.digest()}
        spec = {"arm": self.spec.arm, "rate": self.spec.rate, "seed": self.spec.seed}
        append_line(self.config.results, {**line, **names, **spec})

    def through(self) -> dict[str, Any]:
        study, spec = self.study, self.spec
        config, task = self.config, self.task
        with task.fresh(spec.seed, study.accelerator) as model:
            with precision(study.accelerator):
                start = {"test_loss": mean_test_loss(model, task)}
            # no copy differs from the base yet, and a projector does not touch text
            self.append(
                {"kind": "point", "step": 0, **start, "text_ce_change": 0.0, "kl_to_base": 0.0, "cloze_change": 0.0}
            )
            context = Context(
                model=model,
                report=self.report,
                fraction=config.trainable_fraction,
                seed=spec.seed,
                modules_to_save=task.modules_to_save,
                sampled_tokens=self.base.selection_tokens.to(study.accelerator.device),
                losses=self._losses(model),
            )
            arm = build_arm(spec.arm, context)
            parameters = trainable_parameters(arm.model)
            distillation = make_self_distillation(arm, config, task, study.accelerator, seed=spec.seed)
            stage = Stage("adapt", config.training.steps, self._rates(list(parameters)), spec.seed + 1)
            train_stage(
                make_engine(study.accelerator),
                arm.model,
                task.train,
                task.collate,
                stage,
                config.training,
                distillation=distillation,
                on_step=self._after(arm),
            )
            began = time.perf_counter()
            end = measure_end(arm, task, config, self.base, seed=spec.seed)
            self.seconds["measure"] += time.perf_counter() - began
        return {
            "status": "finished",
            **end,
            "trainable_parameters": sum(parameter.numel() for parameter in parameters.values()),
            "selected": list(arm.selected),
            **{f"seconds_{phase}": round(seconds, 1) for phase, seconds in self.seconds.items()},
        }

    def _losses(self, model: Any) -> list[Callable[[], Tensor]]:
        """The base's mean loss over some batches of the training examples, drawn by the seed."""
        task, size = self.task, self.config.training.per_device_batch_size
        generator = torch.Generator().manual_seed(self.spec.seed)
        drawn = torch.randperm(len(task.train), generator=generator)[: _GRADIENT_BATCHES * size].tolist()

        def loss(indices: list[int]) -> Tensor:
            batch = task.collate([task.train[index] for index in indices])
            batch = send_to_device(batch, self.study.accelerator.device)
            return answer_loss_sum(model, batch) / count_answer_tokens(batch["labels"])

        return [partial(loss, drawn[start : start + size]) for start in range(0, len(drawn), size)]

    def _rates(self, names: list[str]) -> dict[str, float]:
        """The arm's rate is the language model's; a projector has one rate in all arms."""
        speech = self.config.speech
        rates = {PROJECTOR: speech.projector_rate if speech else self.spec.rate, LANGUAGE_MODEL: self.spec.rate}
        return {component: rate for component, rate in rates.items() if component in set(map(component_of, names))}

    def _after(self, arm: Arm) -> Callable[[dict[str, Any]], None]:
        study, config = self.study, self.config

        def after(record: dict[str, Any]) -> None:
            step, began = record["step"], time.perf_counter()
            self.losses.append(record["loss"])
            for hook in arm.on_step:
                with precision(study.accelerator):
                    hook(record)
            self.seconds["train"] += record["seconds"] + time.perf_counter() - began
            if step not in config.points:
                return
            began = time.perf_counter()
            figures = measure_point(
                arm, self.task, config, self.base, study.accelerator, transcribe=step in config.wer_points
            )
            self.seconds["measure"] += time.perf_counter() - began
            recent = self.losses[-_TRAIN_LOSS_STEPS:]
            self.append({"kind": "point", "step": step, "train_loss": sum(recent) / len(recent), **figures})

        return after

    def facts(self) -> dict[str, Any]:
        return {
            "inputs": self.task.inputs,
            "commit": code_commit(),
            "versions": versions(),
            "machine": machine(),
            "peak_rss_bytes": peak_rss_bytes(),
        }


def run_study(
    config: StudyConfig, *, only: list[str] | None = None, seeds: list[int] | None = None, max_runs: int | None = None
) -> int:
    """Does the study's runs that are not done yet, in the order of the plan; several processes may share them.

    Args:
        config: The study.
        only: Only these arms.
        seeds: Only these of its seeds.
        max_runs: Stop after so many runs of this process.

    Returns:
        How many runs this process did.

    Raises:
        ValueError: An arm or a seed that the study does not have.
    """
    _check_known("arm", only, config.arms)
    _check_known("seed", seeds, config.seeds)
    study, done = Study(config), 0
    arms = {name: arm for name, arm in config.arms.items() if not only or name in only}
    chosen_seeds = [seed for seed in config.seeds if not seeds or seed in seeds]
    with tqdm(unit="run", desc="study") as bar:
        while max_runs is None or done < max_runs:
            results = Results(config)
            chosen = best_rates(config, results)
            plan = plan_runs(arms, config.seeds, chosen, config.sweep_seeds)
            runs = [spec for spec in plan if spec.seed in chosen_seeds]  # other seeds' bases need not be there yet
            left = [spec for spec in runs if study.key(spec) not in results.runs]
            if len(chosen_seeds) == len(config.seeds):
                bar.total = count_runs(arms, config.seeds, chosen, config.sweep_seeds)
            bar.n = len(runs) - len(left)
            bar.refresh()
            if not any(_do_unless_claimed(study, spec, bar) for spec in left):
                break
            done += 1
    return done


def _check_known(what: str, chosen: Sequence[int | str] | None, known: Iterable[int | str]) -> None:
    if unknown := sorted(set(chosen or []) - set(known), key=str):
        raise ValueError(f"the study has no {what} {unknown[0]!r}: choose among {', '.join(map(str, known))}")


def _do_unless_claimed(study: Study, spec: RunSpec, bar: Any) -> bool:
    """False if another process has the run, or has just finished it."""
    key = study.key(spec)
    with claimed(Path(study.config.workspace) / "claims", key) as free:
        if not free or key in Results(study.config).runs:
            return False
        bar.set_description(str(spec))
        study.run(spec)
        return True
