"""The benchmark's figures as rows."""

from scripts.bench.tuner.table import HEADINGS, Figure, figures, markdown


def test_rows_say_whether_targets_are_met() -> None:
    found = {"ratio": 0.61, "low": 0.58, "high": 0.64, "cpu_ratio": 0.59}
    expert = {"work": "mixtral", "implementation": "grouped_mm", "dtype": "bfloat16", "tokens": 512}
    results = {
        "experts": [{**expert, "against_lora": found, "share_of_products": 0.6}],
        "memory": [
            {"work": f"smollm2 {dtype}", "ratio": 1.03, "optimizer_state_exact": True}
            for dtype in ("bfloat16", "float32")
        ],
        "start": {"seconds_beyond_lora": -0.1},
    }
    rows = list(figures(results))
    assert [row.met for row in rows] == [False, False, True, None, True, True]
    assert rows[0].cells()[3:] == ("0.61x", "0.58x-0.64x", "0.59x", "0.60x", "≤ 0.60x", "no")
    assert {len(row.cells()) for row in rows} == {len(HEADINGS)}
    assert markdown(rows).splitlines()[2:] == [
        "| a quarter of the experts, against LoRA `target_parameters` | mixtral, grouped_mm, 512 tokens "
        "|  | **0.61x** (0.60x) | ≤ 0.60x |",
        "| peak memory, against unfrozen with fp32 masters | smollm2 | 1.030x | **1.030x** | ≤ 1.020x |",
        "| optimizer state exactly the selection's | smollm2 | yes | yes |  |",
        "| `get_peft_model`, report cached, beyond LoRA's | SmolLM2 | -0.10 s |  | ≤ 1.00 s |",
    ]


def test_a_target_is_met_at_its_very_figure() -> None:
    assert Figure("step", "any", "float32", 1.03, 1.03).met
    assert not Figure("step", "any", "float32", 1.0301, 1.03).met
    assert Figure("merged", "any", "float32", False).met is False
