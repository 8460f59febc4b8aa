"""Weights in parts over devices: the same numbers, and only activations travel between devices."""

import math
import re

import jax
import numpy as np
import pytest

from jaxsae import mesh as meshes
from jaxsae import models
from jaxsae.artifacts import InputError
from jaxsae.models import decoder, gpt2, llama, phi, weights

# 9 heads and 3 groups make no even parts over 8 devices; 1601 is odd, so that GPT-2's table is split along D.
CONFIGS = {
    "gpt2": gpt2.GPT2Config(vocab_size=1601, n_positions=40, n_embd=96, n_layer=3, n_head=4),
    "llama": llama.LlamaConfig(
        vocab_size=1600, hidden_size=96, intermediate_size=320, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "qwen3": llama.LlamaConfig(
        model_type="qwen3", vocab_size=1600, hidden_size=144, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=9, num_key_value_heads=3, head_dim=16,
    ),
    "phi": phi.PhiConfig(
        vocab_size=1600, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=8
    ),
}  # fmt: skip
TOKEN_IDS = np.random.default_rng(0).integers(0, 1600, (3, 13))


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a random model of a family, weights large enough for blocks to matter."""

    def write_model(case):
        config, rng = CONFIGS[case], np.random.default_rng(0)
        shapes = decoder.abstract_params(config)
        params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
        weights.save(tmp_path / case, config, params)
        return tmp_path / case

    return write_model


@pytest.mark.parametrize(
    ("case", "layer", "data"), [*((case, 4, 2) for case in CONFIGS), ("qwen3", 1, 3), ("phi", 2, 1)]
)
def test_load__split_over_devices_computes_the_same(write, case, layer, data):
    folder = write(case)
    whole = models.load(folder)
    split = models.load(folder, mesh=meshes.make_mesh(3, layer=layer, data=data), sharding="split")
    for found, expected in zip(
        split.residuals_and_logits(TOKEN_IDS), whole.residuals_and_logits(TOKEN_IDS), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * abs(expected).max())
    resid = whole.residuals(TOKEN_IDS)[1]
    np.testing.assert_allclose(
        split.logits_from(1, np.asarray(resid)), whole.logits_from(1, resid), rtol=2e-5, atol=1e-4
    )


def test_generate__with_split_weights_gives_the_same_tokens(write):
    folder, prompts = write("llama"), [TOKEN_IDS[0, :5], TOKEN_IDS[1, :9]]
    split = models.load(folder, mesh=meshes.make_mesh(2), sharding="split")
    found, expected = (lm.generate(prompts, max_new_tokens=4) for lm in (split, models.load(folder)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.answer_ids, other.answer_ids)


@pytest.mark.parametrize("case", CONFIGS)
def test_load__split_leaves_each_device_its_share(write, case):
    mesh = meshes.make_mesh(4, layer=4, data=2)
    params = models.load(write(case), mesh=mesh, sharding="split").params
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    held = [0] * 8
    for leaf in jax.tree.leaves(params):
        for part in leaf.addressable_shards:
            held[part.device.id] += part.data.nbytes
    assert max(held) < 1.2 * whole / 8


@pytest.mark.parametrize("case", CONFIGS)
def test_forward__of_split_weights_moves_activations_only(write, case):
    mesh = meshes.make_mesh(4, layer=4, data=2)
    lm = models.load(write(case), mesh=mesh, sharding="split")
    program = jax.jit(lambda params, ids: decoder.forward(lm.config, params, ids)).lower(lm.params, TOKEN_IDS[:1, :5])
    text = program.compile().as_text()
    moved = re.findall(r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text)
    shapes = [shape for line in moved for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
    sizes = [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
    smallest_matrix = min(leaf[0].size for leaf in jax.tree.leaves(lm.params["blocks"]) if leaf.ndim == 3)
    assert 5 * lm.d_model in sizes
    assert max(sizes) < smallest_matrix


def test_load__split_needs_a_mesh_and_a_known_name(write):
    folder = write("llama")
    with pytest.raises(InputError, match="sharding is 'split', which needs a mesh of devices"):
        models.load(folder, sharding="split")
    with pytest.raises(InputError, match="sharding is 'rows'; use one of replicated, split"):
        models.load(folder, mesh=meshes.make_mesh(2), sharding="rows")
