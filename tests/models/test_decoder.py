"""What every family owes its users: a forward pass that is causal, differentiable, exact in steps, written and read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxsae import models
from jaxsae.artifacts import InputError
from jaxsae.models import decoder, families, weights

MODEL_TYPES = ["gpt2", "phi", "llama", "mistral", "qwen2", "qwen3"]
N_TOKENS = 11
each_model_type = pytest.mark.parametrize("model_type", MODEL_TYPES)
each_family = pytest.mark.parametrize("model_type", ["gpt2", "phi", "qwen2"])
forward = jax.jit(decoder.forward, static_argnames=("config", "dtype"))


def token_rows(n_rows, n_tokens, seed=0):
    return np.random.default_rng(seed).integers(0, 37, (n_rows, n_tokens))


@pytest.fixture(scope="module", params=MODEL_TYPES)
def tiny(request, tiny_configs, make_params):
    """Return config and weights of a model of each model_type; those of Mistral and Qwen2 have sliding windows."""
    return tiny_configs[request.param], make_params(tiny_configs[request.param])


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_forward__right_padding_changes_no_earlier_position(tiny, n_tokens):
    token_ids = token_rows(2, N_TOKENS)
    padded = np.where(np.arange(N_TOKENS) < n_tokens, token_ids, 0)
    resid, logits = forward(*tiny, token_ids)
    padded_resid, padded_logits = forward(*tiny, padded)
    np.testing.assert_array_equal(resid[:, :, :n_tokens], padded_resid[:, :, :n_tokens])
    np.testing.assert_array_equal(logits[:, :n_tokens], padded_logits[:, :n_tokens])
    assert np.abs(logits[:, n_tokens:] - padded_logits[:, n_tokens:]).max() > 0.1


def test_forward__under_jit_equals_eager(tiny_configs, make_params):
    config = tiny_configs["qwen2"]
    params, token_ids = make_params(config), token_rows(2, N_TOKENS)
    eager = decoder.forward(config, params, token_ids)
    for one, other in zip(eager, forward(config, params, token_ids), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("gpt2", "float32"), ("gpt2", "bfloat16"), ("phi", "float32"), ("qwen2", "float32")],
)
def test_forward__has_every_gradient_of_transformers(make_reference, tmp_path, model_type, dtype):
    reference = make_reference(model_type)
    reference.save_pretrained(tmp_path)
    lm = models.load(tmp_path)
    token_ids = token_rows(2, N_TOKENS)
    reference(torch.tensor(token_ids), labels=torch.tensor(token_ids)).loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}

    def loss(params):
        logprobs = jax.nn.log_softmax(decoder.logits(lm.config, params, token_ids, dtype=dtype)[:, :-1])
        return -jnp.take_along_axis(logprobs, jnp.asarray(token_ids)[:, 1:, None], axis=-1).mean()

    tolerance = 1e-5 if dtype == "float32" else 5e-2  # of a tensor's largest entry, at least 1e-3
    family, seen = families.of(model_type), []
    for path, gradient in jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(loss))(lm.params))[0]:
        name = family.tensor_name(tuple(entry.key for entry in path))
        name = name if name.startswith("lm_head") else family.BASE_PREFIX + name
        is_turned = path[-2].key in family.IN_OUT_MODULES
        for layer, row in enumerate(gradient if "{layer}" in name else [gradient]):
            seen.append(name.format(layer=layer))
            row = row.T if is_turned else row
            bound = tolerance * max(np.abs(expected[seen[-1]]).max(), 1e-3)
            np.testing.assert_allclose(row, expected[seen[-1]], rtol=0, atol=bound, err_msg=seen[-1])
    assert sorted(seen) == sorted(expected)


@each_family
def test_forward__in_bfloat16_stays_near_float32_and_keeps_a_float32_stream(tiny_configs, make_params, model_type):
    config = tiny_configs[model_type]
    params, token_ids = make_params(config), token_rows(2, N_TOKENS)
    exact, exact_logits = forward(config, params, token_ids)
    rounded, logits = forward(config, params, token_ids, dtype="bfloat16")
    assert rounded.dtype == logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: an operand is off by at most 2^-9 of itself, and a few roundings add up per block. The
    # worst entry depends on how the sums are ordered, the root mean square hardly.
    assert 1e-5 < relative_error(rounded, exact) < 2e-2
    assert 1e-5 < relative_error(logits, exact_logits) < 2e-2


def relative_error(found, expected):
    """Return the root mean square of the difference, as a share of that of what is expected."""
    return np.sqrt(np.mean(np.square(found - expected)) / np.mean(np.square(expected)))


def test_logits_from__the_own_residual_gives_the_own_logits_for_every_layer(tiny):
    config, params = tiny
    resid, logits = forward(*tiny, token_rows(2, N_TOKENS))
    run = jax.jit(jax.vmap(lambda params, layer, x: decoder.logits_from(config, params, layer, x), (None, 0, 0)))
    np.testing.assert_allclose(run(params, jnp.arange(3), resid), np.stack([logits] * 3), atol=2e-5, rtol=2e-5)
    others = run(params, jnp.asarray([0, 2, 1]), jnp.stack([resid[1], resid[1], resid[0]]))
    assert (np.abs(others - logits).max((1, 2, 3)) > 0.1).all()


def test_logits_from__in_bfloat16_gives_the_logits_of_bfloat16(tiny_configs, make_params):
    config = tiny_configs["gpt2"]
    params = make_params(config)
    resid, logits = forward(config, params, token_rows(2, N_TOKENS), dtype="bfloat16")
    run = jax.jit(lambda layer, x: decoder.logits_from(config, params, layer, x, dtype="bfloat16"))
    for layer in range(3):
        np.testing.assert_allclose(run(layer, resid[layer]), logits, atol=2e-5, rtol=2e-5)


def test_step__token_by_token_equals_forward_on_the_whole_text(tiny, assert_close_per_token):
    """Rows of 3 and 5 tokens go on to 9 and 11, well beyond the windows of 3 (Mistral) and 4 (Qwen2)."""
    config, params = tiny
    token_ids, lengths = token_rows(2, N_TOKENS), np.array([3, 5])
    expected_resid, expected = forward(*tiny, token_ids)
    prompts = np.where(np.arange(5) < lengths[:, None], token_ids[:, :5], 36)
    prefill = jax.jit(functools.partial(decoder.prefill, config, n_slots=N_TOKENS))
    step = jax.jit(functools.partial(decoder.step, config))
    rows = np.arange(2)
    logits, sight = prefill(params, prompts, lengths)
    assert_close_per_token(logits, np.asarray(expected)[rows, lengths - 1])
    for n_done in range(6):
        at = lengths + n_done
        logits, resid, sight = step(params, jnp.asarray(token_ids[rows, at]), sight)
        assert_close_per_token(logits, np.asarray(expected)[rows, at])
        assert_close_per_token(resid, np.asarray(expected_resid)[:, rows, at])


@each_model_type
def test_generate__continues_20_prompts_as_transformers_does(make_reference, tmp_path, model_type):
    reference = make_reference(model_type)
    reference.save_pretrained(tmp_path)
    prompts = [token_rows(1, 3 + seed % 5, seed)[0] for seed in range(20)]
    answers = models.load(tmp_path).generate(prompts, max_new_tokens=10)
    for n_tokens in range(3, 8):  # transformers takes prompts of one length without padding
        of_length = [index for index, prompt in enumerate(prompts) if len(prompt) == n_tokens]
        batch = torch.tensor(np.stack([prompts[index] for index in of_length]))
        whole = reference.generate(batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=10)
        for index, row in zip(of_length, whole[:, n_tokens:].tolist(), strict=True):
            assert list(answers[index].answer_ids) == row


def test_save__transformers_loads_it_to_equal_logits(tiny, tmp_path, reference_outputs, assert_close_per_token):
    weights.save(tmp_path, *tiny)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    token_ids = token_rows(2, N_TOKENS)
    for found, expected in zip(reference_outputs(reference, token_ids), forward(*tiny, token_ids), strict=True):
        assert_close_per_token(found, np.asarray(expected))


def test_write_config__read_config_gives_it_back(tiny):
    config, _ = tiny
    family = families.of(config.model_type)
    assert family.read_config(family.write_config(config)) == config


def test_forward__refuses_a_text_beyond_the_context_and_an_unknown_dtype(tiny):
    with pytest.raises(InputError, match=r"20 tokens is longer than the model's context, 19"):
        decoder.forward(*tiny, token_rows(1, 20))
    with pytest.raises(InputError, match="dtype is 'float16'"):
        decoder.forward(*tiny, token_rows(1, 4), dtype="float16")


def test_logit_directions__are_the_slope_of_the_token_s_logit_over_the_mean_logit(tiny):
    config, params = tiny
    rng = np.random.default_rng(0)
    resid = rng.normal(0, 2, (3, config.d_model)).astype(np.float32)
    ids = np.array([5, 0, 31])
    directions = np.asarray(decoder.logit_directions(config, params, resid, ids), np.float64)

    def gain(x):
        logits = np.asarray(decoder.logits_from(config, params, config.n_layers - 1, x[:, None]), np.float64)[:, 0]
        return logits[np.arange(3), ids] - logits.mean(axis=-1)

    step = 1e-2 * rng.normal(size=resid.shape).astype(np.float32)
    slope = gain(resid + step) - gain(resid - step)
    np.testing.assert_allclose(2 * np.sum(directions * step, axis=1), slope, rtol=2e-2, atol=1e-4)
    # The final norm takes the length of the stream out, so a move along it changes next to nothing.
    lengths = np.linalg.norm(directions, axis=1) * np.linalg.norm(resid, axis=1)
    assert (np.abs(np.sum(directions * resid, axis=1)) < 1e-4 * lengths).all()
