"""The arithmetic of explanations: matched draws, effects, likeness, splits, and the layer a verdict stands from."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp

from jaxsae.detection import ProtocolConfig, explain, fit_detector

SIZES = [
    np.array([0.0, 1.0, 1.1, 50.0, 1.2, 0.9, 60.0, 70.0, 0.8]),
    np.array([2.0, 0.0, 40.0, 2.2, 1.9, 2.1, 2.05, 90.0, 0.0]),
]
TRACK = [(0, 1), (1, 0)]


def test_draw_matched__takes_active_latents_of_like_size_in_the_same_layers():
    drawn = explain.draw_matched(TRACK, SIZES, draws=25, rng=np.random.default_rng(0))
    assert len({frozenset(pairs) for pairs in drawn}) == len(drawn) == 25  # all there are of five times five
    assert {tuple(layer for layer, _ in pairs) for pairs in drawn} == {(0, 1)}
    # The five nearest in log size, none of them the track's own; silent latents never.
    assert {pairs[0][1] for pairs in drawn} == {2, 3, 4, 5, 8}
    assert {pairs[1][1] for pairs in drawn} == {2, 3, 4, 5, 6}


def test_draw_matched__draws_no_latent_twice():
    sizes = [np.array([3.0, 3.0, 3.0, 3.0])]
    drawn = explain.draw_matched([(0, 0), (0, 1)], sizes, draws=50, rng=np.random.default_rng(0))
    assert [frozenset(latent for _, latent in pairs) for pairs in drawn] == [frozenset({2, 3})]


def test_draw_matched__takes_more_latents_of_like_size_for_a_short_track():
    drawn = explain.draw_matched([(0, 1)], SIZES, draws=7, rng=np.random.default_rng(0))
    assert {latent for ((_, latent),) in drawn} == {2, 3, 4, 5, 6, 7, 8}
    assert len(explain.draw_matched([(0, 1)], SIZES, draws=20, rng=np.random.default_rng(0))) == 7


def test_draw_matched__gives_nothing_where_a_layer_has_no_other_active_latent():
    sizes = [SIZES[0], np.array([2.0, *[0.0] * 8])]
    assert explain.draw_matched(TRACK, sizes, draws=3, rng=np.random.default_rng(0)) == []


def test_compare__counts_changes_at_least_as_large_on_either_side():
    effect = explain.compare(-0.5, np.array([0.1, -0.2, 0.6, -0.5, 0.0]))
    assert effect.change == -0.5
    assert effect.random_mean == pytest.approx(0.0)
    assert effect.p_value == (1 + 2) / 6
    low, high = np.percentile([0.1, -0.2, 0.6, -0.5, 0.0], [2.5, 97.5])
    assert (effect.random_low, effect.random_high) == (low, high)


def test_latent_sizes__are_activation_times_decoder_length_summed_over_tokens():
    feats = [sp.csr_matrix([[0.0, 2.0, 0.0], [1.0, 3.0, 0.0]])]
    sizes = explain.latent_sizes(feats, [np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 1.0]])])
    np.testing.assert_allclose(sizes[0], [5.0, 10.0, 0.0])
    assert explain.total_size([(0, 0), (0, 1)], sizes) == 15.0


def dense_similarity(ids, acts, other_ids, other_acts, n_latents):
    def dense(ids, acts):
        rows = np.zeros((len(ids), n_latents))
        for row, (these, values) in enumerate(zip(ids, acts, strict=True)):
            rows[row, these[these >= 0]] = values[these >= 0]
        return rows

    one, two = dense(ids, acts), dense(other_ids, other_acts)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    return np.mean([a @ b / n if n else 0.0 for a, b, n in zip(one, two, norms, strict=True)])


def test_similarity__equals_the_mean_cosine_of_dense_rows():
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((6, 3, 11)), axis=-1)[..., :4]
    acts = rng.exponential(size=ids.shape)
    ids[rng.random(ids.shape) < 0.3] = -1
    ids[2, 1] = -1  # a layer without an active latent
    found = explain.similarity(ids[0], acts[0], ids, acts)
    expected = [dense_similarity(ids[0], acts[0], ids[n], acts[n], 11) for n in range(6)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0] == pytest.approx(1.0)
    assert found.argmax() == 0


def test_split_layer__is_the_first_layer_the_other_answer_goes_without():
    other = np.array([[4, 7], [9, -1], [2, 3]])
    assert explain.split_layer([(0, 7), (1, 9), (2, 5)], other) == 2
    assert explain.split_layer([(1, 8), (2, 3)], other) == 1
    assert explain.split_layer([(0, 4), (1, 9), (2, 3)], other) is None


@pytest.mark.parametrize(
    ("is_as_last", "layer"),
    [([True] * 4, None), ([False, True, False, True], 2), ([True, False, True, True], 1), ([False, True], 0)],
)
def test_earliest_layer__is_where_the_verdict_stops_changing(is_as_last, layer):
    assert explain.earliest_layer(np.array(is_as_last)) == layer


def test_repeat_row__copies_every_column_of_one_row_but_those_given(tables):
    metrics = np.arange(2 * len(tables.track_columns), dtype=np.float64).reshape(2, -1)
    repeated = explain.repeat_row(tables, 5, 2, track_metrics=metrics)
    assert repeated.ids == (tables.ids[5],) * 2
    assert repeated.track_columns == tables.track_columns
    np.testing.assert_array_equal(repeated.track_metrics, metrics)
    for field in dataclasses.fields(tables):
        before = getattr(tables, field.name)
        if isinstance(before, np.ndarray) and field.name != "track_metrics":
            np.testing.assert_array_equal(getattr(repeated, field.name), before[[5, 5]])
    for name, family in tables.track_families.items():
        assert (repeated.track_families[name].matrix != family.matrix[[5, 5]]).sum() == 0


@pytest.fixture(scope="module")
def stacked(tables):
    return fit_detector(tables, ProtocolConfig(folds=4, trees=5, probe_c=(0.03,)))


def test_scores_by_layer__puts_the_mean_for_what_a_layer_cannot_know(stacked, tables):
    n_layers = tables.n_layers
    rows = explain.repeat_row(tables, 3, n_layers)
    found = explain.scores_by_layer(stacked, rows)
    assert found[-1] == stacked.scores(rows)[-1]
    assert found[0] == stacked.combine(stacked.stack[0].mean_[None])[0]
    columns = stacked.part_scores(rows)
    for layer in range(n_layers):
        for index, part in enumerate(stacked.parts):
            is_output = part.choice.layer is None and part.name not in ("tracks_forest", "tracks_logistic")
            if (is_output and layer < n_layers - 1) or (part.choice.layer or 0) > layer:
                columns[layer, index] = stacked.stack[0].mean_[index]
    np.testing.assert_allclose(found[1:], stacked.combine(columns), rtol=1e-12)
    assert len(set(found.tolist())) > 2


def test_scores_by_layer__knows_nothing_of_a_single_log_probability_before_the_last_layer(tables):
    fitted = fit_detector(tables, ProtocolConfig(folds=4, deploy="logprob_mean"))
    found = explain.scores_by_layer(fitted, explain.repeat_row(tables, 3, tables.n_layers))
    assert np.isnan(found[:-1]).all()
    assert np.isfinite(found[-1])
