"""TRL's `SFTTrainer` takes a `CondFTConfig` where it takes a `LoraConfig`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from condft import CondFTConfig
from tests.tuner.conftest import logits

trl = pytest.importorskip("trl", reason="trl is not installed: pip install -c constraints.txt -e '.[dev]'")

SENTENCES = ["the quick brown fox jumps", "over the lazy dog and runs away"]


def words() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<eos>", "<unk>", *sorted({word for sentence in SENTENCES for word in sentence.split()})]
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sft(model: Any, folder: Path, **options: Any) -> Any:
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        max_length=16,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
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
