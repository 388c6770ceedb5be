"""Which units an analysis is asked for, and what it says if there is none."""

import pytest

from condft.analysis.cache import CachedRows
from condft.analysis.measure import MeasureSpec, UnitInfo
from condft.analysis.request import Request, not_requested, nothing_to_analyze
from condft.report import Role, SkippedWeight, SkipReason

INFOS = {
    name: UnitInfo(name, (4, 3), (4, 3), "float32", "layer", Role.LAYER, None, collective=False) for name in "abc"
}
SKIPPED = [
    SkippedWeight("norm", (4,), SkipReason.FEWER_THAN_TWO_DIMENSIONS),
    SkippedWeight("far", (4, 3), SkipReason.META_DEVICE),
]


def test_all_units_or_the_named_ones_in_the_order_of_the_model():
    assert list(Request("m").select(INFOS, SKIPPED)) == ["a", "b", "c"]
    assert list(Request("m", names=frozenset("ca")).select(INFOS, SKIPPED)) == ["a", "c"]
    assert Request("m", names=frozenset({"norm"})).select(INFOS, SKIPPED) == {}


def test_unknown_names_are_counted_and_the_first_is_named():
    with pytest.raises(ValueError, match="2 of 3 names are of no weight of m, the first is 'x'"):
        Request("m", names=frozenset("xya")).select(INFOS, SKIPPED)


def test_a_new_state_has_the_request_and_what_the_cache_holds():
    request = Request("m", MeasureSpec("all"), keep_lowest=2, stratify="module_type")
    state = request.new_state(INFOS, CachedRows(bounds={"a": 7.0}, versions={"torch": "0"}))
    assert (state.spec, state.keep_lowest, state.stratify) == (MeasureSpec("all"), 2, "module_type")
    assert state.bounds["a"].value == 7.0
    assert state.versions == {"torch": "0"}
    assert request.new_state(INFOS).bounds == {}


def test_what_was_not_requested_is_listed():
    assert not_requested(INFOS, {"b"}) == [SkippedWeight(name, (4, 3), SkipReason.NOT_REQUESTED) for name in "ac"]


def test_the_message_counts_the_reasons_and_names_the_way_out():
    expected = "nothing to analyze in m: 1 fewer_than_two_dimensions, 1 meta_device. Load the weights first."
    assert nothing_to_analyze("m", SKIPPED) == expected
    assert nothing_to_analyze("m", []) == "nothing to analyze in m: no parameters."
