"""YAML 1.2: what YAML 1.1 reads differently, what is refused, and that written files are read back the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from condft.files.yaml import dump_yaml, parse_yaml
from tests.helpers.processes import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
# No control characters, of which YAML cannot hold all; and words that YAML 1.1 or 1.2 reads as something else.
texts = st.text(st.characters(exclude_categories=["C", "Z"])) | st.sampled_from(
    [
        "no",
        "on",
        "y",
        "null",
        "~",
        "true",
        "1e-3",
        "1_000",
        "0o17",
        "0x1F",
        "1:30",
        "2024-01-01",
        ".inf",
        "=",
        "<<",
        "",
    ]
)
values = st.recursive(plain | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=12)


@given(values)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert parse_yaml(dump_yaml({"value": value}), "here") == {"value": value}


def test_mappings_keep_their_order() -> None:
    assert list(parse_yaml(dump_yaml({"b": 1, "a": 2}), "here")) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("+.5", 0.5),
        ("1E5", 1e5),
        ("12_000", 12_000),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("017", 17),  # octal in YAML 1.1
        ("0o17", 15),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        (".inf", float("inf")),
    ],
)
def test_plain_values_are_read_as_yaml_1_2(text: str, value: Any) -> None:
    (found,) = parse_yaml(f"- {text}", "here")
    assert (type(found), found) == (type(value), value)


def same(old: Any, new: Any) -> bool:
    """Whether YAML 1.1 and 1.2 agree, but for a number with an exponent, which is a string in 1.1."""
    if isinstance(old, dict) and isinstance(new, dict):
        return list(old) == list(new) and all(same(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(same, old, new))
    if isinstance(old, str) and isinstance(new, float):
        return "e" in old and float(old) == new
    return type(old) is type(new) and old == new


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configurations_are_read_as_by_pyyaml(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert same(yaml.safe_load(text), parse_yaml(text, str(path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", 'x.yaml, line 2: not valid YAML: found duplicate key "seed" with value "2"'),
        ("a:\n  b: 1\n  b: 2", 'x.yaml, line 3: not valid YAML: found duplicate key "b"'),
        ("a: [1", "x.yaml, line 1: not valid YAML: while parsing a flow sequence: expected ',' or '\\]'"),
        ("a: 1\n---\nb: 2", "x.yaml, line 2: not valid YAML: expected a single document"),
        ("a: \x00", "x.yaml: not valid YAML: .*special characters are not allowed"),
        ("x: !!python/object/apply:os.system [ls]", "x.yaml, line 1: .*could not determine a constructor"),
    ],
)
def test_what_is_refused_names_source_and_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        parse_yaml(text, "x.yaml")
