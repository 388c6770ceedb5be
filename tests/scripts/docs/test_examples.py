"""Examples of docstrings as code blocks."""

import griffe

from scripts.docs.examples import FencedExamples, fenced

TEXT = """Adds.

Args:
    a: One.

>>> add(1)
[2]

Notes follow."""


def test_an_example_is_fenced_up_to_the_blank_line() -> None:
    assert fenced(TEXT).split("\n")[5:10] == ["```pycon", ">>> add(1)", "[2]", "```", ""]


def test_an_example_at_the_end_is_closed() -> None:
    assert fenced("Adds.\n\n>>> add(1)\n2") == "Adds.\n\n```pycon\n>>> add(1)\n2\n```"


def test_an_indented_example_keeps_its_indentation() -> None:
    assert fenced("Attributes:\n    x: One.\n\n    >>> x\n    1\n\nEnd.").count("\n    ```") == 2


def test_text_without_examples_stays_as_it_is() -> None:
    assert fenced("Adds.\n\nMore > less.") == "Adds.\n\nMore > less."


def test_griffe_hands_docstrings_over() -> None:
    with griffe.temporary_visited_module(
        'def f():\n    """Adds.\n\n    >>> f()\n    """\n', extensions=griffe.Extensions(FencedExamples())
    ) as module:
        docstring = module["f"].docstring
        assert docstring is not None
        assert "```pycon\n>>> f()\n```" in docstring.value
