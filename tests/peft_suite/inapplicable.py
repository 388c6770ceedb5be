"""The cases of PEFT's suite that cannot apply to CondFT, each with its reason. An entry without a test is an error."""

# Regular expression over the test's id -> reason.
_TWO_ON_ONE_TENSOR = (
    "each adapter holds its own absolute value of the tensor, so two cannot act on it, or be merged into it, at once"
)
INAPPLICABLE: dict[str, str] = {
    r"test_custom_models\.py::TestMultipleActiveAdapters::\w+\[CondFT Same": _TWO_ON_ONE_TENSOR,
    r"test_decoder_models\.py::.*::test_merge_layers_multi\[": _TWO_ON_ONE_TENSOR,
}
