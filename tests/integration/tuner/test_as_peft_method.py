"""Habits of PEFT's methods that its own test suite found missing, each with the case that found it."""

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from condft import CondFTConfig
from condft.tuner import CondFTLayer
from tests.helpers.models.adapters import train
from tests.helpers.models.tiny_models import logits


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


def test_merging_the_same_adapter_twice_changes_nothing(adapter, tiny_llama, token_ids):
    model = adapter(num_tensors=4)
    adapted = logits(model, token_ids)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(logits(model, token_ids), adapted)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do"):
        model.unmerge_adapter()
    assert torch.equal(logits(model.unload(), token_ids), logits(tiny_llama(), token_ids))


def test_unloading_while_merged_says_what_is_left_in_the_base(adapter, token_ids):
    """The weights stay, as with PEFT's own methods."""
    model = adapter(num_tensors=4)
    adapted = logits(model, token_ids)
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"\['default'\] are merged, .* call unmerge_adapter\(\) first"):
        plain = model.unload()
    assert torch.equal(logits(plain, token_ids), adapted)


def test_a_merged_adapter_cannot_be_deleted(adapter):
    model = adapter(num_tensors=4)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"while they are merged\. Please unmerge them first"):
        model.delete_adapter("default")


def test_disabling_again_inside_changes_nothing(adapter, tiny_llama, token_ids):
    model = adapter(num_tensors=4)
    base, adapted = logits(tiny_llama(), token_ids), logits(model, token_ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids), base)
        with pytest.raises(KeyError), model.disable_adapter():  # left by an error, as by its end
            assert torch.equal(logits(model, token_ids), base)
            raise KeyError
    assert torch.equal(logits(model, token_ids), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids), base)
    assert torch.equal(logits(model, token_ids), adapted)


def test_injected_without_a_peft_model(adapter, tiny_llama, token_ids):
    model = adapter(num_tensors=4)
    bare = inject_adapter_in_model(CondFTConfig(num_tensors=4), tiny_llama())
    assert type(bare) is type(tiny_llama())
    missing = set_peft_model_state_dict(bare, get_peft_model_state_dict(model)).missing_keys
    assert not any("condft" in key for key in missing)
    assert torch.equal(logits(bare, token_ids), logits(model, token_ids))
    assert sum(p.requires_grad for p in bare.parameters()) == 4


def test_status_of_layers_and_model(adapter):
    model = adapter(num_tensors=4)
    model.add_adapter("other", CondFTConfig(num_tensors=2, order="highest"))
    layers, whole = model.get_layer_status(), model.get_model_status()
    assert {layer.module_type for layer in layers} == {"condft.FunctionalLayer"}
    assert sum("default" in layer.available_adapters for layer in layers) == 4
    assert sum("other" in layer.available_adapters for layer in layers) == 2
    assert (whole.peft_types, whole.active_adapters) == ({"default": "CONDFT", "other": "CONDFT"}, ["default"])
    assert whole.requires_grad == {"default": True, "other": False}
    assert whole.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_inference_mode_leaves_nothing_to_train(tiny_llama):
    model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=4, inference_mode=True))
    assert model.get_nb_trainable_parameters()[0] == 0


def test_an_adapter_added_by_the_config_of_another_starts_as_that_one_stands(tiny_llama, token_ids):
    """TRL's way to the reference of a policy that was trained before."""
    base = tiny_llama(tied=False)
    rows = {"trainable_token_indices": {"embed_tokens": [3, 5]}, "modules_to_save": ["lm_head"]}
    model = get_peft_model(base, CondFTConfig(num_tensors=5, bias="selected", **rows))
    model.add_adapter("fresh", CondFTConfig(num_tensors=5))
    train(model, token_ids)
    policy = logits(model, token_ids)
    model.add_adapter("ref", model.peft_config["default"])
    trained = {name: p for name, p in model.named_parameters() if "default" in name.split(".")}
    assert {name.split(".")[-1] for name in trained} == {"default", "weight"}
    for name, parameter in trained.items():
        other = model.get_parameter(".".join("ref" if part == "default" else part for part in name.split(".")))
        assert torch.equal(other, parameter)
        assert other.dtype == parameter.dtype
        assert other.data_ptr() != parameter.data_ptr()
        assert not other.requires_grad
    train(model, token_ids)
    assert not torch.equal(logits(model, token_ids), policy)
    model.set_adapter("ref")
    assert torch.equal(logits(model, token_ids), policy)
    model.set_adapter("fresh")
    assert torch.equal(logits(model, token_ids), logits(tiny_llama(tied=False), token_ids))


def test_copies_that_are_to_be_perturbed_are_so_for_each_adapter(tiny_llama):
    model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=1, init_weights=False))
    model.add_adapter("other", model.peft_config["default"])
    (layer,) = (module for module in model.modules() if isinstance(module, CondFTLayer))
    assert not torch.equal(layer.condft_weight["default"], layer.condft_weight["other"])


def test_a_state_dict_to_inject_by_must_be_of_the_configs_units(tiny_llama):
    """PEFT would wrap what the file names, the adapter's config another set."""
    model, config = tiny_llama(), CondFTConfig(num_tensors=3)
    inject_adapter_in_model(config, model)
    state, units = get_peft_model_state_dict(model), config.target_units
    fitting = inject_adapter_in_model(CondFTConfig(target_units=units), tiny_llama(), state_dict=state)
    assert len([m for m in fitting.modules() if isinstance(m, CondFTLayer)]) == 3
    fewer, more = CondFTConfig(target_units=units[:2]), CondFTConfig(target_units=[*units, _another(units)])
    for other, message in ((fewer, "does not train"), (more, "no weights of .* which the adapter trains")):
        with pytest.raises(ValueError, match=f"state_dict handed over for 'default'.*{message}"):
            inject_adapter_in_model(other, tiny_llama(), state_dict=state)


def _another(units: list[str]) -> str:
    return next(u for i in range(4) if (u := f"model.layers.{i}.mlp.up_proj.weight") not in units)
