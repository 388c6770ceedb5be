"""A finished run, loaded again: its base composed anew, its adapter on top, ready to transcribe and be measured."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoProcessor

from condft.recipe.checks import warn_of_cut_answers
from condft.recipe.data import load_speech, usable_examples
from condft.recipe.measure import kl_on_sampled_text, measure_text, measure_transcription
from condft.recipe.model import load_adapted
from condft.recipe.results import ADAPTER, CONFIG
from condft.tasks.speech import Clip, SpeechCollator, load_manifest, precomputed_features
from condft.training import RunConfig, load_config

__all__ = ["evaluate_run", "load_run"]


def load_run(run_dir: str | Path) -> tuple[PeftModel, Any, RunConfig]:
    """Composes a run's base from the checkpoints that its config names, and loads its adapter onto it.

    Args:
        run_dir: The `output_dir` of a finished run.

    Returns:
        The adapted model (inference mode), its processor, and the run's config.

    Raises:
        FileNotFoundError: The folder holds no finished run.
        ValueError: The adapter does not fit the composed model.

    Example:
        >>> model, processor, config = load_run("runs/quickstart")  # doctest: +SKIP
        >>> load_run("runs/nothing")
        Traceback (most recent call last):
        FileNotFoundError: runs/nothing holds no finished run: config.yaml is missing. Train one, or --resume it.
    """
    run_dir = Path(run_dir)
    for name in (CONFIG, ADAPTER):
        if not (run_dir / name).exists():
            raise FileNotFoundError(f"{run_dir} holds no finished run: {name} is missing. Train one, or --resume it.")
    config = load_config(run_dir / CONFIG)
    processor = AutoProcessor.from_pretrained(run_dir / ADAPTER)
    return load_adapted(config, processor, run_dir / ADAPTER).eval(), processor, config


def evaluate_run(
    run_dir: str | Path, *, manifest: str | Path | None = None, split: str = "test", skip_bad: bool = False
) -> dict[str, Any]:
    """Measures a finished run again, on its own test split or on other clips.

    Args:
        run_dir: The `output_dir` of a finished run.
        manifest: Other clips; by default the run's own test split.
        split: Split of `manifest` to take.
        skip_bad: Leave unusable clips of `manifest` out and count them.

    Returns:
        `wer`, `wer_<language>`, `text_ce_base`, `text_ce`, `kl_to_base`, `num_clips`, `num_skipped_clips`.

    Raises:
        FileNotFoundError: No finished run, or no such manifest.
        ValueError: Clips that cannot be used, or longer than the run's window.

    Example:
        >>> figures = evaluate_run("runs/quickstart", manifest="my_clips.jsonl")  # doctest: +SKIP
        >>> figures["wer"], figures["num_clips"]  # doctest: +SKIP
        (0.25, 40)
        >>> evaluate_run("runs/nothing")
        Traceback (most recent call last):
        FileNotFoundError: runs/nothing holds no finished run: config.yaml is missing. Train one, or --resume it.
    """
    model, processor, config = load_run(run_dir)
    window = processor.feature_extractor.chunk_length
    if manifest is None:
        # The run's own setting, so that the clips are those that the run was measured on.
        skip_bad = config.data.skip_bad
    clips, num_skipped = _clips_of(config, manifest, split, window=window, skip_bad=skip_bad)
    collator = SpeechCollator.for_model(
        model.get_base_model(), processor, prompt=config.model.prompt, system_prompt=config.model.system_prompt
    )
    examples, bad = usable_examples(model, collator, clips, config, skip_bad=skip_bad, compared=True)
    settings, tokenizer = config.evaluation, processor.tokenizer
    warn_of_cut_answers(collator, examples, settings)
    with precomputed_features(model):
        rates = measure_transcription(model, collator, examples, settings).report
        adapted = measure_text(model, tokenizer, settings)
        with model.disable_adapter():
            base = measure_text(model, tokenizer, settings)
        kl = kl_on_sampled_text(model, tokenizer, settings, seed=config.seed)
    return {
        "wer": rates.overall,
        **{f"wer_{language}": rate for language, rate in rates.by_language.items()},
        "text_ce_base": base.nats_per_token,
        "text_ce": adapted.nats_per_token,
        "kl_to_base": kl,
        "num_clips": rates.num_clips,
        "num_skipped_clips": num_skipped + len(bad),
    }


def _clips_of(
    config: RunConfig, manifest: str | Path | None, split: str, *, window: float, skip_bad: bool
) -> tuple[list[Clip], int]:
    """The clips to measure on, and how many were skipped."""
    if manifest is None:
        speech = load_speech(config.data, num_test_clips=config.evaluation.num_clips, window=window)
        return speech.test, speech.num_skipped
    data = load_manifest(manifest, split=split, max_seconds=window, skip_bad=skip_bad)
    return data.clips, len(data.skipped)
