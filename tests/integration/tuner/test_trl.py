"""TRL's trainers take a `CondFTConfig`, and a model with a CondFT adapter, where they take LoRA's."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from condft import CondFTConfig
from tests.helpers.models.adapters import train
from tests.helpers.models.tiny_models import logits

trl = pytest.importorskip("trl", reason="trl is not installed: pip install -c scripts/constraints.txt -e '.[dev]'")

SENTENCES = ["the quick brown fox jumps", "over the lazy dog and runs away"]


def words() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<eos>", "<unk>", *sorted({word for sentence in SENTENCES for word in sentence.split()})]
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


# Of either trainer: on the CPU, in fp32, in silence.
QUIETLY: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
}


def sft(model: Any, folder: Path, **options: Any) -> Any:
    saving = {"output_dir": str(folder), "save_steps": 2, "logging_strategy": "no"}
    arguments = trl.SFTConfig(max_steps=4, learning_rate=0.01, max_length=16, **saving, **QUIETLY)
    rows = Dataset.from_dict({"text": SENTENCES * 4})
    return trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=words(), **options)


def test_trains_saves_and_resumes(tiny_llama: Any, token_ids: Tensor, tmp_path: Path) -> None:
    config = CondFTConfig(num_tensors=4, task_type="CAUSAL_LM")
    trainer = sft(tiny_llama(), tmp_path / "run", peft_config=config)
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    trained = logits(trainer.model.eval(), token_ids)
    assert not torch.equal(trained, logits(tiny_llama(), token_ids))
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.named_parameters() if not p.requires_grad)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, token_ids), trained)
    resumed = sft(tiny_llama(), tmp_path / "run", peft_config=CondFTConfig(num_tensors=4, task_type="CAUSAL_LM"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert torch.equal(logits(resumed.model.eval(), token_ids), trained)


def test_the_reference_of_preference_training_is_the_policy_as_it_was_handed_over(
    tiny_llama: Any, token_ids: Tensor, tmp_path: Path
) -> None:
    model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=4, task_type="CAUSAL_LM"))
    train(model, token_ids)
    arguments = trl.DPOConfig(output_dir=str(tmp_path), max_steps=1, logging_steps=1, **QUIETLY)
    rows = {"prompt": ["the quick brown"] * 2, "chosen": ["fox jumps"] * 2, "rejected": ["lazy dog"] * 2}
    trainer = trl.DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=words()
    )
    policy = logits(trainer.model.eval(), token_ids)
    trainer.model.set_adapter("ref")
    assert torch.equal(logits(trainer.model, token_ids), policy)
    trainer.model.set_adapter("default")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [pytest.approx(math.log(2), abs=1e-4)]
