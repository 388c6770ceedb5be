"""What somebody meets who loads an adapter without `import condft`, and that the folder tells the way out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, RepoUrl
from peft import PeftModel, get_peft_model
from torch import nn

from condft import CondFTConfig
from condft.tuner import load
from tests.helpers.models.tiny_models import logits

READER = """
import sys
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM
doors = {
    "PeftConfig": lambda: PeftConfig.from_pretrained("adapter"),
    "PeftModel": lambda: PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter"),
    "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained("adapter"),
    "AutoModel": lambda: AutoModelForCausalLM.from_pretrained("adapter"),
    "load_adapter": lambda: LlamaForCausalLM.from_pretrained("base").load_adapter("adapter"),
}
for name, open_it in doors.items():
    try:
        open_it()
        print(name, "opens")
    except KeyError as error:
        print(name, "KeyError", error)
"""


@pytest.fixture
def saved(adapter: Any, tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PeftModel, Path]:
    """A trained model, and the folder that holds `base` and `adapter`."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    model = adapter(base=tiny_llama().from_pretrained("base"), num_tensors=5)
    model.save_pretrained("adapter")
    return model, tmp_path


def read(code: str, folder: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


DOORS = ["PeftConfig", "PeftModel", "AutoPeftModel", "AutoModel", "load_adapter"]


def test_a_reader_without_condft_meets_a_keyerror_and_the_folder_tells_why(saved: tuple[PeftModel, Path]) -> None:
    _, folder = saved
    assert read(READER, folder) == [f"{door} KeyError 'CONDFT'" for door in DOORS]
    assert read("import condft\n" + READER, folder) == [f"{door} opens" for door in DOORS]
    note = json.loads((folder / "adapter/adapter_config.json").read_text())["condft_note"]
    assert "KeyError: 'CONDFT'" in note
    assert "`import condft`" in note
    card = ModelCard.load(folder / "adapter/README.md")
    assert card.text.lstrip().startswith("> **This is a CondFT adapter: `import condft` before PEFT loads it.**")
    assert {"condft", "transformers"} <= set(card.data.tags)
    assert card.data.base_model == "base"


def test_the_lines_of_the_card_are_true(saved: tuple[PeftModel, Path], token_ids: torch.Tensor) -> None:
    """The code block in it, run."""
    model, folder = saved
    text = (folder / "adapter/README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0].replace("> ", "").replace(">", "")
    names: dict[str, Any] = {}
    exec(code.replace("path or hub id of this adapter", "adapter"), names)
    assert torch.equal(logits(names["model"], token_ids), logits(model, token_ids))


def test_saving_again_keeps_one_note_and_what_was_written_by_hand(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    path = folder / "adapter/README.md"
    path.write_text(path.read_text().replace("# Model Card for Model ID", "# Hears digits"))
    model.save_pretrained("adapter")
    text = path.read_text()
    assert text.count("This is a CondFT adapter") == 1
    assert "# Hears digits" in text
    assert "condft" in ModelCard.load(path).data.tags


def test_every_adapters_folder_has_it(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    model.add_adapter("other", CondFTConfig(num_tensors=2))
    model.save_pretrained("both")
    for place in ("both", "both/other"):
        assert "This is a CondFT adapter" in (folder / place / "README.md").read_text()
    load("both/other")


def test_a_config_alone_writes_no_card(tmp_path: Path) -> None:
    CondFTConfig(num_tensors=2).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_what_push_to_hub_uploads(
    saved: tuple[PeftModel, Path], token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caught where huggingface_hub would send the files: what arrives loads again, and holds no base weight."""
    model, folder = saved
    sent = folder / "sent"

    def create_repo(self: HfApi, repo_id: str, **_: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self: HfApi, *, operations: list[CommitOperationAdd], **_: Any) -> None:
        for operation in operations:
            target = sent / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    model.push_to_hub("someone/hears-digits")
    assert {path.name for path in sent.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert 0 < (sent / "adapter_model.safetensors").stat().st_size - weights < 2000
    # transformers puts a card of its own over the folder's, so what an uploaded adapter tells is in its config.
    assert "import condft" in (sent / "adapter_config.json").read_text()
    assert torch.equal(logits(load(sent), token_ids), logits(model, token_ids))


def test_plain_modules_have_a_card_too(tmp_path: Path) -> None:
    model = get_peft_model(nn.ModuleDict({"up": nn.Linear(3, 3)}), CondFTConfig(target_modules=["up"]))
    model.save_pretrained(tmp_path)
    assert "This is a CondFT adapter" in (tmp_path / "README.md").read_text()
