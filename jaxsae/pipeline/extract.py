"""Phase 1: corpus text to the residual streams of all layers, in `activations/`."""

import dataclasses
import hashlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging

from jaxsae import activations, data, models
from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.config import CorpusConfig, ModelConfig, RunConfig
from jaxsae.data.tokens import find_bos_id
from jaxsae.pipeline.stages import Context
from jaxsae.progress import Progress, human_bytes


def run(config: RunConfig, context: Context) -> None:
    """Write the store; a shard that is already there is kept.

    Raises:
        InputError: model or corpus cannot be used, the store is of another run, or it does not fit the disk.
    """
    lm = load_model(config.model)
    contexts, bos_id = tokenise(config.corpus, lm)
    needed = activations.required_bytes(lm.n_layers, contexts.size, lm.d_model)
    logging.info(
        "%d contexts of %d tokens (%d tokens, each context starts with BOS %d); %d layers of width %d",
        *contexts.shape, contexts.size, bos_id, lm.n_layers, lm.d_model,
    )  # fmt: skip
    with (
        context.stop.polled() as should_stop,
        Progress("extract", 1, "shards", process_index=context.process_index) as bar,
    ):
        activations.extract(
            lm,
            contexts,
            context.workdir / "activations",
            bos_id=bos_id,
            corpus_fingerprint=hashlib.sha256(contexts.tobytes()).hexdigest(),
            batch=config.activations.batch,
            compression=config.activations.compression,
            process_index=context.process_index,
            process_count=context.process_count,
            progress=lambda done, total, seconds: bar.update(done, total=total),
            should_stop=should_stop,
        )
    context.details = f"{contexts.size:,} tokens of {lm.n_layers} layers, {human_bytes(needed)}"


def load_model(config: ModelConfig) -> models.LanguageModel:
    """Load the language model of the config, with its tokenizer.

    Raises:
        InputError: neither name nor path is set, the model cannot be read, it has no tokenizer, or it is to be split
            over the devices of several processes.
    """
    source = config.path or config.name
    if not source:
        raise InputError("model.path and model.name are both unset; give a folder or a Hugging Face name")
    mesh = None
    if config.sharding == "split":
        if jax.process_count() > 1:
            raise InputError(
                f"model.sharding=split works within one process, and this run has {jax.process_count()}; every process "
                "holds the model: leave it replicated, or start one process that sees all devices of a machine"
            )
        mesh = meshes.make_mesh(1, data=jax.device_count())
    lm = models.load(source, dtype=config.dtype, revision=config.revision, mesh=mesh, sharding=config.sharding)
    if lm.tokenizer is None:
        raise InputError(f"{source} has no tokenizer files; text cannot be read without tokenizer.json")
    return dataclasses.replace(lm, name=config.name or lm.name)


def tokenise(config: CorpusConfig, lm: models.LanguageModel) -> tuple[np.ndarray, int]:
    """Return (contexts [N T], the id of BOS).

    Raises:
        InputError: the context is longer than the model's, or the corpus cannot be used.
    """
    if config.context > lm.n_positions:
        raise InputError(f"corpus.context is {config.context}, but {lm.name} reads {lm.n_positions} tokens at most")
    bos_id = find_bos_id(lm.tokenizer)
    contexts = data.pack(
        _documents(config), lm.tokenizer, context=config.context, n_tokens=config.n_tokens, bos_id=bos_id
    )
    return contexts, bos_id


def _documents(config: CorpusConfig) -> Iterator[str]:
    if config.path is not None:
        return data.read_documents(config.path)
    if config.name is not None:
        return data.read_dataset(config.name)
    raise InputError("corpus.path and corpus.name are both unset; give a text file or a Hugging Face dataset")
