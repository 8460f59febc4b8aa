"""Tiny language models with every weight random, written as Hugging Face folders without a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers

from jaxsae.models import gpt2, weights

TINY = {"vocab_size": 37, "n_positions": 19, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40}


@pytest.fixture(scope="session")
def make_params():
    """Return a function of a config: weights none of which is 0 or 1, large enough for blocks to matter."""

    def make(config, seed=0):
        leaves, tree = jax.tree.flatten(gpt2.abstract_params(config))
        rng = np.random.default_rng(seed)
        values = [jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32) for leaf in leaves]
        params = jax.tree.unflatten(tree, values)
        for norm in (params["ln_f"], params["blocks"]["ln_1"], params["blocks"]["ln_2"]):
            norm["weight"] += 1.0
        return params

    return make


@pytest.fixture
def write_model(tmp_path, make_params):
    """Return a function of config fields that writes a random model and returns its folder and config."""

    def write(name="model", *, seed=0, **fields):
        config = gpt2.GPT2Config(**{**TINY, **fields})
        weights.save(tmp_path / name, config, make_params(config, seed))
        return tmp_path / name, config

    return write


@pytest.fixture
def train_tokenizer():
    """Return a function that writes a byte-level BPE tokenizer.json of `n_vocab` ids (at least 257) into a folder."""

    def train(folder, n_vocab=270, special=("<|endoftext|>",)):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=n_vocab, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
        )
        tokenizer.train_from_iterator(["Hello world. The cat sat.\nA dog ran."] * 9, trainer)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        return tokenizer

    return train
