"""The cloze lines are whole and none is twice there."""

from scripts.research.study.cloze import CLOZE


def test_a_completion_goes_on_where_its_context_ends() -> None:
    assert len(CLOZE) == len({context for context, _ in CLOZE}) == 40
    for context, completion in CLOZE:
        assert context == context.strip()
        # a word of its own, or the rest of a number or formula
        assert completion.startswith(" ") or completion[0].isdigit()
        assert completion.strip() not in context.split()
