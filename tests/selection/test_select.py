"""Selection is a pure function: budgets, orders, strata, ties."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condft.report import Role, ScreenedUnit, SpectralReport
from condft.selection.scores import Score
from condft.selection.select import DEFAULT_NUM_TENSORS, select_units, shape_warning
from tests.helpers.records.reports import make_row

TYPES = ("layers.*.k", "layers.*.q", "layers.*.v")


def grid(layers: int = 10, *, sizes: tuple[int, ...] = (8, 8, 8)) -> SpectralReport:
    """κ grows with depth within a type; v lies far under q, as in real models."""
    scale = {"layers.*.k": 30.0, "layers.*.q": 1000.0, "layers.*.v": 4.0}
    rows = [
        make_row(f"layers.{i}.{t[-1]}.weight", scale[t] * (1 + i), module_type=t, num_parameters=size, role=Role.LAYER)
        for t, size in zip(TYPES, sizes, strict=True)
        for i in range(layers)
    ]
    return SpectralReport(tuple(rows))


def test_stratified_takes_the_lowest_of_each_type_in_proportion():
    selection = select_units(grid(), num_tensors=6)
    assert selection.names == tuple(sorted(f"layers.{i}.{t}.weight" for i in (0, 1) for t in "kqv"))
    assert selection.by_module_type == dict.fromkeys(TYPES, (2, 10))


def test_the_papers_literal_rule_ranks_across_types():
    names = select_units(grid(), num_tensors=12, stratify=None).names
    assert sum(name.endswith("v.weight") for name in names) == 10
    assert not any(name.endswith("q.weight") for name in names)


def test_highest_is_the_mirror_image():
    names = select_units(grid(), num_tensors=3, order="highest").names
    assert names == ("layers.9.k.weight", "layers.9.q.weight", "layers.9.v.weight")


def test_trainable_fraction_is_exact_where_units_divide_it():
    selection = select_units(grid(), trainable_fraction=0.7)
    assert selection.num_parameters == 0.7 * selection.candidate_parameters
    assert set(selection.by_module_type.values()) == {(7, 10)}


def test_what_shares_leave_unused_is_dealt_out():
    """A tenth of 4 layers is under one unit of any type, but the whole budget holds one."""
    selection = select_units(grid(4), trainable_fraction=0.1)
    assert len(selection.names) == 1
    assert selection.num_parameters <= 0.1 * selection.candidate_parameters


def test_a_first_unit_that_does_not_fit_is_named():
    """The budget would hold a small unit, but units are taken in the order of their rank."""
    sizes = {"a": 600, "b": 100, "c": 100, "d": 100, "e": 100}
    rows = [make_row(name, 1.0 + i, num_parameters=sizes[name]) for i, name in enumerate(sizes)]
    with pytest.raises(ValueError, match=r"budget of 200 parameters trains nothing: a ranks first in .* and has 600"):
        select_units(SpectralReport(tuple(rows)), trainable_fraction=0.2)
    with pytest.raises(ValueError, match="trains nothing: a ranks first and has 600"):
        select_units(SpectralReport(tuple(rows)), trainable_fraction=0.2, stratify=None)
    other = make_row("f", 1.0, module_type="layers.*.v", num_parameters=500)
    with pytest.raises(ValueError, match=r"budget of 150 parameters .*: f ranks first in layers\.\*\.v and has 500"):
        select_units(SpectralReport((*rows, other)), trainable_fraction=0.1)


def test_default_budget_is_the_papers():
    assert len(select_units(grid(60)).names) == DEFAULT_NUM_TENSORS == 100


def test_threshold():
    names = select_units(grid(), max_condition_number=12.0).names
    assert names == ("layers.0.v.weight", "layers.1.v.weight", "layers.2.v.weight")
    assert select_units(grid(), max_condition_number=12.0, stratify=None).names == names


def test_rank_deficient_units_come_last():
    rows = (make_row("a", math.inf), make_row("b", 1e9), make_row("c", 3.0))
    assert select_units(SpectralReport(rows), num_tensors=2).names == ("b", "c")


def test_only_layers_are_candidates_unless_named():
    rows = (make_row("embed", 1.0, role=Role.EMBEDDING), make_row("gate", 1.0, role=Role.ROUTER), make_row("q", 50.0))
    report = SpectralReport(rows)
    assert select_units(report, num_tensors=1).names == ("q",)
    assert select_units(report, num_tensors=1, candidates=["embed", "q"]).names == ("embed",)


@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0, math.inf]), min_size=1, max_size=30),
    st.integers(1, 40),
    st.sampled_from(["lowest", "highest", "random"]),
    st.sampled_from(["module_type", None]),
    st.randoms(use_true_random=False),
)
def test_count_budget_is_met_exactly_in_any_order_of_rows(kappas, count, order, stratify, random):
    rows = [make_row(f"u{i:02d}", kappa, module_type=TYPES[i % 3]) for i, kappa in enumerate(kappas)]
    first = select_units(SpectralReport(tuple(rows)), num_tensors=count, order=order, stratify=stratify)
    random.shuffle(rows)
    again = select_units(SpectralReport(tuple(rows)), num_tensors=count, order=order, stratify=stratify)
    assert first == again
    assert len(first.names) == min(count, len(rows))
    for chosen, available in first.by_module_type.values():
        assert 0 <= chosen <= available
        if stratify:  # a stratum's share is its proportion, rounded down or up
            assert math.floor(len(first.names) * available / len(rows)) <= chosen
            assert chosen <= math.ceil(len(first.names) * available / len(rows))


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(1.0, 1e6)), min_size=1, max_size=25),
    st.floats(0.01, 1.0),
    st.sampled_from(["module_type", None]),
)
def test_fraction_budget_is_never_exceeded_and_nothing_better_is_left_out(units, fraction, stratify):
    rows = [
        make_row(f"u{i:02d}", kappa, module_type=TYPES[i % 3], num_parameters=size)
        for i, (size, kappa) in enumerate(units)
    ]
    report = SpectralReport(tuple(rows))
    total = sum(size for size, _ in units)
    try:
        selection = select_units(report, trainable_fraction=fraction, stratify=stratify)
    except ValueError as error:
        assert "trains nothing" in str(error)  # noqa: PT017 (either outcome is right, each with its own check)
        return
    assert 0 < selection.num_parameters <= fraction * total * (1 + 1e-12)
    chosen = set(selection.names)
    for kind in TYPES if stratify else [None]:
        members = [row for row in rows if kind in (None, row.module_type)]
        taken = [row.condition_number for row in members if row.name in chosen]
        left = [row.condition_number for row in members if row.name not in chosen]
        assert not taken or not left or max(taken) <= min(left)  # always a prefix of the ranking


def test_random_depends_on_seed_and_names_only():
    draws = {select_units(grid(), num_tensors=6, order="random", seed=seed).names for seed in range(20)}
    assert len(draws) > 15
    few, many = grid(10), grid(11)
    kept = set(select_units(few, num_tensors=30, order="random").names)
    assert kept < set(select_units(many, num_tensors=33, order="random").names)


def smollm2(scale: float = 1.0) -> SpectralReport:
    """The seven shapes of SmolLM2-135M, 30 layers each, at the condition numbers its weights have."""
    shapes = {
        "q": ((576, 576), 11250.0),
        "k": ((192, 576), 29.0),
        "v": ((192, 576), 5.9),
        "o": ((576, 576), 5136.0),
        "gate": ((1536, 576), 21.7),
        "up": ((1536, 576), 16.2),
        "down": ((576, 1536), 17.6),
    }
    rows = [
        make_row(
            f"layers.{i}.{name}.weight",
            median * (1.0 + scale * (i - 15) / 40),
            module_type=f"layers.*.{name}",
            matrix_shape=shape,
            num_parameters=math.prod(shape),
        )
        for name, (shape, median) in shapes.items()
        for i in range(30)
    ]
    return SpectralReport(tuple(rows))


@pytest.mark.parametrize("budget", [{"num_tensors": n} for n in (1, 21, 30, 100)] + [{"trainable_fraction": 0.1}])
def test_the_literal_rule_on_real_shapes_is_a_choice_of_shape_and_says_so(budget):
    literal = select_units(smollm2(), stratify=None, **budget)
    assert literal.shape_share > 0.5
    warning = shape_warning(literal)
    assert f"explains {literal.shape_share:.0%} of this selection" in warning
    assert f"the {len(literal.names)} chosen of 210 weights" in warning
    assert 'stratify="module_type" (the default) or score="relative_condition_number"' in warning


@pytest.mark.parametrize(
    "options",
    [{}, {"order": "highest"}, {"stratify": None, "score": "relative_condition_number"}]
    + [{"stratify": None, "order": "random", "seed": seed} for seed in range(3)],
)
def test_within_types_relative_and_random_selections_are_not_explained_by_shape(options):
    selection = select_units(smollm2(), num_tensors=21, **options)
    assert selection.shape_share == 0.0
    assert shape_warning(selection) is None


def test_a_threshold_knows_no_strata():
    """Every v lies under 12 and nothing else does, stratified or not."""
    selection = select_units(smollm2(), max_condition_number=10.0)
    assert {name.split(".")[2] for name in selection.names} == {"v"}
    assert selection.stratify is None
    assert selection.shape_share == select_units(smollm2(), num_tensors=30, stratify=None).shape_share > 0.5


def test_the_warning_of_several_shapes_in_one_type_names_the_alternative_that_helps():
    shapes = [(8, 8), (8, 32)]
    rows = [
        make_row(
            f"blocks.{i}.conv", 4.0 if i % 2 else 40.0 + i, module_type="blocks.*.conv", matrix_shape=shapes[i % 2]
        )
        for i in range(10)
    ]
    warning = shape_warning(select_units(SpectralReport(tuple(rows)), num_tensors=5))
    assert 'trainable_fraction with score="relative_condition_number"' in warning
    assert "stratify" not in warning


def test_scores_rank_per_dimension_and_relative_to_shape():
    large = make_row("large", 50.0, matrix_shape=(100, 300), entropy_deficit=10.0, log_volume=-100.0)
    small = make_row("small", 40.0, matrix_shape=(10, 10), entropy_deficit=2.0, log_volume=-20.0)
    report = SpectralReport((large, small))
    chosen = {score: select_units(report, num_tensors=1, score=score).names[0] for score in get_args(Score)}
    assert chosen == {
        "condition_number": "small",
        "relative_condition_number": "small",  # a random 10 x 10 has 34, a random 100 x 300 has 3.5
        "entropy_deficit": "large",  # 0.1 nats a dimension against 0.2
        "stable_rank": "large",  # equal: by name
        "log_volume": "small",  # -2 nats a dimension against -1
        "fisher_information": "small",
    }


@pytest.mark.parametrize("score", ["entropy_deficit", "log_volume"])
def test_scores_that_were_not_measured_name_the_way_out(score):
    rows = (make_row("a"), make_row("b", **{score: None}), make_row("c", **{score: None}))
    with pytest.raises(ValueError, match=r"not measured for 2 of 3 candidates, the first is 'b'.*measures=\"all\""):
        select_units(SpectralReport(rows), score=score, num_tensors=1)
    assert select_units(SpectralReport(rows), score=score, num_tensors=1, candidates=["a"]).names == ("a",)
    assert len(select_units(SpectralReport(rows), score=score, num_tensors=2, order="random").names) == 2


@pytest.mark.parametrize("order", ["lowest", "highest"])
@pytest.mark.parametrize("score", get_args(Score))
def test_a_zero_matrix_is_never_the_best(score, order):
    zero = make_row("a", math.inf, sigma_max=0.0, sigma_min=0.0, stable_rank=0.0, entropy_deficit=math.inf)
    report = SpectralReport((zero, make_row("b"), make_row("c", 9.0)))
    assert select_units(report, num_tensors=2, score=score, order=order).names == ("b", "c")


def test_ties_break_by_name():
    rows = tuple(make_row(name, 2.0) for name in ("d", "b", "a", "c"))
    assert select_units(SpectralReport(rows), num_tensors=2).names == ("a", "b")
    assert select_units(SpectralReport(rows), num_tensors=2, order="highest").names == ("a", "b")


def screened_report(*roles: Role) -> SpectralReport:
    """Two layers and an embedding as keep_lowest=3 keeps them, and units of these roles that it ruled out."""
    rows = (make_row("a", 2.0), make_row("b", 3.0), make_row("embed", 4.0, role=Role.EMBEDDING))
    ruled_out = (ScreenedUnit(f"u{i}", (4, 2), 8, "layers.*.q", role, 4.0) for i, role in enumerate(roles))
    return SpectralReport(rows, screened=tuple(ruled_out))


def test_more_units_than_keep_lowest_kept_are_refused():
    """One of the three rows is no candidate, so that three candidates would take four rows at least."""
    report = screened_report(Role.LAYER, Role.LAYER)
    assert select_units(report, num_tensors=2, stratify=None).names == ("a", "b")
    with pytest.raises(ValueError, match=r"exact figures of only 2 candidates: .* keep_lowest of at least 4"):
        select_units(report, num_tensors=3, stratify=None)


def test_what_was_ruled_out_counts_only_if_it_could_have_been_chosen():
    report = screened_report(Role.EMBEDDING)
    assert select_units(report, num_tensors=3, stratify=None).names == ("a", "b")
    assert select_units(report, num_tensors=9, stratify=None, candidates=["b"]).names == ("b",)
    with pytest.raises(ValueError, match="exact figures of only 2 candidates"):
        select_units(report, num_tensors=3, stratify=None, candidates=["a", "b", "u0"])
    with pytest.raises(ValueError, match="1 of 1 candidates have no row"):
        select_units(report, num_tensors=1, stratify=None, candidates=["nobody"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tensors": 3, "trainable_fraction": 0.1}, "at most one budget, got num_tensors and trainable_fraction"),
        ({"num_tensors": 0}, "num_tensors=0 selects nothing"),
        ({"trainable_fraction": 1.5}, r"outside \(0, 1\]"),
        ({"trainable_fraction": 0.0}, r"outside \(0, 1\]"),
        ({"trainable_fraction": 0.001}, "budget of 0 parameters trains nothing: the smallest of 30 .* has 8"),
        ({"max_condition_number": 2.0}, r"the lowest of 30 candidates is 4 \(layers.0.v.weight\)"),
        ({"max_condition_number": 0.5}, "at least 1"),
        ({"max_condition_number": 9.0, "order": "highest"}, "use num_tensors or trainable_fraction"),
        ({"score": "kappa"}, "score='kappa' is unknown: choose one of 'condition_number'"),
        ({"order": "lowset"}, "order='lowset' is unknown"),
        ({"stratify": "depth"}, "stratify='depth' is unknown"),
        ({"candidates": ["nobody"]}, "have no row in the report, the first is 'nobody'"),
        ({"candidates": []}, "none of the report's 30 units is a candidate"),
    ],
)
def test_bad_budgets_name_the_number_and_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        select_units(grid(), **options)
