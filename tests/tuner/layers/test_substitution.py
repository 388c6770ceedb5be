"""Linear layers, convolutions and embeddings whose class has a forward of its own; attributes replaced for a call."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, WhisperConfig, WhisperForConditionalGeneration
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.voxtral_realtime.modeling_voxtral_realtime import VoxtralRealtimeCausalConv1d

from condft import CondFTConfig
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits

pytestmark = pytest.mark.filterwarnings("ignore:the budget takes all")


class Scaled(nn.Linear):
    """Computes with a function of its weight, as weight standardization does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 3 * self.weight, self.bias)


class Around(nn.Module):
    """A module around the layer: the model itself is never wrapped."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "scaled": (lambda: Scaled(6, 4), lambda: (torch.randn(3, 6),)),
    "weight_standardized": (lambda: WeightStandardizedConv2d(3, 4, 3), lambda: (torch.randn(2, 3, 8, 8),)),
    "causal": (lambda: VoxtralRealtimeCausalConv1d(8, 4, 3, cache_key="a"), lambda: (torch.randn(2, 8, 9),)),
    "positions_of_opt": (lambda: OPTLearnedPositionalEmbedding(9, 4), lambda: (torch.ones(2, 5, dtype=torch.long), 0)),
    "positions_of_bart": (lambda: BartLearnedPositionalEmbedding(9, 4), lambda: (torch.ones(2, 5), 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layers_own_forward_runs_with_the_copy(kind: str) -> None:
    """Against the same layer unfrozen by hand: same output, same step, same merged weight."""
    make, draw = LAYERS[kind]
    torch.manual_seed(0)
    plain, args = Around(make()), draw()
    model = get_peft_model(copy.deepcopy(plain), CondFTConfig(target_modules=["layer"]))
    assert torch.equal(model(*args), plain(*args))
    for each, parameters in (
        (plain, [plain.layer.weight]),
        (model, [p for p in model.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        each(*args).square().sum().backward()
        optimizer.step()
    trained = model(*args)
    assert torch.equal(trained, plain(*args))
    assert torch.equal(model.merge_and_unload()(*args), trained)


def test_samples_of_several_adapters_run_through_it_if_its_only_input_has_a_row_for_each() -> None:
    x = torch.randn(3, 6)
    model = _two_adapters(Scaled(6, 4))
    with torch.no_grad():
        mixed = model(x, adapter_names=["first", "__base__", "second"])
        alone = [_alone(model, name, x) for name in ("first", "__base__", "second")]
    torch.testing.assert_close(mixed, torch.stack([rows[i] for i, rows in enumerate(alone)]))


def test_samples_in_more_than_one_input_are_refused() -> None:
    """Only the first is divided among the adapters: the other would still have the rows of all samples."""
    model = _two_adapters(OPTLearnedPositionalEmbedding(9, 4))
    mask = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(TypeError, match=r"OPTLearnedPositionalEmbedding .* other arguments"):
        model(mask, 0, mask, adapter_names=["first", "second"])


def _two_adapters(layer: nn.Module) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Around(layer), CondFTConfig(target_modules=["layer"], init_weights=False), "first")
    model.add_adapter("second", CondFTConfig(target_modules=["layer"], init_weights=False))
    return model.eval()


def _alone(model: PeftModel, name: str, x: Tensor) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(x)
    model.set_adapter(name)
    return model(x)


def test_an_embedding_that_scales() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    options: dict[str, Any] = {"head_dim": 8, "intermediate_size": 48, "vocab_size": 96, "tie_word_embeddings": False}
    base = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **options)).eval()
    ids = torch.arange(3, 12).reshape(1, 9)
    config = CondFTConfig(target_units=["model.embed_tokens.weight"])
    assert torch.equal(logits(get_peft_model(copy.deepcopy(base), config), ids), logits(base, ids))
    config = CondFTConfig(target_units=["model.embed_tokens.weight"], init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    adapted = logits(model, ids)
    assert not torch.equal(adapted, logits(base, ids))
    assert torch.equal(logits(model.merge_and_unload(), ids), adapted)


def test_whisper_reads_the_strides_of_its_convolutions() -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    options: dict[str, Any] = sizes | widths | tokens | {"max_source_positions": 10, "tie_word_embeddings": False}
    base = WhisperForConditionalGeneration(WhisperConfig(**options)).eval()
    features, ids = torch.randn(2, 8, 20), torch.arange(3, 9).reshape(2, 3)
    roles = ["embedding", "output_head"]
    model = get_peft_model(base, CondFTConfig(trainable_fraction=1.0, include_roles=roles, init_weights=False)).eval()
    targets = model.peft_config["default"].target_units or []
    assert {"model.encoder.conv1.weight", "model.decoder.embed_tokens.weight"} <= set(targets)
    adapted = model(input_features=features, decoder_input_ids=ids).logits
    adapted.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    generated = model.generate(input_features=features, max_new_tokens=4, do_sample=False)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_features=features, decoder_input_ids=ids).logits, adapted)
    assert torch.equal(merged.generate(input_features=features, max_new_tokens=4, do_sample=False), generated)


def test_accelerates_hook_is_not_an_attribute_of_the_wrapper() -> None:
    """accelerate would use the layer's hook as the wrapper's, and skip the wrapper's forward."""
    layer: Any = get_peft_model(
        Around(nn.Conv1d(2, 2, 3)), CondFTConfig(target_modules=["layer"])
    ).base_model.model.layer
    layer.base_layer._hf_hook = layer.base_layer.hook = object()
    assert layer.stride == (1,)
    assert layer.hook is layer.base_layer.hook
    assert not hasattr(layer, "_hf_hook")
    with pytest.raises(AttributeError, match="nothing"):
        layer.nothing  # noqa: B018


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv1d(3, 4, 2), nn.Embedding(6, 4)], ids=lambda x: type(x).__name__
)
def test_hooks_of_the_layer_run(layer: nn.Module) -> None:
    """Hooks registered before the adapter was made, or on `get_base_layer()`, see the result of the copy."""
    model = get_peft_model(Around(layer), CondFTConfig(target_modules=["layer"], init_weights=False))
    x = torch.randint(6, (2, 3)) if isinstance(layer, nn.Embedding) else torch.randn(2, 3, 6)
    bare, seen = model(x), []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    layer.register_full_backward_hook(lambda module, grads, outer: seen.append("backward"))
    model(x).sum().backward()
    assert torch.equal(model(x), 2 * bare)
    assert seen == ["before", "backward", "before"]
    assert "forward" not in vars(layer)
    model.disable_adapter_layers()
    assert torch.equal(model(x), layer(x))


def test_hooks_of_a_layer_that_trains_in_heads_run() -> None:
    base = build_tiny_llama()
    attention: Any = base.model.layers[1].self_attn
    ids, unit = torch.arange(8)[None], "model.layers.1.self_attn.q_proj.weight[h0]"
    attention.q_proj.register_forward_hook(lambda module, args, output: output.roll(1, dims=1))
    plain = logits(base, ids)
    model = get_peft_model(base, CondFTConfig(target_units=[unit]))
    assert torch.equal(logits(model, ids), plain)


def test_a_forward_that_one_layer_was_given_runs_with_the_copy() -> None:
    layer = nn.Linear(6, 4)
    layer.forward = MethodType(Scaled.forward, layer)
    base, x = Around(layer), torch.randn(3, 6)
    plain = base(x)
    model = get_peft_model(base, CondFTConfig(target_modules=["layer"]))
    assert torch.equal(model(x), plain)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(2)
    trained = model(x)
    assert not torch.equal(trained, plain)
    assert torch.equal(model.merge_and_unload()(x), trained)
