"""Costs and assignments on matrices small enough to check by hand or by trying everything."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxsae.artifacts import InputError
from jaxsae.tracking import TrackerConfig, associate
from jaxsae.tracking.associate import assign_by_id, assign_greedy, assign_hungarian, pair_costs


def hungarian(cost, threshold, gate):
    cost = np.array(cost)[None]
    n_rows, n_cols = (np.array([size]) for size in cost.shape[1:])
    return assign_hungarian(cost, n_rows, n_cols, threshold=threshold, gate=gate)[0].tolist()


def every_matching(n_rows, n_cols):
    """Yield each set of pairs without a shared row or column, as a tuple of the row or -1 of each column."""
    for rows in itertools.product(range(-1, n_rows), repeat=n_cols):
        taken = [row for row in rows if row >= 0]
        if len(taken) == len(set(taken)):
            yield rows


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_assign_hungarian__before_is_the_cheapest_set_where_an_unmade_pair_costs_the_threshold(seed, n_rows, n_cols):
    cost = np.random.default_rng(seed).uniform(0.2, 0.8, (n_rows, n_cols))
    savings = {
        rows: sum(0.5 - cost[row, col] for col, row in enumerate(rows) if row >= 0)
        for rows in every_matching(n_rows, n_cols)
    }
    assert tuple(hungarian(cost, 0.5, "before")) == max(savings, key=savings.get)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_assign_hungarian__after_cuts_the_cheapest_full_assignment(seed, n_rows, n_cols):
    cost = np.random.default_rng(seed).uniform(0.2, 0.8, (n_rows, n_cols))
    full = [m for m in every_matching(n_rows, n_cols) if sum(row >= 0 for row in m) == min(n_rows, n_cols)]
    best = min(full, key=lambda m: sum(cost[row, col] for col, row in enumerate(m) if row >= 0))
    expected = [row if row >= 0 and cost[row, col] < 0.5 else -1 for col, row in enumerate(best)]
    assert hungarian(cost, 0.5, "after") == expected


def test_assign_hungarian__after_lets_an_over_threshold_pair_use_up_partners():
    cost = [[0.1, 0.55], [0.3, 1.2]]
    assert hungarian(cost, 0.5, "after") == [1, -1]
    assert hungarian(cost, 0.5, "before") == [0, -1]


def test_assign_hungarian__before_does_not_match_more_at_a_worse_cost():
    cost = [[0.1, 0.45], [0.2, 0.9]]
    assert hungarian(cost, 0.5, "after") == [1, 0]
    assert hungarian(cost, 0.5, "before") == [0, -1]


@pytest.mark.parametrize("gate", ["after", "before"])
def test_assign_hungarian__a_cost_at_the_threshold_does_not_match(gate):
    assert hungarian([[0.5]], 0.5, gate) == [-1]
    assert hungarian([[np.nextafter(0.5, 0)]], 0.5, gate) == [0]


@pytest.mark.parametrize("gate", ["after", "before"])
def test_assign_hungarian__ignores_padding(gate):
    cost = np.full((3, 2, 3), -9.0)
    cost[0, :1, :2] = [[0.3, 0.2]]
    cost[1, :2, :1] = [[0.3], [0.4]]
    assignment = assign_hungarian(cost, np.array([1, 2, 0]), np.array([2, 1, 3]), threshold=0.5, gate=gate)
    assert assignment.tolist() == [[-1, 0, -1], [0, -1, -1], [-1, -1, -1]]


def greedy(cost, row_activations, threshold=0.5):
    cost = np.array(cost)[None]
    n_rows, n_cols = (np.array([size]) for size in cost.shape[1:])
    return assign_greedy(cost, np.array([row_activations]), n_rows, n_cols, threshold=threshold)[0].tolist()


def test_assign_greedy__the_loudest_track_chooses_first():
    cost = [[0.1, 0.2, 0.9], [0.3, 0.45, 0.9]]
    assert greedy(cost, [2.0, 1.0]) == [0, 1, -1]
    assert greedy(cost, [1.0, 2.0]) == [1, 0, -1]


def test_assign_greedy__breaks_ties_by_age_and_by_order():
    assert greedy([[0.1, 0.1], [0.1, 0.1]], [1.0, 1.0]) == [0, 1]


def test_assign_greedy__a_cost_at_the_threshold_does_not_match():
    assert greedy([[0.5], [0.4]], [2.0, 1.0]) == [1]


def test_assign_greedy__ignores_padding():
    cost = np.full((2, 2, 3), 0.1)
    row_activations = np.array([[1.0, 5.0], [1.0, 5.0]])
    assignment = assign_greedy(cost, row_activations, np.array([1, 0]), np.array([2, 3]), threshold=0.5)
    assert assignment.tolist() == [[0, -1, -1], [-1, -1, -1]]


def test_assign_by_id__matches_equal_ids_only():
    row_ids, col_ids = np.array([[4, 9], [2, -1]]), np.array([[9, 5, 4], [7, -1, -1]])
    assert assign_by_id(row_ids, col_ids, col_ids >= 0).tolist() == [[1, -1, 0], [-1, -1, -1]]


def test_pair_costs__follow_the_published_formula():
    cos = np.array([[[1.5, 0.25], [-2.0, 0.0], [1.0, 1.0]]])
    rows, cols = np.array([[3.0, 1.0, 1e-6]]), np.array([[1.0, 0.1]])
    expected = [
        [0.6 * 0 + 0.2 * 2 / 4, 0.6 * 0.75 + 0.2 * 2.9 / 3.1],  # cosines are clipped to [-1, 1]
        [0.6 * 2 + 0.2 * 0, 0.6 * 1 + 0.2 * 0.9 / 1.1],
        [0.2 * 1, 0.2 * 0],  # a silent track: 1 if the feature is above 0.1, else 0
    ]
    np.testing.assert_allclose(pair_costs(cos, rows, cols, config=TrackerConfig())[0], expected, rtol=1e-14)


def test_pair_costs__use_both_weights():
    config = TrackerConfig(semantic_weight=2.0, activation_weight=5.0)
    cost = pair_costs(np.array([[[0.5]]]), np.array([[3.0]]), np.array([[1.0]]), config=config)
    assert cost.item() == 2.0 * 0.5 + 5.0 * 0.5


def test_tracker_config__reference_is_the_published_one_and_differs_in_the_gate():
    assert TrackerConfig.reference() == TrackerConfig("hungarian", 0.5, 0.5, 0.6, 0.2, "after", 0, False)
    assert TrackerConfig() == TrackerConfig("hungarian", 0.5, 0.5, 0.6, 0.2, "before", 0, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"association": "hungary"}, "tracking.association is 'hungary', expected one of hungarian, greedy"),
        ({"gate": "during"}, "tracking.gate is 'during', expected one of after, before"),
        ({"birth_threshold": -0.5}, r"tracking.birth_threshold is -0\.5"),
        ({"association_threshold": float("nan")}, "tracking.association_threshold is nan"),
        ({"association_threshold": 0.0}, r"tracking.association_threshold is 0, .*association=none"),
        ({"semantic_weight": float("inf")}, "tracking.semantic_weight is inf"),
        ({"semantic_weight": 0, "activation_weight": 0.0}, "are both 0"),
        ({"max_missed_layers": -1}, "tracking.max_missed_layers is -1"),
    ],
)
def test_tracker_config__names_a_bad_setting(settings, message):
    with pytest.raises(InputError, match=message):
        TrackerConfig(**settings)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (associate._check_weight, "much", "tracking.name is 'much', expected a finite number"),
        (associate._check_weight, True, "tracking.name is True, expected a finite number"),
        (associate._check_count, 1.5, r"tracking.name is 1\.5, expected a whole number"),
        (associate._check_count, True, "tracking.name is True, expected a whole number"),
        (associate._check_flag, 1, "tracking.name is 1, expected True or False"),
    ],
)
def test_tracker_config__names_a_setting_of_a_wrong_type(check, value, message):
    """Called directly, because in the tests the runtime type checker refuses these before `TrackerConfig` does."""
    with pytest.raises(InputError, match=message):
        check("name", value)
