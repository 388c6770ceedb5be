"""Fisher information: the gradients' own figures, what it predicts, and that the model is left as it was."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

from condft import CondFTConfig, SpectralReport, add_fisher_information, analyze, select_units
from condft.report import Role
from condft.retention.measures import kl_to_base
from condft.retention.sampling import sample_from_base
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import tiny_moe

TOKENS = torch.randint(0, 96, (6, 12), generator=torch.Generator().manual_seed(0))


def figures(report: SpectralReport) -> dict[str, float]:
    return {row.name: row.fisher_information for row in report.rows if row.fisher_information is not None}


def measured(model: nn.Module, tokens: torch.Tensor | None = TOKENS, **options: Any) -> dict[str, float]:
    return figures(add_fisher_information(analyze(model, progress=False, **options), model, tokens, progress=False))


def squared_gradients(model: Any, name: str) -> torch.Tensor:
    """Of the log-probability of each sequence, over its tokens: the diagonal of F, entry by entry."""
    parameter = model.get_parameter(name).requires_grad_(True)
    total = torch.zeros_like(parameter)
    for tokens in TOKENS.split(1):
        loss = F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="sum")
        total += torch.autograd.grad(loss, parameter)[0] ** 2 / (tokens.shape[1] - 1) / len(TOKENS)
    parameter.requires_grad_(False)
    return total


def test_it_is_the_mean_square_of_the_gradients() -> None:
    model = build_tiny_llama().requires_grad_(False)
    found = measured(model)
    assert len(found) == 4 * 7 + 1  # the tied embedding too, once
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        assert found[name] == pytest.approx(squared_gradients(model, name).mean().item(), rel=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_slices_have_their_own_entries(granularity: Any) -> None:
    model = tiny_moe().requires_grad_(False)
    report = add_fisher_information(analyze(model, granularity=granularity, progress=False), model, TOKENS)
    stack = "model.layers.1.mlp.experts.down_proj"
    expected = squared_gradients(model, stack)
    for index in range(4):
        row = report[f"{stack}[{index}]"]
        assert row.fisher_information == pytest.approx(expected[index].mean().item(), rel=1e-5)
    query = "model.layers.0.self_attn.q_proj.weight"
    if granularity == "head":
        rows = squared_gradients(model, query)
        head = report[f"{query}[h1]"].fisher_information
        assert head == pytest.approx(rows[8:16].mean().item(), rel=1e-5)


def test_it_predicts_the_divergence_of_small_random_updates() -> None:
    """Signs of equal chance make d'Fd the trace in the mean; the text must be the model's own."""
    model = build_tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh model's distribution is flat, whatever moves
            parameter.mul_(4.0)
    tokens = sample_from_base(model, model.generation_config, num_sequences=32, num_tokens=24, seed=1, progress=False)
    found = measured(model, tokens)
    base = build_tiny_llama()
    base.load_state_dict(model.state_dict())
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.v_proj.weight"):
        weight, original, step = model.get_parameter(name), base.get_parameter(name), 1e-3
        divergences = []
        for seed in range(8):
            signs = torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
            with torch.no_grad():
                weight.copy_(original + step * signs)
            as_it_was = partial(_swapped, model, name, original)
            divergences.append(kl_to_base(model, tokens, as_it_was, progress=False))
        weight.data.copy_(original)
        predicted = 0.5 * step**2 * found[name] * weight.numel()
        assert sum(divergences) / len(divergences) == pytest.approx(predicted, rel=0.25)


class _swapped:
    """Within, the base's values are in the place of a weight's."""

    def __init__(self, model: nn.Module, name: str, values: torch.Tensor) -> None:
        self.weight, self.values = model.get_parameter(name), values

    def __enter__(self) -> None:
        self.kept = self.weight.data.clone()
        self.weight.data.copy_(self.values)

    def __exit__(self, *_: object) -> None:
        self.weight.data.copy_(self.kept)


def test_the_model_is_left_as_it_was_and_adapters_do_not_act() -> None:
    plain = measured(build_tiny_llama())
    model = get_peft_model(build_tiny_llama(), CondFTConfig(num_tensors=3, init_weights=False))
    model.train()
    before = {
        name: (parameter.requires_grad, parameter.detach().clone()) for name, parameter in model.named_parameters()
    }
    trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    trained.grad = torch.ones_like(trained)
    found = measured(model)
    assert found == pytest.approx(plain, rel=1e-5)
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(trained.grad, torch.ones_like(trained))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter is trained or parameter.grad is None
    assert not any(layer.disable_adapters for layer in model.modules() if hasattr(layer, "condft_weight"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        measured(model)


def test_get_peft_model_measures_what_the_report_lacks_and_takes_the_lowest() -> None:
    config = CondFTConfig(trainable_fraction=0.25, score="fisher_information")
    model = get_peft_model(build_tiny_llama(), config)
    report = add_fisher_information(analyze(build_tiny_llama(), progress=False), build_tiny_llama(), progress=False)
    expected = select_units(report, trainable_fraction=0.25, score="fisher_information")
    assert config.target_units == list(expected.names)
    assert expected.shape_share == 0
    for kind in {row.module_type for row in report.rows if row.role is Role.LAYER}:
        values = {row.name: row.fisher_information for row in report.rows if row.module_type == kind}
        assert min(values, key=values.__getitem__) in config.target_units
    handed = CondFTConfig(trainable_fraction=0.25, score="fisher_information", report=report)
    get_peft_model(build_tiny_llama(), handed)
    assert handed.target_units == config.target_units
    random = CondFTConfig(trainable_fraction=0.25, score="fisher_information", order="random")
    get_peft_model(build_tiny_llama(), random)  # looks at no score
    model.add_adapter("second", CondFTConfig(trainable_fraction=0.25, score="fisher_information"))
    assert model.peft_config["second"].target_units == config.target_units


def test_what_the_text_does_not_pass_through_has_none() -> None:
    class WithTower(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.tower = nn.Linear(8, 8)

    model = WithTower(build_tiny_llama().config)
    report = add_fisher_information(analyze(model, progress=False), model, TOKENS, progress=False)
    assert report["tower.weight"].fisher_information is None
    with pytest.raises(ValueError, match=r"not measured for 1 of 29 candidates, the first is 'tower.weight'.*passes"):
        select_units(report, score="fisher_information")
    assert SpectralReport.from_dict(report.to_dict()) == report


def test_what_cannot_be_measured_is_named() -> None:
    model = build_tiny_llama()
    report = analyze(model, progress=False)
    unit = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="needs at least one sequence of at least 2"):
        add_fisher_information(report, model, TOKENS[:, :1])
    with pytest.raises(KeyError, match=r"no unit named 'x\.weight'"):
        add_fisher_information(report, model, TOKENS, names=["x.weight"])
    encoder = LlamaModel(model.config)
    with pytest.raises(ValueError, match="LlamaModel gives no next-token logits"):
        add_fisher_information(analyze(encoder, progress=False), encoder, TOKENS)
    assert not any(parameter.grad is not None for parameter in encoder.parameters())
    with pytest.raises(ValueError, match=r"does not say which token its text begins with.*hand over tokens"):
        layers = nn.Sequential(nn.Linear(4, 4))
        add_fisher_information(analyze(layers, progress=False), layers)
    with torch.device("meta"):
        hollow = LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match=r"on the meta device.*load them first"):
        add_fisher_information(report, hollow, TOKENS)
    with torch.no_grad():
        model.get_parameter(unit).fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        add_fisher_information(report, model, TOKENS)
