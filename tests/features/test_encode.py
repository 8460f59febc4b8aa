"""Features of answers, compared with a plain loop: one answer, one layer, one position at a time, nothing padded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsae.artifacts import RESID_POSITIONS, Answer, InputError
from jaxsae.features import encode_answers, expand_positions
from jaxsae.models import LanguageModel, decoder, gpt2
from jaxsae.sae import SaeSuite

N_LAYERS, D_MODEL, N_LATENTS, K, VOCABULARY, CONTEXT = 3, 8, 13, 4, 37, 19
POSITIONS = ("last_prompt", "first_answer", "last_answer", "answer_max", "answer_mean", "answer_tokens")
ARCHITECTURES = ("topk", "batchtopk", "jumprelu_l1")


def make_lm(change=lambda params: params):
    config = gpt2.GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=2)
    leaves, tree = jax.tree.flatten(decoder.abstract_params(config))
    rng = np.random.default_rng(1)
    params = jax.tree.unflatten(tree, [jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32) for leaf in leaves])
    return LanguageModel("tiny", config, change(params), None, "float32", None, "fingerprint")


def make_suite(architecture, n_layers=N_LAYERS, d_model=D_MODEL):
    rng = np.random.default_rng(5)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(0, scale, shape), jnp.float32)

    decoder = normal(n_layers, N_LATENTS, d_model)
    return SaeSuite(
        W_enc=normal(n_layers, d_model, N_LATENTS),
        b_enc=normal(n_layers, N_LATENTS, scale=0.1),
        W_dec=decoder / jnp.linalg.norm(decoder, axis=-1, keepdims=True),
        b_dec=normal(n_layers, d_model, scale=0.3),
        threshold=jnp.abs(normal(n_layers, N_LATENTS)),
        architecture=architecture,
        k=K,
    )


def make_answers():
    """Texts of all lengths up to the model's context; q4 has an empty answer, q5 fills the context."""
    rng = np.random.default_rng(9)
    lengths = [(6, 2), (3, 5), (11, 1), (5, 3), (8, 0), (14, 5), (8, 4), (10, 2)]  # of 8, 12 or 19 tokens
    answers = []
    for number, (n_prompt, n_answer) in enumerate(lengths):
        ids = [int(token) for token in rng.integers(0, VOCABULARY - 1, n_prompt + n_answer)]
        answers.append(
            Answer(
                id=f"q{number}",
                question="?",
                answers=("x",),
                group=f"g{number}",
                category="",
                prompt="",
                prompt_ids=tuple(ids[:n_prompt]),
                answer="",
                answer_ids=tuple(ids[n_prompt:]),
                label=number % 2,
                logprobs=tuple(-float(number) - token / 8 for token in range(n_answer)),
                entropies=(1.0,) * n_answer,
            )
        )
    return answers


def encode(lm, suite, answers, *, keep=6, positions=POSITIONS, batch=3, **arguments):
    return encode_answers(lm, suite, answers, keep=keep, positions=positions, batch=batch, **arguments)


def plain_encode(sae, x):
    """Return the features of one residual vector, in float64."""
    W_enc, b_enc, b_dec = (np.asarray(array, np.float64) for array in (sae.W_enc, sae.b_enc, sae.b_dec))
    centre = 0 if sae.architecture == "jumprelu_l1" else b_dec
    pre = (x - centre) @ W_enc + b_enc
    if sae.architecture == "topk":
        threshold = max(np.sort(pre)[-K], 0)
        return np.where((pre >= threshold) & (pre > 0), pre, 0)
    return np.where(pre > np.asarray(sae.threshold, np.float64), np.maximum(pre, 0), 0)


def plain_loop(lm, suite, answer, n_answer_tokens):
    """Return {(layer, position): (features [F], error)} and {(layer, position): resid [D]} of one answer."""
    ids = np.array([answer.prompt_ids + answer.answer_ids])
    streams = np.asarray(lm.residuals(ids), np.float64)[:, 0]
    n_prompt = len(answer.prompt_ids)
    tokens = list(range(n_prompt, ids.shape[1])) or [n_prompt - 1]
    feats, resid = {}, {}
    for layer in range(N_LAYERS):
        sae, stream = suite.layer(layer), streams[layer]

        def at(token, sae=sae, stream=stream):
            x, b_dec = stream[token], np.asarray(sae.b_dec, np.float64)
            features = plain_encode(sae, x)
            reconstruction = features @ np.asarray(sae.W_dec, np.float64) + b_dec
            return features, ((x - reconstruction) ** 2).sum() / ((x - b_dec) ** 2).sum()

        each = [at(token) for token in tokens]
        error = np.mean([error for _, error in each])
        feats[layer, "last_prompt"] = at(n_prompt - 1)
        feats[layer, "first_answer"], feats[layer, "last_answer"] = each[0], each[-1]
        feats[layer, "answer_max"] = np.max([features for features, _ in each], axis=0), error
        feats[layer, "answer_mean"] = np.mean([features for features, _ in each], axis=0), error
        for token in range(n_answer_tokens):
            nothing = np.zeros(N_LATENTS), 0.0
            feats[layer, f"answer_{token:02d}"] = each[token] if token < len(each) else nothing
        resid[layer, "last_prompt"], resid[layer, "last_answer"] = stream[n_prompt - 1], stream[tokens[-1]]
        resid[layer, "answer_mean"] = stream[tokens].mean(axis=0)
    return feats, resid


@pytest.mark.parametrize(("architecture", "keep"), [*((name, 6) for name in ARCHITECTURES), ("topk", N_LATENTS + 4)])
def test_encode_answers__equals_a_plain_loop(architecture, keep):
    lm, suite, answers = make_lm(), make_suite(architecture), make_answers()
    features = encode(lm, suite, answers, keep=keep)
    assert features.ids == tuple(f"q{number}" for number in range(8))
    assert features.positions == (*POSITIONS[:-1], "answer_00", "answer_01", "answer_02", "answer_03", "answer_04")
    assert features.feature_ids.shape == (8, N_LAYERS, 10, keep)
    for n, answer in enumerate(answers):
        feats, resid = plain_loop(lm, suite, answer, 5)
        for layer in range(N_LAYERS):
            for p, position in enumerate(features.positions):
                expected, error = feats[layer, position]
                order = [int(latent) for latent in np.argsort(-expected, kind="stable") if expected[latent] > 0][:keep]
                n_empty = keep - len(order)
                where = f"{answer.id} layer {layer} {position}"
                assert features.feature_ids[n, layer, p].tolist() == order + [-1] * n_empty, where
                np.testing.assert_allclose(
                    features.activations[n, layer, p], [*expected[order], *[0.0] * n_empty], rtol=1e-5, atol=1e-5
                )
                np.testing.assert_allclose(features.recon_error[n, layer, p], error, rtol=1e-4, err_msg=where)
            for p, position in enumerate(RESID_POSITIONS):
                # float16 keeps 11 bits
                np.testing.assert_allclose(features.resid[n, layer, p], resid[layer, position], rtol=1e-3, atol=1e-4)


def test_encode_answers__keeps_the_types_of_the_format():
    features = encode(make_lm(), make_suite("topk"), make_answers())
    dtypes = {field.name: np.asarray(getattr(features, field.name)).dtype for field in dataclasses.fields(features)}
    assert dtypes["feature_ids"] == np.int32
    assert dtypes["activations"] == dtypes["recon_error"] == dtypes["logprobs"] == np.float32
    assert dtypes["resid"] == np.float16
    assert dtypes["offsets"] == np.int64


def test_encode_answers__lays_all_log_probabilities_in_one_row():
    answers = make_answers()
    features = encode(make_lm(), make_suite("topk"), answers)
    assert features.offsets.tolist() == [0, 2, 7, 8, 11, 11, 16, 20, 22]
    for n, answer in enumerate(answers):
        own = features.logprobs[features.offsets[n] : features.offsets[n + 1]]
        assert own.tolist() == list(answer.logprobs)  # eighths: exact in float32


@pytest.mark.parametrize("batch", [1, 50])
def test_encode_answers__does_not_depend_on_batch_and_order(batch):
    lm, suite, answers = make_lm(), make_suite("batchtopk"), make_answers()
    one = encode(lm, suite, answers, batch=3)
    shuffled = [answers[i] for i in np.random.default_rng(0).permutation(len(answers))]
    other = encode(lm, suite, shuffled, batch=batch)
    back = [other.ids.index(name) for name in one.ids]
    np.testing.assert_array_equal(other.feature_ids[back], one.feature_ids)
    for name in ("activations", "recon_error", "resid"):
        tolerance = 1e-3 if name == "resid" else 1e-5  # of float16, of float32
        left, right = getattr(other, name)[back], getattr(one, name)
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=1e-5, err_msg=name)


def test_encode_answers__of_an_empty_answer_is_the_last_prompt_token():
    features = encode(make_lm(), make_suite("topk"), make_answers())
    n, prompt = 4, features.positions.index("last_prompt")
    for p, position in enumerate(features.positions):
        is_beyond = position.removeprefix("answer_").isdigit() and position != "answer_00"
        expected = np.full_like(features.feature_ids[n, :, p], -1) if is_beyond else features.feature_ids[n, :, prompt]
        np.testing.assert_array_equal(features.feature_ids[n, :, p], expected, err_msg=position)
    np.testing.assert_array_equal(features.resid[n, :, 1], features.resid[n, :, 0])
    np.testing.assert_array_equal(features.resid[n, :, 2], features.resid[n, :, 0])


def test_encode_answers__says_how_far_it_is():
    done = []
    encode(make_lm(), make_suite("topk"), make_answers(), batch=3, on_batch=done.append)
    assert done == [3, 6, 8]


def test_encode_answers__refuses_a_text_beyond_the_context():
    answers = make_answers()
    answers[2] = dataclasses.replace(answers[2], prompt_ids=(1,) * CONTEXT)
    with pytest.raises(InputError, match=r"question q2: prompt and answer have 20 tokens, the model's context is 19"):
        encode(make_lm(), make_suite("topk"), answers)


@pytest.mark.parametrize(("n_layers", "d_model"), [(N_LAYERS + 1, D_MODEL), (N_LAYERS, D_MODEL + 2)])
def test_encode_answers__refuses_a_suite_of_another_model(n_layers, d_model):
    words = rf"the SAEs are of {n_layers} layers of width {d_model}, tiny has 3 of width 8; train SAEs of this model"
    with pytest.raises(InputError, match=words):
        encode(make_lm(), make_suite("topk", n_layers, d_model), make_answers())


def with_token(value):
    """Return a change of weights that gives the last token of the vocabulary an embedding of `value`."""

    def change(params):
        table = params["wte"]["weight"].at[VOCABULARY - 1].set(value)
        return params | {"wte": params["wte"] | {"weight": table}}

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_encode_answers__names_the_question_whose_residuals_are_not_finite(value):
    answers = make_answers()
    answers[3] = dataclasses.replace(answers[3], answer_ids=(*answers[3].answer_ids[:-1], VOCABULARY - 1))
    with pytest.raises(InputError, match=r"question q3: the residual stream of layer 0 is not finite in float16"):
        encode(make_lm(with_token(value)), make_suite("topk"), answers)


def test_encode_answers__names_the_layer_whose_residuals_overflow():
    def change(params):
        biases = params["blocks"]["mlp"]["c_proj"]["bias"].at[1].set(1e5)
        params["blocks"]["mlp"]["c_proj"]["bias"] = biases
        return params

    with pytest.raises(InputError, match=r"layer 1 is not finite in float16 \(limit 65504\)"):
        encode(make_lm(change), make_suite("topk"), make_answers())


def test_expand_positions__spells_out_the_answers_tokens_once():
    expected = ("answer_max", "answer_00", "answer_01", "answer_02", "last_prompt")
    assert expand_positions(("answer_max", "answer_tokens", "last_prompt", "answer_max"), 3) == expected


@pytest.mark.parametrize(
    ("names", "words"), [(("last_prompt", "middle"), r"holds \['middle'\]"), ((), "holds nothing")]
)
def test_expand_positions__refuses_unknown_names(names, words):
    with pytest.raises(InputError, match=rf"features\.positions {words}, expected names among last_prompt, "):
        expand_positions(names, 3)


def test_encode_answers__directs_each_answer_at_its_first_token_and_the_best_other_one():
    lm, answers = make_lm(), make_answers()
    found = encode(lm, make_suite("topk"), answers).token_directions
    assert found.shape == (8, 2, D_MODEL)
    for directions, answer in zip(found, answers, strict=True):
        if not answer.answer_ids:
            assert not directions.any()
            continue
        prompt, emitted = np.array([answer.prompt_ids]), answer.answer_ids[0]
        end = lm.residuals(prompt)[-1, :, -1]
        ranked = np.argsort(-np.asarray(lm.logits(prompt)[0, -1]))
        other = int(ranked[0] if ranked[0] != emitted else ranked[1])
        for direction, token in zip(directions, (emitted, other), strict=True):
            expected = lm.logit_directions(end, np.array([token]))[0]
            np.testing.assert_allclose(direction, expected, rtol=1e-4, atol=1e-5)
