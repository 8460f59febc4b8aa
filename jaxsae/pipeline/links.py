"""The link graph of a run's SAEs (`links.npz`): made once for a suite, by the stage that tracks."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from absl import logging

from jaxsae import artifacts, features, models, sae, tracking
from jaxsae.activations.source import dropped_rows
from jaxsae.artifacts import InputError
from jaxsae.config import RunConfig, TrackingConfig
from jaxsae.pipeline import stages
from jaxsae.pipeline.extract import load_model, tokenise
from jaxsae.pipeline.stages import STAGES, Context
from jaxsae.progress import Progress

_SEED = 0  # of the nulls: the same in every run, so that thresholds mean the same


class Machinery:
    """The run's language model and SAEs, loaded when one is first asked for."""

    def __init__(self, config: RunConfig, workdir: Path) -> None:
        """Note where they are."""
        self._config, self._dir = config, workdir / "saes"

    @functools.cached_property
    def lm(self) -> models.LanguageModel:
        """The model that the SAEs were trained on.

        Raises:
            InputError: the config's model is another one.
        """
        lm = load_model(self._config.model)
        about = artifacts.read_json(self._dir / "suite.json", rebuild="run jaxsae train")
        if about["model_fingerprint"] != lm.fingerprint:
            raise InputError(
                f"saes/ are of {about['model']} (fingerprint {about['model_fingerprint'][:12]}), the config's model is "
                f"{lm.name} ({lm.fingerprint[:12]}); use the model and model.dtype they were trained on"
            )
        return lm

    @functools.cached_property
    def suite(self) -> sae.SaeSuite:
        """Its SAEs, as jax arrays."""
        return sae.load(self._dir, arrays="jax")


def keep_links(config: RunConfig, context: Context, machinery: Machinery) -> tracking.LinkGraph | None:
    """Return the graph, from the file if it is still that of these SAEs and settings; None if none is to be made.

    Raises:
        InputError: a checkpoint file is damaged, or model or corpus cannot be used.
    """
    path, identity_path = context.workdir / "links.npz", context.workdir / "manifests" / "links.json"
    if config.tracking.links == "none":
        path.unlink(missing_ok=True)  # no file of an earlier setting stands beside tracks that were made without it
        return None
    identity = _identity(config, context.workdir)
    if identity_path.exists() and path.exists():
        have = artifacts.read_json(identity_path, rebuild="delete it and run jaxsae track")
        if have["identity"] == identity and have["sha256"] == artifacts.sha256_file(path):
            logging.info("links.npz is up to date")
            return read_links(context.workdir)
    graph = _make(config, context, machinery)
    artifacts.write_npz(path, graph.arrays())
    artifacts.write_json(identity_path, {"identity": identity, "sha256": artifacts.sha256_file(path)})
    return graph


def read_links(workdir: Path) -> tracking.LinkGraph:
    """Read `links.npz`.

    Raises:
        InputError: it is missing or damaged.
    """
    return tracking.LinkGraph.from_arrays(artifacts.read_npz(workdir / "links.npz", rebuild="run jaxsae track --redo"))


def needs_links(config: TrackingConfig) -> bool:
    """Say whether tracks of these settings are looked up in the graph."""
    return config.association == "links" or config.null != "none"


def _make(config: RunConfig, context: Context, machinery: Machinery) -> tracking.LinkGraph:
    decoders, settings = sae.Decoders(context.workdir / "saes"), config.tracking
    how: dict[str, Any] = {"spans": settings.max_missed_layers + 1, "seed": _SEED}
    if settings.links == "weights":
        with Progress("links", len(decoders) - 1, "pairs of layers") as bar:
            return tracking.link_by_weights(decoders, settings.links_per_latent, on_layer=bar.update, **how)
    corpus = _read_corpus(config, machinery)
    with Progress("links", len(decoders) - 1, "pairs of layers") as bar:
        return tracking.link_by_coactivation(decoders, settings.links_per_latent, corpus, on_layer=bar.update, **how)


def _read_corpus(config: RunConfig, machinery: Machinery) -> tracking.CorpusLatents:
    """Return what fires on the corpus's first tokens, those dropped that training drops."""
    lm, suite = machinery.lm, machinery.suite
    n_tokens = max(config.tracking.links_tokens, config.corpus.context)
    if config.corpus.n_tokens is not None:
        n_tokens = min(n_tokens, config.corpus.n_tokens)
    contexts, bos_id = tokenise(dataclasses.replace(config.corpus, n_tokens=n_tokens), lm)
    drop = dropped_rows(contexts.reshape(-1), contexts.shape[1], bos_id=bos_id).reshape(contexts.shape)
    with Progress("corpus latents", len(contexts), "contexts") as bar:
        ids, activations = features.keep_corpus(
            lm,
            suite,
            contexts,
            drop,
            keep=config.features.keep,
            batch=config.activations.batch,
            on_batch=bar.update,
        )
    return tracking.CorpusLatents(ids, activations, suite.n_latents)


def _identity(config: RunConfig, workdir: Path) -> dict[str, Any]:
    """Return what the graph depends on; without a corpus, nothing but the SAEs and three settings."""
    names = ["tracking.links", "tracking.links_per_latent", "tracking.max_missed_layers"]
    sources: dict[str, str] = {}
    if config.tracking.links == "coactivation":
        names += ["tracking.links_tokens", "features.keep", "activations.batch", "model", "corpus"]
        reads = dataclasses.replace(STAGES["track"], sources=("model", "corpus"))
        sources = stages.source_digests(reads, config)
    return {
        "settings": config.select(*names),
        "sources": sources,
        "inputs": {"saes/evaluation.json": artifacts.sha256_file(workdir / "saes" / "evaluation.json")},
    }
