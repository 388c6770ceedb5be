"""The summary of a run: the facts of `summary.json`, and a table of what was learned and what was forgotten."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from rich.table import Table

from condft.recipe.data import RunData
from condft.recipe.measure import Measurement, Transcription
from condft.recipe.model import BaseFacts
from condft.recipe.provenance import code_commit, machine, versions
from condft.recipe.training import Training
from condft.runtime.console import console
from condft.runtime.memory import peak_rss_bytes
from condft.training import FreezeReport, RunConfig

__all__ = ["Outcome", "describe_run", "print_summary", "summarize"]

_NUM_TRANSCRIPTIONS = 8  # enough to see what kind of errors the model makes


@dataclass(frozen=True)
class Outcome:
    """What the steps of a run found.

    Attributes:
        before: The base with its untrained projector.
        after: The adapted model.
        kl_to_base: KL(base ‖ adapted) in nats per token, on text sampled from the base.
        training: What training did.
        freeze: Comparison of every base tensor with its checksum from before.
    """

    before: Measurement
    after: Measurement
    kl_to_base: float
    training: Training
    freeze: FreezeReport


def summarize(outcome: Outcome) -> dict[str, Any]:
    """The figures of a run: word error rates, forgetting, losses, and the first transcriptions."""
    before, after, results = outcome.before, outcome.after, outcome.training.results
    rates = {"wer_before": before.transcription.report.overall, "wer_after": after.transcription.report.overall}
    for name, measurement in (("before", before), ("after", after)):
        by_language = measurement.transcription.report.by_language
        rates |= {f"wer_{name}_{language}": rate for language, rate in by_language.items()}
    return {
        **rates,
        "text_ce_before": before.text.nats_per_token,
        "text_ce_after": after.text.nats_per_token,
        "text_ce_tokens": after.text.num_tokens,
        "kl_to_base": outcome.kl_to_base,
        "final_loss": results[-1].final_loss,
        "steps": {result.stage: result.steps for result in results},
        "transcriptions": _first_transcriptions(after.transcription),
    }


def _first_transcriptions(transcription: Transcription) -> list[dict[str, str]]:
    pairs = list(zip(transcription.references, transcription.hypotheses, strict=True))
    return [{"reference": reference, "hypothesis": text} for reference, text in pairs[:_NUM_TRANSCRIPTIONS]]


def describe_run(
    config: RunConfig,
    data: RunData,
    base: BaseFacts,
    model: PeftModel,
    outcome: Outcome,
    accelerator: Accelerator,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The facts behind the figures: selection, proof of freeze, data, time, machine and code.

    Args:
        config: The run.
        data: What it trained and measured on.
        base: Facts of the base from before training.
        model: The adapted model, whole in this process.
        outcome: What the steps found.
        accelerator: The accelerator of the run.
        seconds: Seconds of each phase, by its key in the summary.
    """
    tuned: Any = model.active_peft_config
    return {
        "num_selected": len(tuned.target_units),
        "report_fingerprint": tuned.report_fingerprint,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        # Of the base: in the adapted model, the selected weights would count twice.
        "total_parameters": base.num_parameters,
        "frozen_unchanged": outcome.freeze.unchanged,
        "frozen_checked": outcome.freeze.checked,
        "num_train_clips": len(data.train),
        "num_test_clips": len(data.test),
        "num_skipped_clips": data.speech.num_skipped,
        "new_speakers": data.speech.has_new_speakers,
        **{phase: round(value, 2) for phase, value in seconds.items()},
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


def print_summary(summary: Mapping[str, Any], output_dir: str | Path) -> None:
    """Prints the table at the end of a run: what was learned, and what was forgotten."""
    table = Table(title="what was learned, and what was forgotten", caption=str(output_dir), title_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    _add_word_error_rates(table, summary)
    before, after = summary["text_ce_before"], summary["text_ce_after"]
    table.add_row("text cross-entropy (nats/token)", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    table.add_row("KL(base ‖ adapted) (nats/token)", "0", f"{summary['kl_to_base']:.4f}", "")
    frozen = "unchanged, bit for bit" if summary["frozen_unchanged"] else "CHANGED"
    table.add_row(f"{summary['frozen_checked']} base tensors", "", frozen, "")
    share = summary["trainable_parameters"] / summary["total_parameters"]
    of_total = f"{share:.1%} of {summary['total_parameters']:,}"
    table.add_row("trained parameters", "", f"{summary['trainable_parameters']:,}", of_total)
    table.add_row("selected weights", "", str(summary["num_selected"]), "")
    minutes = f"{summary['seconds_total'] / 60:.1f} min"
    table.add_row("time, peak memory", "", minutes, f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB")
    console().print(table)


def _add_word_error_rates(table: Table, summary: Mapping[str, Any]) -> None:
    """Adds a row over all clips, then one for each language."""
    prefix = "wer_before_"
    languages = sorted(key.removeprefix(prefix) for key in summary if key.startswith(prefix))
    for language in ("", *languages):
        suffix = f"_{language}" if language else ""
        before, after = summary[f"wer_before{suffix}"], summary[f"wer_after{suffix}"]
        all_clips = "new speakers" if summary["new_speakers"] else "test split"
        label = f"word error rate, {language or all_clips}"
        table.add_row(label, f"{before:.1%}", f"{after:.1%}", f"{after - before:+.1%}")
