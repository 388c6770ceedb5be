"""An evaluation point: adaptation (test loss) and forgetting (cross-entropy, KL, cloze), all against the base.

Forgetting is measured in fp32 for every training precision. Under bf16 autocast two runs' changes of cross-entropy
were 0.0050 and 0.0108 where fp32 gives 0.0048 and 0.0093 (4,088 tokens): too coarse to compare arms.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from condft.files.atomic import atomic_path, write_json
from condft.retention.measures import held_out_text, kl_to_base, text_cross_entropy
from condft.retention.sampling import sample_from_base
from condft.retention.self_distillation import SelfDistillation
from condft.runtime.model_mode import measuring
from condft.tasks.chat import IGNORED
from scripts.research.config import StudyConfig, digest_of
from scripts.research.store import waiting_for
from scripts.research.study.arms import Arm
from scripts.research.study.cloze import CLOZE
from scripts.research.tasks import Task, full_precision, mean_test_loss, precision


@dataclass(frozen=True)
class Baseline:
    """The base model's scores, and text sampled from it; the same for all runs of a study.

    Attributes:
        text_ce: Nats per token on the text that every point reads.
        final_text_ce: On the longer text of a run's end.
        cloze: Mean log-probability of the completions.
        sampled_tokens: `(num_sequences, length)`, text that the KL divergence to the base is measured on.
        selection_tokens: The same, other draws: for arms that select by text sampled from the base.
    """

    text_ce: float
    final_text_ce: float
    cloze: float
    sampled_tokens: Tensor
    selection_tokens: Tensor

    @classmethod
    def of(cls, config: StudyConfig, task: Task, accelerator: Accelerator) -> "Baseline":
        """Measures the base model, or reads what an earlier run measured."""
        name = f"base3-{digest_of([config.determining(), task.inputs])}"
        path = Path(config.workspace) / f"{name}.json"
        with waiting_for(config.workspace, name):
            if not path.exists():
                write_json(path, _measure_base(config, task, accelerator))
        content = json.loads(path.read_text(encoding="utf-8"))
        texts = {name: torch.tensor(content[name]) for name in ("sampled_tokens", "selection_tokens")}
        return cls(**{**content, **texts})


def _measure_base(config: StudyConfig, task: Task, accelerator: Accelerator) -> dict[str, Any]:
    settings = config.evaluation
    with task.fresh(config.seeds[0], accelerator) as model:
        # Two seeds: arms that select by sampled text are not measured on the text that they selected by.
        measured, selected = (
            sample_from_base(
                model,
                task.tokenizer,
                num_sequences=settings.sampled_sequences,
                num_tokens=settings.sampled_tokens,
                seed=seed,
            )
            for seed in (0, 1)
        )
        return {
            "text_ce": _text_ce(model, task, config, settings.text_tokens),
            "final_text_ce": _text_ce(model, task, config, config.final_text_tokens),
            "cloze": cloze_log_probability(model, task.tokenizer),
            "sampled_tokens": measured.tolist(),
            "selection_tokens": selected.tolist(),
        }


def make_self_distillation(
    arm: Arm, config: StudyConfig, task: Task, accelerator: Accelerator, *, seed: int
) -> SelfDistillation | None:
    """The self-distillation of an arm: on text sampled from the base, other draws than for measuring and selecting."""
    settings = config.training.self_distillation
    if settings is None:
        return None
    size = (settings.num_sequences, settings.num_tokens)
    name = f"sampled-text-{digest_of([config.language_model, task.inputs, *size])}"
    path = Path(config.workspace) / f"{name}.safetensors"
    with waiting_for(config.workspace, name):
        if not path.exists():
            with task.fresh(seed, accelerator) as model:
                tokens = sample_from_base(model, task.tokenizer, num_sequences=size[0], num_tokens=size[1], seed=2)
            with atomic_path(path) as temporary:
                save_file({"tokens": tokens}, temporary)
    return SelfDistillation(settings, load_file(path)["tokens"], arm.base, seed=seed)


def measure_point(
    arm: Arm, task: Task, config: StudyConfig, base: Baseline, accelerator: Accelerator, *, transcribe: bool
) -> dict[str, float]:
    """The figures of one evaluation point.

    Returns:
        `test_loss` (nats per answer token), `text_ce_change` (nats per token, above 0: forgotten), `kl_to_base` (nats
        per token of text sampled from the base), `cloze_change` (nats per completion, below 0: forgotten), and the
        word error rates of a speech task if `transcribe`.
    """
    with full_precision(arm.model):
        figures = {
            "text_ce_change": _text_ce(arm.model, task, config, config.evaluation.text_tokens) - base.text_ce,
            "kl_to_base": kl_to_base(arm.model, base.sampled_tokens, arm.base, progress=False),
            "cloze_change": cloze_log_probability(arm.model, task.tokenizer) - base.cloze,
        }
    with precision(accelerator):
        figures["test_loss"] = mean_test_loss(arm.model, task)
        return figures | (task.error_rates(arm.model) if transcribe else {})


def measure_end(arm: Arm, task: Task, config: StudyConfig, base: Baseline, *, seed: int) -> dict[str, float]:
    """Measured once, after the last step: the cross-entropy of the longer text, on the seeds of `final_seeds`."""
    if config.final_seeds is not None and seed not in config.final_seeds:
        return {}
    return {"final_text_ce_change": _text_ce(arm.model, task, config, config.final_text_tokens) - base.final_text_ce}


def cloze_log_probability(model: Any, tokenizer: Any) -> float:
    """Mean over the cloze lines of the completion's log-probability given its context, in nats."""
    rows, starts = [], []
    for context, completion in CLOZE:
        start = tokenizer(context, add_special_tokens=False)["input_ids"]
        starts.append(len(start))
        rows.append(start + tokenizer(completion, add_special_tokens=False)["input_ids"])
    width = max(map(len, rows))
    # padded on the right: with causal attention the tokens that count do not see the padding
    tokens = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
    labels = torch.full_like(tokens, IGNORED)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        labels[index, start : len(row)] = tokens[index, start : len(row)]
    with measuring(model) as device:
        logits = model(input_ids=tokens.to(device), use_cache=False).logits[:, :-1].float().flatten(0, 1)
    targets = labels[:, 1:].flatten().to(logits.device)
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return -float(loss) / len(rows)


def _text_ce(model: Any, task: Task, config: StudyConfig, tokens: int) -> float:
    settings = config.evaluation
    return text_cross_entropy(
        model,
        task.tokenizer,
        held_out_text(settings.text),
        max_tokens=tokens,
        context_length=settings.context_length,
        progress=False,
    ).nats_per_token
