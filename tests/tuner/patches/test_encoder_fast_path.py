"""`nn.TransformerEncoder` calls the wrappers in evaluation; without the patch it reads the base's weights."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from condft import CondFTConfig
from condft.tuner import CondFTLayer
from condft.tuner.patches.encoder_fast_path import disable_encoder_fast_path

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[False, False, False], [False, False, True]])


def build() -> tuple[Any, nn.TransformerEncoder]:
    """An encoder with an adapter that acts on the attention of its first layer, with and without the `PeftModel`."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    config = CondFTConfig(target_units=["layers.0.self_attn.in_proj_weight"], init_weights=False)
    return get_peft_model(encoder, config), encoder


def undo(encoder: nn.Module) -> None:
    """Takes the patch off a model."""
    for module in encoder.modules():
        if isinstance(module, CondFTLayer):
            module._forward_pre_hooks.clear()
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = True


def in_training(encoder: nn.Module, **options: Any) -> Tensor:
    """The result in training mode, where torch does not use its fused operation (there is no dropout)."""
    result: Tensor = encoder.train()(X, **options)
    encoder.eval()
    return result.detach()


def test_torch_alone_ignores_the_adapter() -> None:
    """If this fails, torch calls the modules inside, and the patch may be unnecessary."""
    model, encoder = build()
    undo(encoder)
    with torch.no_grad():
        result = encoder(X)
        with model.disable_adapter():
            torch.testing.assert_close(result, encoder(X))
    assert not torch.allclose(result, in_training(encoder), atol=1e-3)


def test_torch_alone_makes_nested_tensors_that_the_attention_refuses() -> None:
    """If this fails, torch looks for hooks first, and `use_nested_tensor` may stay on."""
    _, encoder = build()
    assert not encoder.use_nested_tensor
    encoder.use_nested_tensor = True
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        encoder(X, src_key_padding_mask=PADDED)


@pytest.mark.parametrize("padding", [None, PADDED], ids=["plain", "padded"])
@pytest.mark.parametrize("gradients", [False, True])
def test_with_the_patch_the_adapter_acts(padding: Tensor | None, gradients: bool) -> None:
    model, encoder = build()
    expected = in_training(encoder, src_key_padding_mask=padding)
    with torch.set_grad_enabled(gradients):
        result = encoder(X, src_key_padding_mask=padding)
        torch.testing.assert_close(result, expected)
        with model.disable_adapter():
            assert not torch.allclose(result, encoder(X, src_key_padding_mask=padding), atol=1e-3)


def test_further_calls_add_nothing() -> None:
    _, encoder = build()
    wrappers = [module for module in encoder.modules() if isinstance(module, CondFTLayer)]
    assert [len(wrapper._forward_pre_hooks) for wrapper in wrappers] == [1]
    disable_encoder_fast_path(encoder, CondFTLayer)
    assert [len(wrapper._forward_pre_hooks) for wrapper in wrappers] == [1]


def test_encoders_without_a_wrapper_keep_their_fast_path() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    disable_encoder_fast_path(encoder, CondFTLayer)
    assert encoder.use_nested_tensor
    assert not any(module._forward_pre_hooks for module in encoder.modules())
