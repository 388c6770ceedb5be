"""The cases of PEFT's suite that cannot apply to CondFT, each with its reason. An entry without a test is an error."""

# Regular expression over the test's id -> reason.
_TWO_ON_ONE_TENSOR = (
    "each adapter holds its own absolute value of the tensor, so two cannot act on it, or be merged into it, at once"
)
_BASE_BIAS = (
    "it sets bias='all' or '<method>_only', which train the base model's own biases in place; CondFT leaves the base "
    "as it is and knows 'none' and 'selected', copies like those of the weights"
)
_OTHER_BASE = (
    "it loads the adapter on another random model than it was made on; CondFT adapters hold absolute values and are "
    "refused there"
)
INAPPLICABLE: dict[str, str] = {
    r"test_custom_models\.py::TestRequiresGrad::test_loading_model_\w*requires_grad_set_correctly\[": _OTHER_BASE,
    r"test_custom_models\.py::TestMultipleActiveAdapters::\w+\[CondFT Same": _TWO_ON_ONE_TENSOR,
    r"test_decoder_models\.py::.*::test_merge_layers_multi\[": _TWO_ON_ONE_TENSOR,
    r"test_custom_models\.py::.*::test_adding_multiple_adapters_with_bias_raises\[": _BASE_BIAS,
    r"test_custom_models\.py::.*::test_save_load_roundtrip_fsdp_wrapped_learnable_bias\[": _BASE_BIAS,
    r"test_decoder_models\.py::.*::test_adding_multiple_adapters_with_bias_raises\[": _BASE_BIAS,
    r"test_encoder_decoder_models\.py::.*::test_adding_multiple_adapters_with_bias_raises\[": _BASE_BIAS,
}
