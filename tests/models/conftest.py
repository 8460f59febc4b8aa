"""Tiny language models with every weight random, of ours and of transformers, made without a network."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers

from jaxsae import models
from jaxsae.models import decoder, families, gpt2, weights

TINY = {"vocab_size": 37, "n_positions": 19, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40}
_TINY_LLAMA = {
    "vocab_size": 37,
    "max_position_embeddings": 19,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
# One small model of every model_type, as config.json has it; each with a peculiarity of its kind switched on.
_TINY_FIELDS = {
    "gpt2": TINY,
    "phi": {**_TINY_LLAMA, "hidden_size": 32, "num_key_value_heads": 4},
    "llama": _TINY_LLAMA,
    "mistral": {**_TINY_LLAMA, "sliding_window": 3},
    "qwen2": {**_TINY_LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {**_TINY_LLAMA, "head_dim": 10},
}


@pytest.fixture(scope="session")
def tiny_configs():
    """Return one small config of every model_type, by its name."""
    return {
        name: families.of(name).read_config({**fields, "model_type": name}) for name, fields in _TINY_FIELDS.items()
    }


@pytest.fixture(scope="session")
def make_params():
    """Return a function of a config: weights none of which is 0 or 1, large enough for blocks to matter."""

    def make(config, seed=0):
        leaves, tree = jax.tree_util.tree_flatten_with_path(decoder.abstract_params(config))
        rng = np.random.default_rng(seed)
        values = []
        for path, leaf in leaves:
            is_scale = path[-1].key == "weight" and any(part in path[-2].key for part in ("ln_", "norm"))
            values.append(jnp.asarray(is_scale + rng.normal(0, 0.2, leaf.shape), jnp.float32))
        return jax.tree.unflatten(tree, values)

    return make


@pytest.fixture
def write_model(tmp_path, make_params):
    """Return a function of config fields that writes a random GPT-2 and returns its folder and config."""

    def write(name="model", *, seed=0, **fields):
        config = gpt2.GPT2Config(**{**TINY, **fields})
        weights.save(tmp_path / name, config, make_params(config, seed))
        return tmp_path / name, config

    return write


@pytest.fixture(scope="session")
def make_reference():
    """Return a function of model_type and config fields: transformers' model, small, no weight 0 or 1.

    Its attention is the eager one, which has GPT-2's upcast path and sliding windows. It generates to the very end.
    """
    import torch
    import transformers

    def make(model_type, **fields):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **{**_TINY_FIELDS[model_type], **fields})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
        return model

    return make


@pytest.fixture(scope="session")
def reference_outputs():
    """Return a function of a model of transformers and token ids: the output of every block, and the logits."""
    import torch

    def run(model, token_ids):
        outputs = []

        def keep(module, inputs, output):
            outputs.append((output[0] if isinstance(output, tuple) else output).numpy())

        blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
        hooks = [block.register_forward_hook(keep) for block in blocks]
        with torch.no_grad():
            logits = model(torch.tensor(token_ids)).logits.numpy()
        for hook in hooks:
            hook.remove()
        return np.stack(outputs), logits

    return run


@pytest.fixture(scope="session")
def assert_close_per_token():
    """Return a check that |found - expected| <= 2e-5 * max(1, max|expected|) for each token: the project's promise."""

    def check(found, expected):
        bound = 2e-5 * np.maximum(1.0, np.abs(expected).max(-1))
        assert (np.abs(np.asarray(found) - expected).max(-1) <= bound).all()

    return check


@pytest.fixture
def assert_equal_to_reference(tmp_path, reference_outputs, assert_close_per_token):
    """Return a check that a model of transformers, saved and loaded here, has its residual streams and logits.

    It returns the loaded model. `edit`, a function of config.json's fields, rewrites them in between.
    """

    def check(reference, *, n_tokens=17, edit=None):
        reference.save_pretrained(tmp_path)
        if edit is not None:
            path = tmp_path / "config.json"
            path.write_text(json.dumps(edit(json.loads(path.read_text()))))
        lm = models.load(tmp_path)
        token_ids = np.random.default_rng(0).integers(0, lm.n_vocab, (2, n_tokens))
        resid, logits = lm.residuals_and_logits(token_ids)
        expected_resid, expected_logits = reference_outputs(reference, token_ids)
        assert resid.shape == (lm.n_layers, 2, n_tokens, lm.d_model)
        assert_close_per_token(resid, expected_resid)
        assert_close_per_token(logits, expected_logits)
        return lm

    return check


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


@pytest.fixture
def measure_peak():
    """Return a function of a source and a sharding: what peak_memory.py, beside this file, measures of it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads anonymous memory from Linux's /proc")

    def measure(source, sharding):
        command = [sys.executable, str(Path(__file__).with_name("peak_memory.py")), str(source), sharding]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return json.loads(shown.stdout)

    return measure


@pytest.fixture(scope="session")
def texts():
    """Return texts that tokenizers stumble over: spaces, digits, accents, scripts, emoji, code and markup."""
    return [
        "The capital of France is Paris.", "", " ", "   ", "a", " a", "  a", "a  b", "a\nb", "a \n b", "\n\n", "\t x\t",
        "it's we'll I'M THEY'RE", "1", "12", "123456", "3.14159", "a1b22c333", "x  12 345", "in 1999, 2,000.50$",
        "Déjà vu", "De\u0301ja\u0300", "naïve façade", "Straße", "Ελλάδα", "Москва", "東京都 に", "한국어", "مرحبا",
        "🙂🙃 👩‍👩‍👧",
        "def f(x):\n    return x ** 2  # square\n", "<p class='x'>&amp;</p>", "{\"a\": [1, 2]}", "http://a.b/c?d=e&f=1",
        "...!!!???", "--- *** ___", "½ ² Ⅻ ٣", "\u00a0nbsp\u3000wide", "<|im_start|>user\nhi<|im_end|>", "ab<s>cd",
    ]  # fmt: skip
