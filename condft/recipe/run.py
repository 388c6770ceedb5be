"""The recipe: compose, analyze, select, tune, adapt, measure. One call, one folder of results.

accelerate launch scripts/train.py --config configs/quickstart.yaml
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from peft import PeftModel, get_peft_model

from condft.analysis.analyze import analyze
from condft.files.atomic import atomic_directory, write_json, write_text
from condft.plots import plot_condition_numbers, plot_training
from condft.recipe.build import Speech, compose, load_speech, tuning_config, usable_examples, window_of
from condft.recipe.measure import (
    check_text,
    kl_on_sampled_text,
    make_self_distillation,
    measure_fisher,
    measure_hearing,
    measure_text,
    warn_of_cut_answers,
)
from condft.recipe.summary import code_commit, machine, print_summary, versions
from condft.report import SpectralReport
from condft.runtime.memory import peak_rss_bytes
from condft.tasks.speech import SpeechCollator, SpeechExample, clips_digest, precomputed_features
from condft.training import (
    FreezeReport,
    RunConfig,
    checksum_tensors,
    compare,
    find_checkpoint,
    frozen_tensors,
    make_accelerator,
    prepare_output_dir,
    read_metrics,
    remove_run,
    train,
)
from condft.training.checkpoint import load_trained
from condft.training.engines.make import make_engine

__all__ = ["ADAPTER", "CONFIG", "run"]

ADAPTER, CONFIG = "adapter", "config.yaml"


@dataclass
class _Parts:
    """What a run works on. `model` is the composed audio LLM until `_tune` wraps it.

    `inputs` are digests that a checkpoint must share to be resumed; `_tune` adds the base model's.
    """

    model: Any
    processor: Any
    collator: SpeechCollator
    speech: Speech
    train: list[SpeechExample]
    test: list[SpeechExample]
    checksums: dict[str, str]
    total_parameters: int
    inputs: dict[str, str]
    freeze: FreezeReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def run(config: RunConfig, *, resume: bool = False, overwrite: bool = False, cpu: bool = False) -> dict[str, Any]:
    """Runs the recipe on every rank and leaves its results in `config.output_dir`.

    Args:
        config: The run.
        resume: Continue the run in the output folder from its newest checkpoint.
        overwrite: Delete the run in the output folder, as soon as this one is ready to write its first file.
        cpu: Stay on the CPU even where there is a GPU.

    Returns:
        What `summary.json` holds.

    Raises:
        FileExistsError: The output folder holds a run and neither flag is given.
        ValueError: Configuration, data or model do not fit; the message names the thing and the way out.
        RuntimeError: A frozen tensor changed, against every intention.
    """
    began = time.perf_counter()
    tuning_config(config.tuning, seed=config.seed)  # a slip in the YAML is told before anything is loaded
    accelerator = make_accelerator(config, cpu=cpu)
    output_dir = prepare_output_dir(config.output_dir, resume=resume, overwrite=overwrite)
    if resume:  # one of another run is refused before anything is written over that run's own
        find_checkpoint(config, num_processes=accelerator.num_processes)
    parts = _prepare(config, accelerator)
    report = _tune(parts, config, accelerator)
    if resume:  # and one of other inputs, now that they are known
        checkpoint = find_checkpoint(config, num_processes=accelerator.num_processes)
        if checkpoint is not None:
            checkpoint.check_inputs(parts.inputs)
    if accelerator.is_main_process:
        if overwrite:  # not earlier: all that a new run may fail on at once has succeeded by now
            remove_run(output_dir)
        _leave_report(parts, config, output_dir, report)
    measured = _adapt(parts, config, accelerator, resume)
    freeze = parts.freeze
    assert freeze is not None  # _adapt sets it
    parts.seconds["seconds_total"] = time.perf_counter() - began
    summary = measured | _facts(parts, config, accelerator, freeze)
    if accelerator.is_main_process:
        _leave(parts, config, output_dir, summary)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if not freeze.unchanged:
        first = (freeze.changed + freeze.missing)[0]
        raise RuntimeError(
            f"{len(freeze.changed)} frozen tensors changed and {len(freeze.missing)} are gone, the first is {first}: "
            "a bug in condft; the figures of this run do not count"
        )
    return summary


def _prepare(config: RunConfig, accelerator: Accelerator) -> _Parts:
    speech = load_speech(config.data, num_test_clips=config.evaluation.num_clips, window=window_of(config))
    model, processor = compose(config, max_seconds=speech.longest_seconds)
    collator = SpeechCollator.for_model(
        model, processor, prompt=config.model.prompt, system_prompt=config.model.system_prompt
    )
    check_text(processor.tokenizer, config.evaluation, max_length=collator.max_length)
    model.to(accelerator.device)
    skip_bad = config.data.skip_bad
    train_split, bad_train = usable_examples(model, collator, speech.train, config, skip_bad=skip_bad, compared=False)
    test_split, bad_test = usable_examples(model, collator, speech.test, config, skip_bad=skip_bad, compared=True)
    speech = speech.without(bad_train, bad_test)
    warn_of_cut_answers(collator, test_split, config.evaluation)
    return _Parts(
        model=model,
        processor=processor,
        collator=collator,
        speech=speech,
        train=train_split,
        test=test_split,
        checksums=checksum_tensors(frozen_tensors(model)),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        inputs={"training data": clips_digest(speech.train)},
    )


def _tune(parts: _Parts, config: RunConfig, accelerator: Accelerator) -> SpectralReport:
    """Analyses the composed model and wraps it by the selection."""
    began = time.perf_counter()
    report = analyze(parts.model, measures="all", progress=accelerator.is_main_process)
    if tuning_config(config.tuning, seed=config.seed).ranks_by_fisher_information:
        report = measure_fisher(parts.model, parts.processor.tokenizer, report, config.evaluation, seed=config.seed)
    parts.inputs["base model"] = report.fingerprint
    parts.seconds["seconds_analyze"] = time.perf_counter() - began
    parts.model = get_peft_model(parts.model, tuning_config(config.tuning, seed=config.seed, report=report))
    make_engine(accelerator).check(parts.model)
    return report


def _adapt(parts: _Parts, config: RunConfig, accelerator: Accelerator, resume: bool) -> dict[str, Any]:
    """Measures, trains and measures again, on the tower's stored features."""
    model, settings, tokenizer = parts.model, config.evaluation, parts.processor.tokenizer
    with precomputed_features(model):
        heard_before = measure_hearing(model, parts.collator, parts.test, settings).report
        text_before = measure_text(model, tokenizer, settings)
        rehearsal = make_self_distillation(model, tokenizer, config)
        began = time.perf_counter()
        results = train(
            make_engine(accelerator),
            model,
            parts.train,
            parts.collator,
            config,
            resume_from=find_checkpoint(config, num_processes=accelerator.num_processes) if resume else None,
            distillation=rehearsal,
            inputs=parts.inputs,
        )
        parts.seconds["seconds_train"] = time.perf_counter() - began
    # with the tower back in its place, and of the very model that was trained
    parts.freeze = compare(parts.checksums, checksum_tensors(frozen_tensors(model)))
    _save_adapter(parts, config, accelerator)
    if not make_engine(accelerator).leaves_model_whole:
        model = parts.model = _load_whole(parts, config, accelerator)
    with precomputed_features(model):
        heard = measure_hearing(model, parts.collator, parts.test, settings)
        text_after = measure_text(model, tokenizer, settings)
        kl = kl_on_sampled_text(model, tokenizer, settings, seed=config.seed)
    rates = {"wer_before": heard_before.overall, "wer_after": heard.report.overall}
    rates |= {f"wer_before_{name}": rate for name, rate in heard_before.by_language.items()}
    rates |= {f"wer_after_{name}": rate for name, rate in heard.report.by_language.items()}
    return {
        **rates,
        "text_ce_before": text_before.nats_per_token,
        "text_ce_after": text_after.nats_per_token,
        "text_ce_tokens": text_after.num_tokens,
        "kl_to_base": kl,
        "final_loss": results[-1].final_loss,
        "steps": {result.stage: result.steps for result in results},
        "transcriptions": [
            {"said": said, "heard": text}
            for said, text in list(zip(heard.references, heard.hypotheses, strict=True))[:8]
        ],
    }


def _save_adapter(parts: _Parts, config: RunConfig, accelerator: Accelerator) -> None:
    """Writes the adapter from the last checkpoint, which holds whole tensors whatever engine sharded the model."""
    if accelerator.is_main_process:
        checkpoint = find_checkpoint(config, num_processes=accelerator.num_processes)
        assert checkpoint is not None  # every stage ends with one
        with atomic_directory(Path(config.output_dir) / ADAPTER) as folder:
            parts.model.save_pretrained(folder, state_dict=load_trained(checkpoint))
            parts.processor.save_pretrained(folder)
    accelerator.wait_for_everyone()


def _load_whole(parts: _Parts, config: RunConfig, accelerator: Accelerator) -> PeftModel:
    """The base composed anew with the saved adapter, whole on every rank as before training: it can be measured."""
    parts.model = None  # the shards go first
    # the window there was, which a clip may have set that was left out afterwards
    model, _ = compose(config, max_seconds=parts.processor.feature_extractor.chunk_length)
    model = PeftModel.from_pretrained(model, Path(config.output_dir) / ADAPTER, is_trainable=True)
    return model.to(accelerator.device)


def _facts(parts: _Parts, config: RunConfig, accelerator: Accelerator, freeze: FreezeReport) -> dict[str, Any]:
    tuned = parts.model.active_peft_config
    return {
        "num_selected": len(tuned.target_units),
        "report_fingerprint": tuned.report_fingerprint,
        "trainable_parameters": sum(p.numel() for p in parts.model.parameters() if p.requires_grad),
        "total_parameters": parts.total_parameters,
        "frozen_unchanged": freeze.unchanged,
        "frozen_checked": freeze.checked,
        "num_train_clips": len(parts.train),
        "num_test_clips": len(parts.test),
        "num_skipped_clips": parts.speech.num_skipped,
        "unheard_voices": parts.speech.unheard_voices,
        **{phase: round(seconds, 2) for phase, seconds in parts.seconds.items()},
        "peak_rss_bytes": peak_rss_bytes(),
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "seed": config.seed,
        "config_fingerprint": config.fingerprint(),
        "machine": machine(),
        "commit": code_commit(),
        "versions": versions(),
    }


def _leave_report(parts: _Parts, config: RunConfig, output_dir: Path, report: SpectralReport) -> None:
    """Writes what is known before training: the run's first files."""
    write_text(output_dir / CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    report.save(output_dir / "spectral_report.json")
    selected = parts.model.active_peft_config.target_units
    plot_condition_numbers(report, output_dir / "condition_numbers.png", selected=selected)


def _leave(parts: _Parts, config: RunConfig, output_dir: Path, summary: dict[str, Any]) -> None:
    """Writes what the run leaves, and shows it."""
    plot_training(read_metrics(output_dir / "metrics.jsonl"), output_dir / "training.png", title=str(output_dir))
    write_json(output_dir / "summary.json", summary)
    print_summary(summary, output_dir)
