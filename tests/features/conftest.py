"""A tiny language model, its SAEs and one answer, for the tests that look at one answer closely."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxsae.artifacts import Answer
from jaxsae.models import LanguageModel, decoder, gpt2
from jaxsae.sae import SaeSuite

N_LAYERS, D_MODEL, N_LATENTS = 3, 8, 13
POSITIONS = ("last_prompt", "first_answer", "last_answer", "answer_max", "answer_mean", "answer_00", "answer_01")


class Letters:
    """A tokenizer of the alphabet."""

    def decode(self, ids, **how):
        return "".join(chr(97 + token) for token in ids)


@dataclasses.dataclass(frozen=True)
class Close:
    """What `read_prefixes` and `read_ablated` take."""

    lm: LanguageModel
    suite: SaeSuite
    answer: Answer
    how: dict

    def of_length(self, n_tokens):
        """Return the answer's first tokens alone."""
        return dataclasses.replace(self.answer, answer_ids=self.answer.answer_ids[:n_tokens])


@pytest.fixture(scope="session")
def close():
    config = gpt2.GPT2Config(vocab_size=26, n_positions=40, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=2)
    keys = iter(jax.random.split(jax.random.key(3), 100))
    params = jax.tree.map(lambda x: 0.5 * jax.random.normal(next(keys), x.shape), decoder.abstract_params(config))
    W_dec = jax.random.normal(next(keys), (N_LAYERS, N_LATENTS, D_MODEL))
    suite = SaeSuite(
        W_enc=jax.random.normal(next(keys), (N_LAYERS, D_MODEL, N_LATENTS)),
        b_enc=jnp.zeros((N_LAYERS, N_LATENTS)),
        W_dec=W_dec / jnp.linalg.norm(W_dec, axis=-1, keepdims=True),
        b_dec=0.3 * jax.random.normal(next(keys), (N_LAYERS, D_MODEL)),
        threshold=jnp.zeros((N_LAYERS, N_LATENTS)),
        architecture="topk",
        k=4,
    )
    answer = Answer(
        id="one",
        question="?",
        answers=(),
        group="g",
        category="",
        prompt="",
        prompt_ids=(0, 5, 17, 3, 9),
        answer="given",
        answer_ids=(11, 2, 8, 8, 25, 1),
        label=-1,
        logprobs=(),
        entropies=(),
    )
    lm = LanguageModel("tiny", config, params, Letters(), "float32", None, "fingerprint")
    return Close(lm, suite, answer, {"keep": 6, "names": POSITIONS})
