"""Parameter groups hold every trainable parameter once; decay towards the base follows its formula, in any loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from condft import CondFTConfig
from condft.tuner import decay_towards_base, parameter_groups
from condft.tuner.export.updates import iter_updates
from condft.weights.names import canonical_name


@pytest.fixture
def model(tiny_llama: Any) -> PeftModel:
    config = CondFTConfig(
        num_tensors=5, modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [33, 80]}
    )
    return get_peft_model(tiny_llama(tied=False), config)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("per", ["component", "unit"])
@pytest.mark.parametrize("decay_towards", ["zero", "base"])
def test_every_trainable_parameter_is_in_one_group(model: PeftModel, per: Any, decay_towards: Any) -> None:
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1, decay_towards=decay_towards, per=per)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trainable(model).values())
    if per == "component":
        assert [(g["name"], len(g["params"])) for g in groups] == [
            ("token_rows", 1),
            ("selected", 5),
            ("modules_to_save", 1),
        ]
    else:
        assert len(groups) == 7
        assert {g["name"] for g in groups} == {canonical_name(name) for name in trainable(model)}


def test_rates_of_their_own_and_no_decay_of_vectors() -> None:
    base = nn.ModuleDict({"up": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    model = get_peft_model(base, CondFTConfig(target_modules=["up"], modules_to_save=["head"]))
    rates = {"selected": 1e-5, "modules_to_save": 1e-2}
    groups = parameter_groups(model, lr=rates, weight_decay={"selected": 0.0, "modules_to_save": 0.3})
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("selected", 1e-5, 0.0),
        ("modules_to_save", 1e-2, 0.3),
        ("modules_to_save, vectors", 1e-2, 0.0),
    ]
    with pytest.raises(ValueError, match="lacks 'modules_to_save'"):
        parameter_groups(model, lr={"selected": 1.0})
    with pytest.raises(ValueError, match="names 'projector', which is no component"):
        parameter_groups(model, lr={**rates, "projector": 1.0})


def test_wrong_choices_name_the_way_out(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="decay_towards='origin' is unknown: choose among zero, base"):
        parameter_groups(model, lr=1.0, decay_towards="origin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per='layer' is unknown"):
        parameter_groups(model, lr=1.0, per="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no group of the optimizer decays towards the base"):
        decay_towards_base(torch.optim.SGD(parameter_groups(model, lr=1.0)), model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        parameter_groups(model, lr=1.0)


def test_decay_towards_the_base_is_the_formula(model: PeftModel, token_ids: torch.Tensor) -> None:
    """w - lr * wd * (w - w0) before the gradient's step, with plain SGD as the step."""
    lr, decay = 0.3, 0.2
    optimizer = torch.optim.SGD(parameter_groups(model, lr=lr, weight_decay=decay, decay_towards="base"))
    optimizer = decay_towards_base(optimizer, model)
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        optimizer.zero_grad()
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        for name, p in trainable(model).items():
            expected = before[name] - lr * decay * (before[name] - start[name]) - lr * p.grad
            assert torch.allclose(p, expected, rtol=0, atol=1e-6), name
    assert all(not torch.equal(p, start[name]) for name, p in trainable(model).items())


def test_without_gradient_it_goes_back_to_the_base_and_stays(model: PeftModel) -> None:
    moved = list(trainable(model).values())
    start = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for p in moved:
            p.add_(1.0)
            p.grad = torch.zeros_like(p)
    groups = parameter_groups(model, lr=0.5, weight_decay=1.0, decay_towards="base")
    optimizer = decay_towards_base(torch.optim.AdamW(groups), model)
    for _ in range(60):
        optimizer.step()
    assert all(torch.allclose(p, base, atol=1e-5) for p, base in zip(moved, start, strict=True))
    for p in moved:
        p.grad = None
        p.data.add_(1.0)
    optimizer.step()
    assert not any(torch.allclose(p, base, atol=0.5) for p, base in zip(moved, start, strict=True))


def test_a_stronger_decay_ends_nearer_to_the_base(tiny_llama: Any, token_ids: torch.Tensor) -> None:
    distances = []
    for decay in (0.0, 0.5, 5.0):
        model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=4))
        groups = parameter_groups(model, lr=0.05, weight_decay=decay, decay_towards="base")
        optimizer = decay_towards_base(torch.optim.AdamW(groups), model)
        for _ in range(5):
            optimizer.zero_grad()
            model(input_ids=token_ids, labels=token_ids).loss.backward()
            optimizer.step()
        distances.append(sum((u.trained - u.base).norm().item() for u in iter_updates(model)))
    assert distances[0] > distances[1] > distances[2]


def test_through_accelerate(tiny_llama: Any, token_ids: torch.Tensor) -> None:
    """A prepared optimizer steps as the plain one does."""
    results = []
    for prepared in (False, True):
        model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=4))
        groups = parameter_groups(model, lr=0.1, weight_decay=2.0, decay_towards="base")
        optimizer: Any = decay_towards_base(torch.optim.AdamW(groups), model)
        stepped: Any = model
        if prepared:
            stepped, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
        for _ in range(3):
            stepped(input_ids=token_ids, labels=token_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(trainable(model))
    assert all(torch.equal(p, results[1][name]) for name, p in results[0].items())


def test_trainer_resumes_to_the_same_weights(tiny_llama: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """Four steps in one go, against two, a stop, and two more from the checkpoint."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 96, (8, 9), generator=torch.manual_seed(3))]

    def run(folder: str, resume: bool) -> dict[str, nn.Parameter]:
        model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=4))
        groups = parameter_groups(model, lr=0.05, weight_decay=1.0, decay_towards="base")
        optimizer = decay_towards_base(torch.optim.AdamW(groups), model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=2,
            max_steps=4,
            save_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-2") if resume else None)
        return trainable(model)

    whole, resumed = run("run", False), run("run", True)
    assert all(torch.equal(p, resumed[name]) for name, p in whole.items())
