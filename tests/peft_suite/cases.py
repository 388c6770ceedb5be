"""CondFT's rows for the lists of cases in PEFT's test suite, in the shape that each list has.

Without a budget CondFT takes 100 tensors, all that these models have in the scope, so `target_modules` alone decides
what is trained, as in the rows of PEFT's other methods.
"""

from typing import Any

from condft import CondFTConfig

_MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP, a pattern", "MLP", {"target_modules": "lin0"}),
    ("MLP, a list", "MLP", {"target_modules": ["lin0"]}),
    ("MLP, the last layer", "MLP", {"target_modules": ["lin1"]}),
    ("MLP, several layers", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP, a regex", "MLP", {"target_modules": r"lin\d"}),
    ("MLP, all-linear", "MLP", {"target_modules": "all-linear"}),
    ("MLP, every layer", "MLP", {}),
    ("MLP, exclude_modules", "MLP", {"exclude_modules": ["lin1"]}),
    ("MLP, modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP, target_units", "MLP", {"target_units": ["lin0.weight"]}),
    ("MLP, selected bias", "MLP", {"target_modules": ["lin0"], "bias": "selected"}),
    ("MLP, fraction", "MLP", {"target_modules": ["lin0", "lin1"], "trainable_fraction": 0.9}),
    ("MLP, random control", "MLP", {"target_modules": ["lin0", "lin1"], "num_tensors": 1, "order": "random"}),
    ("Embedding + Conv1D, Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Embedding + Conv1D, embedding", "EmbConv1D", {"target_modules": ["emb"]}),
    ("Embedding + Conv1D, both", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    (
        "Embedding + Conv1D, trainable tokens",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
    ),
    (
        "Embedding + Conv1D, modules_to_save",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "modules_to_save": ["lin0"]},
    ),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv1d with groups", "Conv1dGroups", {"target_modules": ["conv1d"]}),
    ("Conv1d of many channels", "Conv1dBigger", {"target_modules": ["conv1d"]}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d and Linear", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d of kernel 1", "Conv2d1x1", {"target_modules": ["conv2d"]}),
    ("Conv2d with groups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv3d", "Conv3d", {"target_modules": ["conv3d"]}),
    ("MultiheadAttention", "MHA", {"target_modules": ["mha"]}),
    ("MultiheadAttention and Linear", "MHA", {"target_modules": ["mha", "lin0"]}),
    ("Conv3d and Linear", "Conv3d", {"target_modules": ["conv3d", "lin0"]}),
]
_TEST_CASES = [(name, model, CondFTConfig, options) for name, model, options in _MODELS]

_LIN0: dict[str, Any] = {"target_modules": ["lin0"], "init_weights": False}
_LIN1: dict[str, Any] = {"target_modules": ["lin1"], "init_weights": False}
_TWO_ADAPTERS = [
    ("CondFT Same", "condft", CondFTConfig, _LIN0, _LIN0),
    ("CondFT Different", "condft", CondFTConfig, _LIN0, _LIN1),
]
_MIXED_BATCHES = [("CondFT mixed adapter", CondFTConfig(**_LIN0), CondFTConfig(**_LIN0))]


def _tasks(task_type: str, **options: Any) -> list[tuple[type, dict[str, Any]]]:
    """The default selection of half the weights, and all linear layers."""
    return [
        (CondFTConfig, {"task_type": task_type, "trainable_fraction": 0.5, **options}),
        (CondFTConfig, {"task_type": task_type, "target_modules": "all-linear", **options}),
    ]


# (module, list) -> rows
CONDFT_CASES: dict[tuple[str, str], list[Any]] = {
    ("test_custom_models", "TEST_CASES"): _TEST_CASES,
    ("test_custom_models", "ALL_PEFT_CONFIG_CLASSES"): [CondFTConfig],
    ("test_custom_models", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"): _TWO_ADAPTERS,
    ("test_custom_models", "MIXED_ADAPTER_TEST_CASES"): _MIXED_BATCHES,
    ("test_config", "ALL_CONFIG_CLASSES"): [(CondFTConfig, {})],
    ("test_config", "LAYER_INDEXING_CONFIG_CLASSES"): [(CondFTConfig, {})],
    ("test_decoder_models", "ALL_CONFIGS"): _tasks("CAUSAL_LM"),
    ("test_encoder_decoder_models", "ALL_CONFIGS"): _tasks("SEQ_2_SEQ_LM"),
    ("test_seq_classifier", "ALL_CONFIGS"): _tasks("SEQ_CLS"),
    ("test_feature_extraction_models", "ALL_CONFIGS"): _tasks(
        "FEATURE_EXTRACTION",
        exclude_modules=["pooler.dense"],  # the tests' loss is of the hidden states, which the pooler comes after
    ),
}
