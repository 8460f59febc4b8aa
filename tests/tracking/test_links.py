"""The link graph against plain loops over dense matrices, its nulls, and concepts as chains of mutual best links."""

import numpy as np
import pytest

from jaxsae import tracking
from jaxsae.artifacts import InputError
from jaxsae.tracking import links as links_module
from jaxsae.tracking.links import CorpusLatents, LinkGraph, random_null

N_LAYERS, N_LATENTS, D_MODEL, N_TOKENS, N_SLOTS = 4, 23, 7, 60, 5


def make_decoders(seed, n_layers=N_LAYERS, n_latents=N_LATENTS, d_model=D_MODEL, noise=0.3):
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((n_latents, d_model))
    return (directions + noise * rng.standard_normal((n_layers, n_latents, d_model))).astype(np.float32)


def make_corpus(seed, n_layers=N_LAYERS, n_latents=N_LATENTS, n_tokens=N_TOKENS, n_slots=N_SLOTS):
    """Draw tokens whose latents mostly persist from layer to layer; latent 0 never fires, some slots are empty."""
    rng = np.random.default_rng(seed)
    ids = np.full((n_layers, n_tokens, n_slots), -1, np.int32)
    acts = np.zeros((n_layers, n_tokens, n_slots), np.float32)
    for token in range(n_tokens):
        kept = 1 + rng.choice(n_latents - 1, n_slots, replace=False)
        for layer in range(n_layers):
            count = rng.integers(2, n_slots + 1)
            order = rng.permutation(n_slots)[:count]
            ids[layer, token, :count] = kept[order]
            acts[layer, token, :count] = -np.sort(-rng.exponential(1.0, count))
            kept[0] = next(f for f in 1 + rng.permutation(n_latents - 1) if f not in kept)
    return CorpusLatents(ids, acts, n_latents)


def dense_cosines(decoders, layer):
    units = [d / np.linalg.norm(d, axis=1, keepdims=True) for d in decoders[layer : layer + 2].astype(np.float64)]
    return units[0] @ units[1].T


def dense_correlations(corpus, layer):
    acts = np.zeros((2, corpus.ids.shape[1], corpus.n_latents))
    for side in range(2):
        for token, slot in np.argwhere(corpus.ids[layer + side] >= 0):
            acts[side, token, corpus.ids[layer + side, token, slot]] = corpus.activations[layer + side, token, slot]
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = np.corrcoef(acts[0], acts[1], rowvar=False)
    return np.nan_to_num(whole[: corpus.n_latents, corpus.n_latents :])


def assert_strongest(graph, layer, dense, m):
    """Ids, strengths and parents are those of sorting a dense matrix of strengths."""
    order = np.argsort(-dense, axis=1, kind="stable")[:, :m]
    np.testing.assert_array_equal(graph.ids[layer], order)
    np.testing.assert_allclose(graph.strengths(layer), np.take_along_axis(dense, order, axis=1), atol=2e-6)
    np.testing.assert_array_equal(graph.parents[layer], dense.argmax(axis=0))


@pytest.mark.parametrize("m", [1, 4, N_LATENTS])
@pytest.mark.parametrize("block_bytes", [links_module.BLOCK_BYTES, 16 * N_LATENTS * 5])
def test_link_by_weights__finds_the_largest_cosines(m, block_bytes, monkeypatch):
    monkeypatch.setattr(links_module, "BLOCK_BYTES", block_bytes)
    decoders = make_decoders(0)
    graph = tracking.link_by_weights(decoders, m)
    assert graph.ids.shape == (N_LAYERS - 1, N_LATENTS, m)
    for layer in range(N_LAYERS - 1):
        assert_strongest(graph, layer, dense_cosines(decoders, layer), m)


@pytest.mark.parametrize("m", [1, 4, N_LATENTS])
@pytest.mark.parametrize("block_bytes", [links_module.BLOCK_BYTES, 16 * N_LATENTS * 5])
def test_link_by_coactivation__ranks_by_the_mean_of_cosine_and_correlation(m, block_bytes, monkeypatch):
    monkeypatch.setattr(links_module, "BLOCK_BYTES", block_bytes)
    decoders, corpus = make_decoders(1), make_corpus(1)
    graph = tracking.link_by_coactivation(decoders, m, corpus)
    assert graph.n_tokens == N_TOKENS
    for layer in range(N_LAYERS - 1):
        correlations = dense_correlations(corpus, layer)
        assert_strongest(graph, layer, (dense_cosines(decoders, layer) + correlations) / 2, m)
        expected = np.take_along_axis(correlations, graph.ids[layer].astype(np.int64), axis=1)
        np.testing.assert_allclose(graph.coactivation[layer], expected, atol=2e-6)
        assert not graph.coactivation[layer, 0].any()  # latent 0 never fires


def test_link_by_weights__gives_a_row_of_norm_0_cosine_0():
    decoders = make_decoders(2)
    decoders[1, 3] = 0
    graph = tracking.link_by_weights(decoders, N_LATENTS)
    assert not graph.cosines[1, 3].any()
    assert (graph.cosines[0][graph.ids[0] == 3] == 0).all()


def test_link_by_weights__reads_each_layer_once_in_order():
    decoders, read = make_decoders(3), []

    class Reader:
        def __len__(self):
            return N_LAYERS

        def __getitem__(self, layer):
            read.append(layer)
            return decoders[layer]

    done = []
    tracking.link_by_weights(Reader(), 2, spans=3, on_layer=done.append)
    assert (read, done) == ([0, 1, 2, 3], [1, 2, 3])


def test_arrays__come_back(tmp_path):
    for graph in (
        tracking.link_by_weights(make_decoders(4), 3, spans=2),
        tracking.link_by_coactivation(make_decoders(4), 3, make_corpus(4), spans=2),
    ):
        np.savez(tmp_path / "links.npz", **graph.arrays())
        with np.load(tmp_path / "links.npz") as archive:
            back = LinkGraph.from_arrays(dict(archive))
        assert (back.n_layers, back.n_latents, back.n_tokens) == (N_LAYERS, N_LATENTS, graph.n_tokens)
        assert (back.coactivation is None) == (graph.coactivation is None)
        for name, array in graph.arrays().items():
            np.testing.assert_array_equal(back.arrays()[name], array)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("ids", lambda x: x + N_LATENTS, rf"outside -1 to {N_LATENTS - 1}"),
        ("ids", lambda x: x.astype(np.float32), "ids is float32"),
        ("parents", lambda x: x[:, :-1], rf"parents has shape \(3, {N_LATENTS - 1}\)"),
        ("cosines", lambda x: x + 2, r"cosines holds a value that is not in \[-1, 1\]"),
        ("cosines", lambda x: x[..., ::-1], "links of layer 0 do not descend"),
        ("null_strengths", lambda x: x[:1], "null_strengths has shape"),
        ("coactivation", lambda x: x[:1], "coactivation has shape"),
        ("n_tokens", None, "lack the array n_tokens"),
    ],
)
def test_from_arrays__names_what_cannot_be(name, change, match):
    arrays = tracking.link_by_coactivation(make_decoders(5), 3, make_corpus(5)).arrays()
    arrays = {key: x if key != name else change(x) for key, x in arrays.items() if key != name or change}
    with pytest.raises(InputError, match=match):
        LinkGraph.from_arrays(arrays)


def test_random_null__is_the_gaussian_tail_of_random_directions():
    rng = np.random.default_rng(0)
    before, after = rng.standard_normal((2, 3000, 256)).astype(np.float32)
    # One pair in 1,000 and one in 3,000 lie above 3.0 standard deviations, each 1 / sqrt(D).
    assert random_null(before, after, layer=0) == pytest.approx(3.0 / 16, rel=0.03)


def test_random_null__is_not_raised_by_true_counterparts():
    rng = np.random.default_rng(1)
    before = rng.standard_normal((400, 256)).astype(np.float32)
    after = before + 0.1 * rng.standard_normal((400, 256)).astype(np.float32)
    # All 400 counterparts are among the 160,000 pairs, 2.5 of 1,000: a plain quantile would be one of them.
    assert random_null(before, after, layer=0) < 4 / 16


def test_random_null__depends_on_the_seed_alone():
    before, after = make_decoders(6, n_layers=2, n_latents=900, d_model=6)
    nulls = [random_null(before, after, layer=2, seed=seed) for seed in (0, 0, 1)]
    assert nulls[0] == nulls[1] != nulls[2]


def test_nulls__are_those_of_the_pairs_of_layers_at_each_span():
    decoders = make_decoders(7)
    graph = tracking.link_by_weights(decoders, 2, spans=9, seed=3)
    assert graph.null_cosines.shape == (2, N_LAYERS - 1, N_LAYERS - 1)  # no more spans than there are
    for span in range(1, N_LAYERS):
        for layer in range(N_LAYERS - 1):
            found = graph.null_cosines[0, span - 1, layer]
            if layer + span < N_LAYERS:
                assert found == random_null(decoders[layer], decoders[layer + span], layer=layer, span=span, seed=3)
            else:
                assert np.isnan(found)
    np.testing.assert_array_equal(graph.null_strengths[0], graph.null_cosines[0, 0])
    assert np.isnan(graph.null_cosines[1]).all()


def test_nulls__of_matched_activation_come_from_latents_of_equal_rank():
    decoders, corpus = make_decoders(8), make_corpus(8)
    graph = tracking.link_by_coactivation(decoders, 2, corpus)
    for layer in range(N_LAYERS - 1):
        cosines, strengths = [], []
        dense = dense_cosines(decoders, layer)
        mean = (dense + dense_correlations(corpus, layer)) / 2
        for left, right in zip(corpus.ids[layer].ravel(), corpus.ids[layer + 1].ravel(), strict=True):
            if left >= 0 and right >= 0 and mean[left].argmax() != right and mean[:, right].argmax() != left:
                cosines.append(dense[left, right])
                strengths.append(mean[left, right])
        assert graph.null_cosines[1, 0, layer] == pytest.approx(np.quantile(cosines, 0.999), abs=1e-5)
        assert graph.null_strengths[1, layer] == pytest.approx(np.quantile(strengths, 0.999), abs=1e-5)


def test_concepts__are_chains_of_mutual_best_links():
    decoders = make_decoders(9, n_latents=40, d_model=64, noise=0.1)
    decoders[2, 5] = np.random.default_rng(0).standard_normal(64)  # breaks the chain of latent 5 in layer 2
    graph = tracking.link_by_weights(decoders, 3)
    numbers = tracking.concepts(graph)
    others = np.delete(np.arange(40), 5)
    assert (numbers[:, others] == others).all()
    assert numbers[:, 5].tolist() == [5, 5, 40, 41]
    spans = tracking.concept_spans(numbers)
    assert spans.shape == (42, 2)
    assert spans[[0, 5, 40, 41]].tolist() == [[0, 3], [0, 1], [2, 2], [3, 3]]


def test_concepts__has_one_latent_a_layer_and_no_gap():
    decoders = make_decoders(10, noise=0.8)
    numbers = tracking.concepts(tracking.link_by_weights(decoders, 2))
    assert sorted(set(numbers.ravel().tolist())) == list(range(numbers.max() + 1))
    for row in numbers:
        assert len(set(row.tolist())) == N_LATENTS
    for number, (first, last) in enumerate(tracking.concept_spans(numbers)):
        assert [number in row for row in numbers] == [first <= layer <= last for layer in range(N_LAYERS)]


def test_concepts__of_unrelated_layers_are_single_latents():
    rng = np.random.default_rng(11)
    decoders = rng.standard_normal((2, 2000, 64)).astype(np.float32)
    graph = tracking.link_by_weights(decoders, 1)
    is_mutual = graph.ids[0, graph.parents[0], 0] == np.arange(2000)
    is_above = graph.cosines[0, graph.parents[0], 0] > graph.null_strengths[0, 0]
    assert (is_mutual & is_above).mean() > 0.3  # the best of 2,000 pairs exceeds what one in 1,000 does
    assert (tracking.concepts(graph)[1] < 2000).sum() <= 4


def test_concepts__names_a_null_that_is_not_there():
    graph = tracking.link_by_weights(make_decoders(12), 2)
    with pytest.raises(InputError, match="lack the null matched_activation"):
        tracking.concepts(graph, null="matched_activation")
    with pytest.raises(InputError, match="null is 'other'"):
        tracking.concepts(graph, null="other")


@pytest.mark.parametrize(
    ("decoders", "m", "match"),
    [
        (make_decoders(13)[:1], 2, "got 1 layers"),
        (make_decoders(13), 0, "0 links a latent"),
        ([np.ones((3, 2), np.float32), np.ones((4, 2), np.float32)], 1, r"layer 1 has shape \(4, 2\)"),
        ([np.ones(3, np.float32), np.ones(3, np.float32)], 1, r"layer 0 has shape \(3,\)"),
        (np.full((2, 3, 2), np.nan, np.float32), 1, "layer 0 is not finite"),
    ],
)
def test_link_by_weights__names_what_cannot_be_linked(decoders, m, match):
    with pytest.raises(InputError, match=match):
        tracking.link_by_weights(decoders, m)


def test_link_by_coactivation__names_a_corpus_of_other_saes():
    decoders, corpus = make_decoders(14), make_corpus(14)
    with pytest.raises(InputError, match=r"expected \[3, tokens, slots\]"):
        tracking.link_by_coactivation(decoders[:3], 2, corpus)
    with pytest.raises(InputError, match="the decoders have 9"):
        tracking.link_by_coactivation(decoders[:, :9], 2, corpus)
