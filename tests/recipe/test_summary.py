"""The table at the end of a run says what the data bears."""

import pytest

from condft.recipe.summary import print_summary

SUMMARY = {
    "wer_before": 1.0,
    "wer_after": 0.5,
    "text_ce_before": 3.0,
    "text_ce_after": 3.1,
    "kl_to_base": 0.1,
    "frozen_unchanged": True,
    "frozen_checked": 3,
    "trainable_parameters": 1,
    "total_parameters": 2,
    "num_selected": 1,
    "seconds_total": 60.0,
    "peak_rss_bytes": 2**30,
}


@pytest.mark.parametrize("new", [True, False])
def test_speakers_are_called_new_only_where_they_are(new: bool, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary({**SUMMARY, "new_speakers": new}, "runs/x")
    shown = capsys.readouterr().out
    assert ("word error rate, new speakers" in shown) is new
    assert ("word error rate, test split" in shown) is not new
