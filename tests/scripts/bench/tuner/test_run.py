"""The benchmark's parts, and the rounds that its progress bar counts."""

from scripts.bench.tuner.run import PARTS, rounds
from scripts.bench.tuner.steps import EXPERT_WORK, STEP_WORK


def test_every_part_has_a_number_of_rounds() -> None:
    assert {part: rounds(part, 3) > 0 for part in PARTS} == dict.fromkeys(PARTS, True)
    assert (rounds("steps", 5), rounds("experts", 2)) == (len(STEP_WORK) * 5, len(EXPERT_WORK) * 2)
