"""Measure a model's forward pass and generation against transformers: `launch/bench [DIR]`, or this file with DIR.

Two models with random weights, float32, of the shapes of SmolLM2-135M and GPT-2, on the same number of threads. The two
libraries take turns within one run, and a figure is the median of its turns. Nothing else should run meanwhile:
transformers' threads wait spinning and lose most by company. Prints one table and writes generate.json into DIR.

The limits are measured in the same run: of the forward pass the speed of a matrix product (1,024 x 1,536 x 1,536), of
generation the speed of summing an array of the parameters' size, which each token reads once.
"""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from turns import Seconds, take_turns

from jaxsae.models import decoder, families, generate

N_FORWARD = (8, 128)  # rows and tokens
N_PROMPT, N_NEW = 32, 32
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2"},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; speeds in tokens/s, `share` of the measured limit (0 to 1)."""

    model: str
    task: str
    jaxsae: float
    transformers: float
    share: float

    @property
    def ratio(self) -> float:
        return self.jaxsae / self.transformers


def bench(name: str) -> Iterator[Row]:
    fields = MODELS[name]
    reference = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**fields), dtype=torch.float32
    ).eval()
    reference.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    config = families.of(fields["model_type"]).read_config(fields)
    params = decoder.init(config, jax.random.key(0))
    yield bench_residuals(name, config, params, reference)
    yield bench_forward(name, config, params, reference)
    for n_rows in (1, 16):
        yield bench_generate(name, config, params, reference, n_rows)


def bench_residuals(name: str, config: Any, params: Any, reference: Any) -> Row:
    """Time the residual streams of all layers without the logits: what extraction does."""
    residuals = jax.jit(lambda params, token_ids: decoder.residuals(config, params, token_ids))
    return _bench_reading(name, "residuals", config, params, residuals, reference.base_model, has_head=False)


def bench_forward(name: str, config: Any, params: Any, reference: Any) -> Row:
    """Time the residual streams of all layers and the logits."""
    forward = jax.jit(lambda params, token_ids: decoder.forward(config, params, token_ids))
    return _bench_reading(name, "residuals and logits", config, params, forward, reference, has_head=True)


def _bench_reading(
    name: str, task: str, config: Any, params: Any, ours: Callable, theirs: Any, *, has_head: bool
) -> Row:
    token_ids = np.random.default_rng(0).integers(0, config.n_vocab, N_FORWARD)
    as_torch = torch.tensor(token_ids)
    matrix, square = jnp.ones((N_FORWARD[0] * N_FORWARD[1], 1536)), jnp.ones((1536, 1536))
    product = jax.jit(lambda left, right: jnp.matmul(left, right, precision="highest"))

    @torch.no_grad()
    def read():
        theirs(as_torch, output_hidden_states=True, use_cache=False)

    seconds = take_turns(
        ours=lambda: jax.block_until_ready(ours(params, token_ids)),
        theirs=read,
        limit=lambda: product(matrix, square).block_until_ready(),
    )
    n_products = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]))
    n_products += config.n_vocab * config.d_model if has_head else 0
    share = (n_products / square.size) * seconds["limit"].median / seconds["ours"].median
    return Row(name, task, *_speeds(token_ids.size, seconds), share)


def bench_generate(name: str, config: Any, params: Any, reference: Any, n_rows: int) -> Row:
    prompts = np.random.default_rng(1).integers(0, config.n_vocab, (n_rows, N_PROMPT))
    as_torch, how = torch.tensor(prompts), generate.GenerateConfig(N_NEW)
    flat = jnp.ones(sum(leaf.size for leaf in jax.tree.leaves(params)))
    total = jax.jit(jnp.sum)

    @torch.no_grad()
    def theirs():
        mask = torch.ones_like(as_torch)
        reference.generate(as_torch, attention_mask=mask, do_sample=False, max_new_tokens=N_NEW)

    seconds = take_turns(
        ours=lambda: generate.generate(config, params, list(prompts), how),
        theirs=theirs,
        limit=lambda: total(flat).block_until_ready(),
    )
    share = N_NEW * seconds["limit"].median / seconds["ours"].median
    return Row(name, f"generate, batch {n_rows}", *_speeds(n_rows * N_NEW, seconds), share)


def _speeds(n_tokens: int, seconds: dict[str, Seconds]) -> tuple[float, float]:
    return n_tokens / seconds["ours"].median, n_tokens / seconds["theirs"].median


def main(dir: Path, names: list[str]) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(
        f"tokens/s, float32, {jax.devices()[0].device_kind} against transformers on {torch.get_num_threads()} threads"
    )
    print(f"{'model':14}{'task':28}{'jaxsae':>10}{'transformers':>14}{'ratio':>8}{'of limit':>10}")
    rows = []
    for row in itertools.chain.from_iterable(map(bench, names)):
        speeds = f"{row.jaxsae:10.1f}{row.transformers:14.1f}{row.ratio:8.2f}{row.share:10.0%}"
        print(f"{row.model:14}{row.task:28}{speeds}", flush=True)
        rows.append(dataclasses.asdict(row) | {"ratio": row.ratio})
    dir.mkdir(parents=True, exist_ok=True)
    (dir / "generate.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(MODELS))
