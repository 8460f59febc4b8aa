"""The training loop: stopping, resuming, non-finite numbers, best steps, thresholds, and that it learns."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsae import artifacts, sae
from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.config import SaeConfig, TrainConfig
from jaxsae.sae import evaluate, train

tiny_run = runpy.run_path(str(Path(__file__).with_name("tiny_run.py")))
PlantedSource, BATCH = tiny_run["PlantedSource"], tiny_run["BATCH"]
L, D, F, K, TOTAL = 3, 7, 13, 2, 20
cached_step, cached_row_sums = functools.cache(train.make_step), functools.cache(evaluate.make_row_sums)


@pytest.fixture(autouse=True)
def compile_each_program_once(monkeypatch):
    """Share compiled programs between the trainers here: compiling would be most of the time."""
    monkeypatch.setattr(train, "make_step", cached_step)
    monkeypatch.setattr(evaluate, "make_row_sums", cached_row_sums)


def make_trainer(folder, source, architecture="topk", *, layer=2, data=1, sae_settings=None, **changes):
    config = {"n_latents": F, "k": K, "dead_tokens": 2 * BATCH, "threshold": 0.3} | (sae_settings or {})
    settings = {
        "batch": BATCH, "n_tokens": TOTAL * BATCH, "lr": 0.02, "warmup_steps": 2, "evaluate_every": 4,
        "evaluate_tokens": 10_000, "checkpoint_every": 4,
    }  # fmt: skip
    n_layers, _, d_model = source.directions.shape
    recipe = sae.make_recipe(
        SaeConfig(architecture=architecture, **config),
        TrainConfig(**(settings | changes)),
        n_layers=n_layers,
        d_model=d_model,
        batches_per_epoch=source.batches_per_epoch,
    )
    about = {"architecture": architecture, "k": config["k"], "n_layers": n_layers, "d_model": d_model}
    artifacts.write_json(Path(folder) / "saes" / "suite.json", about)
    mesh = meshes.make_mesh(n_layers, layer=layer, data=data)
    return sae.Trainer(source, recipe, sae.Checkpoints(Path(folder) / "saes"), mesh=mesh, seed=5)


def run(trainer, stop_at=None):
    """Train; return the outcome, the evaluations by step, and the steps that were reported."""
    evaluations, reported = {}, []
    outcome = trainer.run(
        on_step=lambda step, note: reported.append((step, note)),
        on_evaluation=lambda step, numbers: evaluations.setdefault(step, numbers),
        should_stop=lambda: trainer.step == stop_at,
    )
    trainer.checkpoints.close()
    return outcome, evaluations, reported


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


def test_train__evaluates_reports_and_saves_to_the_end_of_the_budget__and_no_further(tmp_path):
    settings = {"n_tokens": 38 * BATCH, "evaluate_every": 19, "checkpoint_every": 99}
    trainer = make_trainer(tmp_path, PlantedSource(), **settings)
    outcome, evaluations, reported = run(trainer)
    assert (outcome.step, outcome.total_steps, outcome.is_finished) == (38, 38, True)
    assert list(evaluations) == [19, 38]
    assert [step for step, _ in reported] == [16, 19, 35, 38]
    assert set(evaluations[19]) == {"fvu", "mse", "l0", "loss", "dead", "l0_train"}
    assert all(numbers.shape == (L,) for numbers in evaluations[19].values())
    assert reported[1][1] == f"fvu {evaluations[19]['fvu'].mean():.4f}, dead {evaluations[19]['dead'].mean():.1%}"
    assert (evaluations[38]["fvu"] < evaluations[19]["fvu"]).all()
    assert trainer.checkpoints.latest_step() == 38
    again = make_trainer(tmp_path, PlantedSource(), **settings)
    outcome, evaluations, _ = run(again)
    assert (outcome.step, outcome.is_finished, evaluations) == (38, True, {})


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("topk", {}),
        ("gated", {}),  # folded: the weights in the checkpoint are not those that training goes on from
        ("jumprelu", {"optimizer": "signum", "schedule": "schedule_free"}),
    ],
)
def test_train__stopped_and_resumed__equals_uninterrupted(tmp_path, architecture, settings):
    whole = make_trainer(tmp_path / "whole", PlantedSource(), architecture, **settings)
    _, expected, _ = run(whole)
    stopped = make_trainer(tmp_path / "parts", PlantedSource(), architecture, **settings)
    outcome, first, _ = run(stopped, stop_at=6)
    assert (outcome.step, outcome.is_finished) == (6, False)
    assert stopped.checkpoints.latest_step() == 6
    resumed = make_trainer(tmp_path / "parts", PlantedSource(), architecture, **settings)
    assert (resumed.step, resumed.reader) == (6, {"position": 6})
    assert_equal(resumed.state, stopped.state)
    outcome, rest, _ = run(resumed)
    assert outcome.is_finished
    assert_equal(resumed.state, whole.state)
    assert_equal(first | rest, expected)
    assert_equal(sae.load(tmp_path / "parts" / "saes"), sae.load(tmp_path / "whole" / "saes"))


class Buffered(PlantedSource):
    """A source with a buffer, which knows only the runs that it is told of, and cannot be sampled."""

    def init(self, n_batches=None):
        return super().init() | {"n_batches": n_batches}

    def next(self, state):
        assert state["position"] < state["n_batches"] == TOTAL
        return state | {"position": state["position"] + 1}, self.rows(self.batch, 1, state["position"])

    def peek(self, state, n):
        assert state == {"position": 0, "n_batches": TOTAL}
        return self.rows(min(n, 60), 4)

    def sample(self, n, *, seed):
        raise NotImplementedError

    def arrays(self, state):
        return {"rows": jnp.arange(3) + state["position"]}

    def abstract_arrays(self):
        like = jnp.arange(3)
        return {"rows": jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)}

    def restore(self, state, arrays):
        np.testing.assert_array_equal(arrays["rows"], np.arange(3) + state["position"])


def test_train__on_a_source_with_a_buffer__says_when_it_ends__and_starts_from_the_rows_at_hand(tmp_path):
    whole = make_trainer(tmp_path / "whole", Buffered())
    assert whole.reader == {"position": 0, "n_batches": TOTAL}
    rows = Buffered().rows(60, 4)
    np.testing.assert_allclose(whole.state.mean[:L] / whole.state.scale[:L, None], rows.mean(axis=1), rtol=1e-5)
    run(whole)
    run(make_trainer(tmp_path / "parts", Buffered()), stop_at=6)
    source = Buffered()
    source.peek = source.sample  # a resumed run looks at no rows
    resumed = make_trainer(tmp_path / "parts", source)
    assert resumed.step == 6
    assert run(resumed)[0].is_finished
    assert_equal(resumed.state, whole.state)


class Spoiled(PlantedSource):
    """Activations with a NaN in layer 1 of the batch at position 6, which is step 7."""

    def next(self, state):
        position, acts = super().next(state)
        if state["position"] == 6:
            acts[1, 3, 2] = np.nan
        return position, acts


def test_train__on_non_finite_activations__names_step_and_layer__and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(InputError, match="the loss of layer 1 is nan at step 7; the activations are not finite or tra"):
        run(make_trainer(tmp_path, Spoiled(), evaluate_every=99))  # noticed before the checkpoint of step 8
    resumed = make_trainer(tmp_path, PlantedSource())
    assert resumed.step == 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(resumed.state.params)))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_train__on_non_finite_held_out_activations__names_step_and_layer(tmp_path):
    class SpoiledHeldOut(PlantedSource):
        def held_out_batches(self, batch):
            for acts in super().held_out_batches(batch):
                acts[2, 0, 0] = np.inf
                yield acts

    with pytest.raises(InputError, match="the held-out FVU of layer 2 is nan at step 4; its held-out activations"):
        run(make_trainer(tmp_path, SpoiledHeldOut()))


def test_train__that_diverges__stops_and_names_step_and_layer(tmp_path):
    trainer = make_trainer(tmp_path, PlantedSource(), lr=1e30, warmup_steps=0)
    with pytest.raises(InputError, match=r"the loss of layer \d is (inf|nan) at step 2; .* train.lr is too high"):
        run(trainer)
    assert trainer.checkpoints.latest_step() is None


class Drifting(PlantedSource):
    """Layer 0's training rows are far from its held-out rows from position 8 on."""

    def next(self, state):
        position, acts = super().next(state)
        if state["position"] >= 8:
            acts[0] = -4 * acts[0]
        return position, acts


def test_train__keeps_each_layer_at_its_own_best_step(tmp_path):
    trainer = make_trainer(tmp_path, Drifting())
    _, evaluations, _ = run(trainer)
    fvu = np.stack([numbers["fvu"] for numbers in evaluations.values()])
    best_step = np.array(list(evaluations))[fvu.argmin(axis=0)]
    assert best_step[0] < TOTAL
    assert best_step[1] == TOTAL
    np.testing.assert_array_equal(trainer.state.best_step[:L], best_step)
    best, last = (sae.load(tmp_path / "saes", which=which) for which in ("best", "last"))
    assert (best.W_dec[0] != last.W_dec[0]).any()
    np.testing.assert_array_equal(best.W_dec[1], last.W_dec[1])
    _, measured = trainer.measure_best()
    np.testing.assert_allclose(measured["fvu"], fvu.min(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(measured["best_step"], best_step)
    np.testing.assert_array_equal(measured["dead"], [evaluations[step]["dead"][i] for i, step in enumerate(best_step)])
    np.testing.assert_array_equal(measured["l0_train"], K)


class Skewed(PlantedSource):
    """One row in 11 is twelve times as long: in it, many latents pass a threshold that fits the others."""

    def rows(self, n, *key):
        rows = super().rows(n, *key)
        rows[:, ::11] *= 12
        return rows


def test_train__batchtopk__ends_with_thresholds_that_keep_k_held_out(tmp_path):
    acts = Skewed(n_held_out=300)
    run(make_trainer(tmp_path, acts, "batchtopk", data=2, sae_settings={"k": 1}))
    held_out = np.concatenate(list(acts.held_out_batches(64)), axis=1)
    for which in ("best", "last"):
        feats = np.asarray(sae.load(tmp_path / "saes", which=which).encode(held_out))
        np.testing.assert_allclose((feats > 0).sum(axis=-1).mean(axis=-1), 1, rtol=0.02)
    assert (feats > 0).sum(axis=-1).max() > 4


def test_train__with_several_steps_a_dispatch__equals_single_ones(tmp_path):
    _, expected, _ = run(make_trainer(tmp_path / "single", PlantedSource()))
    together = make_trainer(tmp_path / "together", PlantedSource(), steps_per_dispatch=3)
    _, found, _ = run(together)
    assert found.keys() == expected.keys()
    single = make_trainer(tmp_path / "single", PlantedSource())
    assert_equal(together.state, single.state)


def test_measure_best__of_the_reference_architecture__has_one_l0(tmp_path):
    trainer = make_trainer(tmp_path, PlantedSource(dtype=jnp.bfloat16), "jumprelu_l1")
    run(trainer)
    _, measured = trainer.measure_best()
    np.testing.assert_array_equal(measured["l0_train"], measured["l0_inference"])
    suite = sae.load(tmp_path / "saes")
    feats = suite.encode(np.concatenate(list(trainer.held_out()), axis=1).astype(np.float32))
    np.testing.assert_allclose(measured["l0_inference"], (np.asarray(feats) > 0).sum(-1).mean(-1), rtol=1e-6)


def test_held_out__is_cut_at_the_tokens_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, PlantedSource(n_held_out=40), evaluate_tokens=33)
    assert [acts.shape[1] for acts in trainer.held_out()] == [16, 16]


def train_planted(folder, n_directions, architecture="topk", **sae_settings):
    """Train on sums of two of some directions."""
    source, n_steps = PlantedSource(2, 16, n_directions=n_directions, batch=64, n_held_out=256), 400
    settings = {"n_latents": 64, "k": 2, "dead_tokens": 640, "threshold": None} | sae_settings
    trainer = make_trainer(
        folder, source, architecture, sae_settings=settings, batch=64, n_tokens=n_steps * 64, lr=0.03,
        evaluate_every=n_steps, checkpoint_every=n_steps, warmup_steps=10,
    )  # fmt: skip
    return run(trainer)[1][n_steps]


def test_train__recovers_a_planted_dictionary(tmp_path):
    assert (train_planted(tmp_path, 24)["fvu"] < 0.1).all()


@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
def test_train__without_a_coefficient__ends_with_k_active_and_none_dead(tmp_path, architecture):
    numbers = train_planted(tmp_path, 24, architecture, n_latents=20)
    np.testing.assert_allclose(numbers["l0"], 2, rtol=0.15)
    assert (numbers["fvu"] < 0.25).all()
    assert (numbers["dead"] == 0).all()


def test_train__with_the_auxiliary_loss__has_fewer_dead_latents(tmp_path):
    with_aux = train_planted(tmp_path / "with", 200, n_latents=128)
    without = train_planted(tmp_path / "without", 200, n_latents=128, aux_coefficient=0.0)
    assert (without["dead"] > 0.1).all()
    assert (with_aux["dead"] < 0.5 * without["dead"]).all()
