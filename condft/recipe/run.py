"""The recipe: data, model, analysis, selection, training, measurement, summary. One call, one folder of results.

accelerate launch scripts/train.py configs/quickstart.yaml
"""

import gc
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from condft.recipe.data import load_speech, prepare_data
from condft.recipe.measure import kl_on_sampled_text, measure_model
from condft.recipe.model import BaseFacts, compose, load_adapted, window_of
from condft.recipe.results import ADAPTER, write_analysis, write_results
from condft.recipe.summary import Outcome, describe_run, print_summary, summarize
from condft.recipe.training import save_adapter, train_model
from condft.recipe.tuning import analyze_base, select_and_wrap, tuning_config
from condft.tasks.speech.clips import clips_digest
from condft.training import (
    FreezeReport,
    RunConfig,
    checksum_tensors,
    compare_checksums,
    find_checkpoint,
    frozen_tensors,
    make_accelerator,
    make_engine,
    prepare_output_dir,
)
from condft.training.output_dir import remove_run

__all__ = ["run"]


def run(config: RunConfig, *, resume: bool = False, overwrite: bool = False, cpu: bool = False) -> dict[str, Any]:
    """Runs the recipe in every process and writes its results into `config.output_dir`.

    Args:
        config: The run.
        resume: Continue the run in the output folder from its newest checkpoint.
        overwrite: Delete the run in the output folder, as soon as this one is ready to write its first file.
        cpu: Stay on the CPU even where there is a GPU.

    Returns:
        What `summary.json` holds.

    Raises:
        FileExistsError: The output folder holds a run and neither flag is given.
        ValueError: Configuration, data or model do not fit; the message names the cause and what to change.
        RuntimeError: A frozen tensor changed. This is a bug in condft.

    Example:
        >>> from condft.recipe import find_config
        >>> from condft.training import load_config
        >>> config = load_config(find_config("quickstart.yaml"), ["training.steps=130", "seed=0"])
        >>> summary = run(config)  # doctest: +SKIP
        >>> {key: round(summary[key], 3) for key in ("wer_after", "kl_to_base")}  # doctest: +SKIP
        {'wer_after': 0.237, 'kl_to_base': 0.008}
    """
    began = time.perf_counter()
    tuning = tuning_config(config.tuning, seed=config.seed)  # first: a wrong key is refused before anything is loaded
    engine = make_engine(make_accelerator(config, cpu=cpu))
    accelerator, settings = engine.accelerator, config.evaluation
    output_dir = prepare_output_dir(config.output_dir, resume=resume, overwrite=overwrite)
    # Now: a checkpoint of another configuration is refused before anything is written over that run's files.
    checkpoint = find_checkpoint(config, num_processes=accelerator.num_processes) if resume else None

    speech = load_speech(config.data, num_test_clips=settings.num_clips, window=window_of(config))
    model, processor = compose(config, max_seconds=speech.longest_seconds)
    data = prepare_data(model.to(accelerator.device), processor, speech, config)
    # Before get_peft_model: these checksums are what the freeze check compares with.
    base = BaseFacts.of(model)

    analysis = analyze_base(model, data.tokenizer, tuning, config, progress=accelerator.is_main_process)
    model = select_and_wrap(model, tuning, analysis.report, engine)
    inputs = {"training data": clips_digest(data.speech.train), "base model": analysis.report.fingerprint}
    if checkpoint is not None:
        checkpoint.check_inputs(inputs)
    if accelerator.is_main_process:
        if overwrite:  # not earlier: what fails at once has failed by now, and the old run is still there
            remove_run(output_dir)
        write_analysis(output_dir, config, analysis.report, tuning.target_units or ())

    # The model is wrapped already, but every copy still equals its original: this measures the base.
    before = measure_model(model, data, settings)
    training = train_model(engine, model, data, config, resume_from=checkpoint, inputs=inputs)
    # After train_model, which has put the audio tower back: its tensors are checked too.
    freeze = compare_checksums(base.checksums, checksum_tensors(frozen_tensors(model)))
    save_adapter(engine, model, processor, training.checkpoint, output_dir / ADAPTER)

    if not engine.leaves_model_whole:  # this process holds shards only, and generate() needs the whole model
        del model
        gc.collect()  # a PEFT model refers to itself; without this, shards and whole model would need memory together
        # is_trainable: the summary counts the trained parameters by requires_grad.
        model = load_adapted(config, processor, output_dir / ADAPTER, is_trainable=True).to(accelerator.device)
    after = measure_model(model, data, settings)
    kl_to_base = kl_on_sampled_text(model, data.tokenizer, settings, seed=config.seed)

    outcome = Outcome(before, after, kl_to_base, training, freeze)
    seconds = {"seconds_analyze": analysis.seconds, "seconds_train": training.seconds}
    seconds["seconds_total"] = time.perf_counter() - began
    summary = summarize(outcome) | describe_run(config, data, base, model, outcome, accelerator, seconds)
    _finish(accelerator, output_dir, summary, freeze)
    return summary


def _finish(accelerator: Accelerator, output_dir: Path, summary: dict[str, Any], freeze: FreezeReport) -> None:
    """Writes and shows the results, then raises if the freeze failed: the files are needed to find the bug."""
    if accelerator.is_main_process:
        write_results(output_dir, summary)
        print_summary(summary, output_dir)
    # No process returns before the results are written.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if not freeze.unchanged:
        first = (freeze.changed + freeze.missing)[0]
        raise RuntimeError(
            f"{len(freeze.changed)} frozen tensors changed and {len(freeze.missing)} are missing, the first is "
            f"{first}: this is a bug in condft, and the figures of this run are not valid"
        )
