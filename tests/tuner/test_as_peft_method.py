"""Habits of PEFT's methods that its own test suite found missing, each with the case that found it."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from condft import CondFTConfig


@pytest.mark.parametrize(
    ("layer", "features"),
    [
        (nn.Linear(5, 3), (5, 3)),
        (Conv1D(3, 5), (5, 3)),
        (nn.Embedding(11, 4), (11, 4)),
        (nn.Conv2d(2, 6, 3), (2, 6)),
    ],
)
def test_layers_show_their_features(layer, features):
    model = get_peft_model(nn.Sequential(layer, nn.Linear(4, 4)), CondFTConfig(target_modules=["0"]))
    wrapped = model.base_model.model[0]
    assert isinstance(wrapped, BaseTunerLayer)
    assert (wrapped.in_features, wrapped.out_features) == features


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, ids):
        return self.out(self.lin(self.emb(ids)))


def test_trained_token_rows_are_merged_and_unloaded():
    torch.manual_seed(0)
    base = Tokens()
    rows = base.emb.weight.detach().clone()
    model = get_peft_model(base, CondFTConfig(target_modules=["lin"], trainable_token_indices={"emb": [1, 7]}))
    delta = model.base_model.model.emb.token_adapter.trainable_tokens_delta["default"]
    with torch.no_grad():
        delta += 1.0
    adapted = model(torch.arange(11))
    merged = model.merge_and_unload()
    assert type(merged.emb) is nn.Embedding
    assert isinstance(merged.emb.weight, nn.Parameter)
    torch.testing.assert_close(merged(torch.arange(11)), adapted)
    changed = (merged.emb.weight != rows).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [1, 7]


@pytest.mark.parametrize("scope", [None, "all-linear"])
def test_layers_to_transform_narrows_every_layer_too(tiny_llama, scope):
    everything = get_peft_model(tiny_llama(), CondFTConfig()).peft_config["default"].target_units
    config = CondFTConfig(target_modules=scope, layers_to_transform=[0, 2])
    get_peft_model(tiny_llama(), config)
    assert config.target_units == [name for name in everything if ".layers.0." in name or ".layers.2." in name]
    one = CondFTConfig(target_modules=scope, layers_to_transform=0, layers_pattern="layers", num_tensors=1000)
    get_peft_model(tiny_llama(), one)
    assert {name.split(".")[2] for name in one.target_units} == {"0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ".*_proj", "layers_to_transform": [0]}, "layers_to_transform cannot narrow the pattern"),
        ({"layers_pattern": "layers"}, "layers_pattern counts nothing without layers_to_transform"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CondFTConfig(**options)


def test_safe_merge_says_what_pefts_methods_say(tiny_llama):
    model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=3))
    next(p for p in model.parameters() if p.requires_grad).data[0] = torch.nan
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        model.merge_and_unload(safe_merge=True)


def test_several_adapters_train_biases_of_their_own():
    """PEFT allows one: its other methods train the base's own bias, which adapters would share."""
    torch.manual_seed(0)
    options = {"target_modules": ["0"], "bias": "selected", "init_weights": False}
    model = get_peft_model(nn.Sequential(nn.Linear(5, 3), nn.ReLU()), CondFTConfig(**options), "first").eval()
    x = torch.randn(4, 5)
    first = model(x)
    model.add_adapter("second", CondFTConfig(**options))
    assert torch.equal(model(x), first)
    model.set_adapter("second")
    assert not torch.equal(model(x), first)
    with pytest.raises(ValueError, match=r"first.*exists"):
        model.add_adapter("first", CondFTConfig(**options))
