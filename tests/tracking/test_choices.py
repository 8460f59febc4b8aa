"""Every association with every null: exact properties over drawn cases, links against the dense tracker and a loop."""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxsae import tracking
from jaxsae.artifacts import InputError
from jaxsae.tracking.links import CorpusLatents

N, N_LAYERS, N_SLOTS, N_LATENTS, D_MODEL = 4, 6, 7, 19, 8
ASSOCIATIONS = ("hungarian", "greedy", "links", "feature_id", "none")
NULLS = ("none", "random_pairs", "matched_activation")
FIELDS = ("sample_offsets", "birth", "death", "observation_offsets", "layer", "feature_id", "activation")

properties = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)
choices = st.fixed_dictionaries(
    {
        "association": st.sampled_from(ASSOCIATIONS),
        "gate": st.sampled_from(("after", "before")),
        "max_missed_layers": st.sampled_from((0, 1, 3)),
        "normalise_activations": st.booleans(),
        "null": st.sampled_from(NULLS),
        "association_threshold": st.sampled_from((0.3, 0.55)),
    }
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is tracked, and what the link graph is made of."""

    ids: np.ndarray
    acts: np.ndarray
    decoders: np.ndarray
    corpus: CorpusLatents

    def links(self, m=5):
        return tracking.link_by_coactivation(self.decoders, m, self.corpus, spans=4)

    def track(self, config, links=None):
        if links is None and (config.association == "links" or config.null != "none"):
            links = self.links()
        return tracking.track(self.ids, self.acts, self.decoders, config, links=links)


def draw_latents(rng, n_rows):
    ids = np.full((n_rows, N_LAYERS, N_SLOTS), -1, np.int32)
    acts = np.zeros((n_rows, N_LAYERS, N_SLOTS), np.float32)
    for row in range(n_rows):
        kept = rng.choice(N_LATENTS, N_SLOTS, replace=False)
        for layer in range(N_LAYERS):
            count = rng.integers(0, N_SLOTS + 1)
            ids[row, layer, :count] = rng.permutation(kept)[:count]
            acts[row, layer, :count] = -np.sort(-rng.exponential(1.0, count))
            kept = np.where(rng.random(N_SLOTS) < 0.7, kept, -1)
            free = np.setdiff1d(np.arange(N_LATENTS), kept)
            kept[kept < 0] = rng.choice(free, int((kept < 0).sum()), replace=False)
    return ids, acts


def make_case(seed):
    """Draw features that persist, change and vanish; each layer's activations have a scale of their own."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((N_LATENTS, D_MODEL))
    decoders = (directions + 0.5 * rng.standard_normal((N_LAYERS, N_LATENTS, D_MODEL))).astype(np.float32)
    ids, acts = draw_latents(rng, N)
    corpus_ids, corpus_acts = (np.moveaxis(x, 1, 0) for x in draw_latents(rng, 40))
    return Case(ids, acts, decoders, CorpusLatents(corpus_ids, corpus_acts, N_LATENTS))


def renamed(ids, new):
    """Give each layer's latents new numbers; the layer is axis 1."""
    layers = np.arange(N_LAYERS)[:, None]
    return np.where(ids >= 0, new[layers, ids], -1).astype(np.int32)


def assert_same(tracks, other, *, but=()):
    for name in FIELDS:
        if name not in but:
            np.testing.assert_array_equal(getattr(tracks, name), getattr(other, name), err_msg=name)


@properties
@hypothesis.given(seeds, choices)
def test_track__ignores_how_each_layer_numbers_its_latents(seed, choice):
    case, config, rng = make_case(seed), tracking.TrackerConfig(**choice), np.random.default_rng(seed)
    new = np.stack([rng.permutation(N_LATENTS) for _ in range(N_LAYERS)])
    if config.association == "feature_id":
        new[:] = new[0]  # it goes by the number itself
    decoders = np.empty_like(case.decoders)
    decoders[np.arange(N_LAYERS)[:, None], new] = case.decoders
    corpus_ids = np.moveaxis(renamed(np.moveaxis(case.corpus.ids, 0, 1), new), 1, 0)
    corpus = dataclasses.replace(case.corpus, ids=corpus_ids)
    tracks, other = case.track(config), Case(renamed(case.ids, new), case.acts, decoders, corpus).track(config)
    assert_same(tracks, other, but=("feature_id",))
    np.testing.assert_array_equal(new[tracks.layer, tracks.feature_id], other.feature_id)


@properties
@hypothesis.given(seeds, choices)
def test_track__ignores_each_layer_s_scale_when_normalising(seed, choice):
    """Births, matches and deaths are the same: all thresholds apply to activations that are divided by their mean."""
    case, config = make_case(seed), tracking.TrackerConfig(**{**choice, "normalise_activations": True})
    scale = 2.0 ** np.random.default_rng(seed).integers(-6, 7, N_LAYERS)  # powers of two, so that it is exact
    scaled = dataclasses.replace(case, acts=(case.acts * scale[:, None]).astype(np.float32))
    assert_same(case.track(config), scaled.track(config))


@properties
@hypothesis.given(seeds, choices)
def test_track__births_less_deaths_are_the_living_in_every_layer(seed, choice):
    config = tracking.TrackerConfig(**choice)
    tracks = make_case(seed).track(config)
    owner = np.repeat(np.arange(N), np.diff(tracks.sample_offsets))
    last = tracks.layer[tracks.observation_offsets[1:] - 1]
    for layer in range(N_LAYERS):
        births = np.bincount(owner[tracks.birth <= layer], minlength=N)
        deaths = np.bincount(owner[(tracks.death >= 0) & (tracks.death < layer)], minlength=N)
        is_living = (tracks.birth <= layer) & ((tracks.death < 0) | (tracks.death >= layer))
        np.testing.assert_array_equal(births - deaths, np.bincount(owner[is_living], minlength=N))
    missed = N_LAYERS - 1 - last
    np.testing.assert_array_equal(tracks.death < 0, missed <= config.max_missed_layers)
    assert (np.where(tracks.death >= 0, tracks.death, last) == last).all()


@properties
@hypothesis.given(seeds, choices)
def test_track__of_a_sample_is_the_same_alone(seed, choice):
    case, config = make_case(seed), tracking.TrackerConfig(**choice)
    links = case.links() if choice["association"] == "links" or choice["null"] != "none" else None
    together = case.track(config, links)
    for n in range(N):
        alone = tracking.track(case.ids[n : n + 1], case.acts[n : n + 1], case.decoders, config, links=links)
        tracks = slice(*together.sample_offsets[n : n + 2])
        observations = slice(*together.observation_offsets[together.sample_offsets[n : n + 2]])
        for name in ("birth", "death"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(together, name)[tracks])
        for name in ("layer", "feature_id", "activation"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(together, name)[observations])


@properties
@hypothesis.given(seeds, choices)
def test_track__with_every_latent_linked_equals_the_dense_tracker(seed, choice):
    case = make_case(seed)
    links = tracking.link_by_weights(case.decoders, N_LATENTS)
    null = "none" if choice["null"] == "none" else "random_pairs"
    dense, linked = (
        tracking.TrackerConfig(**{**choice, "association": association, "max_missed_layers": 0, "null": null})
        for association in ("hungarian", "links")
    )
    assert_same(case.track(dense, links), case.track(linked, links))


def oracle_by_links(case, links, config, sample):
    """Follow one sample along the links, one track at a time; return (latents by layer, death) of each track."""
    tracks = []
    for layer in range(N_LAYERS):
        features = [
            (int(f), float(a)) for f, a in zip(case.ids[sample, layer], case.acts[sample, layer], strict=True) if a > 0
        ]
        living = [track for track in tracks if track["death"] < 0]
        cost = np.full((len(living), len(features)), config.association_threshold)
        for (r, track), (c, (latent, act)) in itertools.product(enumerate(living), enumerate(features)):
            if track["at"] >= 0 and latent in links.ids[layer - 1, track["at"]]:
                link = links.ids[layer - 1, track["at"]].tolist().index(latent)
                before = track["act"]
                change = abs(before - act) / (before + act)
                strength = float(links.strengths(layer - 1)[track["at"], link])
                cost[r, c] = min(cost[r, c], 0.6 * (1 - strength) + 0.2 * change)
        pairs = zip(*linear_sum_assignment(cost), strict=True) if cost.size else ()
        matched = {c: living[r] for r, c in pairs if cost[r, c] < config.association_threshold}
        for c, track in matched.items():
            track.update(at=features[c][0], act=features[c][1], last=layer)
            track["seen"][layer] = features[c][0]
        for track in living:
            if layer - track["last"] > config.max_missed_layers:
                track["death"] = track["last"]
            elif track["last"] < layer and track["at"] >= 0:
                track["at"] = int(links.ids[layer - 1, track["at"], 0])
        for c, (latent, act) in enumerate(features):
            if c not in matched and act > config.birth_threshold:
                tracks.append({"at": latent, "act": act, "last": layer, "death": -1, "seen": {layer: latent}})
    return [(track["seen"], track["death"]) for track in tracks]


@pytest.mark.parametrize("missed", [0, 1, 3])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("corpus", [False, True])
def test_track__by_links_equals_a_plain_loop(missed, m, corpus):
    config = tracking.TrackerConfig(association="links", max_missed_layers=missed, association_threshold=0.55)
    n_bridged = 0
    for seed in range(8):
        case = make_case(seed)
        links = case.links(m) if corpus else tracking.link_by_weights(case.decoders, m)
        tracks = case.track(config, links)
        for n in range(N):
            found = []
            for r in range(*tracks.sample_offsets[n : n + 2]):
                at = slice(*tracks.observation_offsets[r : r + 2])
                seen = dict(zip(tracks.layer[at].tolist(), tracks.feature_id[at].tolist(), strict=True))
                found.append((seen, int(tracks.death[r])))
                n_bridged += int(np.any(np.diff(tracks.layer[at]) > 1))
            assert found == oracle_by_links(case, links, config, n)
    assert (n_bridged > 5) == (missed > 0)


def test_track__by_links_reads_no_decoder():
    class Unreadable:
        def __len__(self):
            return N_LAYERS

        def __getitem__(self, layer):
            raise AssertionError(layer)

    case = make_case(0)
    config = tracking.TrackerConfig(association="links")
    links = case.links()
    assert_same(case.track(config, links), tracking.track(case.ids, case.acts, Unreadable(), config, links=links))


def test_track__reads_from_links_the_null_it_would_measure():
    for seed, missed in itertools.product(range(4), (0, 2)):
        case = make_case(seed)
        config = tracking.TrackerConfig(null="random_pairs", max_missed_layers=missed)
        measured = tracking.track(case.ids, case.acts, case.decoders, config)
        assert_same(measured, case.track(config, case.links()))


def test_null__makes_a_threshold_mean_the_same_in_layers_of_other_spread():
    """A pair is matched when it is the same share of the way from its layers' null to 1: at cosine (1 + q) / 2."""
    rng = np.random.default_rng(0)
    for d_model in (8, 64):
        decoders = rng.standard_normal((2, 600, d_model)).astype(np.float32)
        links = tracking.link_by_weights(decoders, 1)
        null = links.null_cosines[0, 0, 0]
        cos = np.array([-0.01, 0.01]) + (1 + null) / 2
        u, v = decoders[0, 0] / np.linalg.norm(decoders[0, 0]), decoders[1, 0]
        across = v - (v @ u) * u
        across /= np.linalg.norm(across)
        decoders[1, :2] = cos[:, None] * u + np.sqrt(1 - cos[:, None] ** 2) * across
        config = tracking.TrackerConfig(null="random_pairs", association_threshold=0.3)  # cost 0.6 (1 - s) below 0.3
        for latent, n_tracks in ((0, 2), (1, 1)):
            ids = np.array([[[0], [latent]]])
            tracks = tracking.track(ids, np.ones(ids.shape), decoders, config, links=links)
            assert len(tracks.birth) == n_tracks


@pytest.mark.parametrize(
    ("config", "links", "match"),
    [
        ({"association": "links"}, None, "association=links needs a link graph"),
        ({"null": "matched_activation"}, None, "null=matched_activation needs a link graph"),
        ({"null": "matched_activation"}, "weights", "links lack the null matched_activation"),
        ({"null": "random_pairs", "max_missed_layers": 5}, "weights", "up to 4 apart, expected 6 and 6"),
        ({"association": "links"}, "short", "links are of 3 layers, the features of 6"),
        ({"association": "links"}, "narrow", r"feature id \d+ in sample \d, layer 0: the links are of 3 latents"),
    ],
)
def test_track__names_links_that_do_not_fit(config, links, match):
    case = make_case(0)
    made = {
        None: lambda: None,
        "weights": lambda: tracking.link_by_weights(case.decoders, 2, spans=4),
        "short": lambda: tracking.link_by_weights(case.decoders[:3], 2),
        "narrow": lambda: tracking.link_by_weights(case.decoders[:, :3], 2),
    }[links]()
    with pytest.raises(InputError, match=match):
        tracking.track(case.ids, case.acts, case.decoders, tracking.TrackerConfig(**config), links=made)


def test_track__names_a_null_that_leaves_nothing():
    decoders = np.ones((2, 30, 3), np.float32)
    ids = np.array([[[0], [1]]])
    with pytest.raises(InputError, match=r"unrelated latents of layer 1 .* up to 1\.000"):
        tracking.track(ids, np.ones(ids.shape), decoders, tracking.TrackerConfig(null="random_pairs"))


def test_relabel_links__keeps_strengths_and_says_nothing():
    case = make_case(0)
    links = case.links()
    other = tracking.relabel_links(links, seed=0)
    np.testing.assert_array_equal(links.cosines, other.cosines)
    for layer in range(N_LAYERS - 1):
        new = {int(a): int(b) for a, b in zip(links.ids[layer].ravel(), other.ids[layer].ravel(), strict=True)}
        assert sorted(new.values()) == sorted(new)
        assert sum(a == b for a, b in new.items()) < len(new) / 2
        for child, renamed_child in new.items():
            assert links.parents[layer, child] == other.parents[layer, renamed_child]
