"""Phase 2: residual streams to one sparse autoencoder per layer, in `saes/`, measured on held-out tokens."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from jaxsae import activations, artifacts, models, sae
from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.config import RunConfig
from jaxsae.pipeline.extract import load_model, tokenise
from jaxsae.pipeline.stages import Context
from jaxsae.progress import MetricsLog, Progress, human_bytes
from jaxsae.sae import evaluate

PCA_ROWS = 16_384  # training rows that the PCA beside each SAE is fitted on


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows come from that a run trains on.

    Attributes:
        lm: the language model, where it is in memory already.
        settings: names of the settings that make the rows what they are, beside those of training.
    """

    source: activations.StoreSource | activations.StreamSource
    n_layers: int
    d_model: int
    model: str
    model_fingerprint: str
    corpus_fingerprint: str
    context: int
    bos_id: int | None
    lm: models.LanguageModel | None = None
    settings: tuple[str, ...] = ()


def run(config: RunConfig, context: Context) -> None:
    """Train to the end of the budget, resuming from the newest checkpoint; then measure the best SAE of each layer.

    Raises:
        InputError: store or checkpoints are damaged or of another run, or the loss is not finite.
    """
    if config.train.batch % config.mesh.data:
        raise InputError(f"train.batch {config.train.batch} does not divide by mesh.data {config.mesh.data}")
    rows, mesh = (_store if config.activations.source == "store" else _stream)(config, context)
    recipe = sae.make_recipe(
        config.sae,
        config.train,
        n_layers=rows.n_layers,
        d_model=rows.d_model,
        batches_per_epoch=rows.source.batches_per_epoch,
    )
    folder = context.workdir / "saes"
    if context.is_main:
        _write_about(folder, config, rows, recipe)
    checkpoints = sae.Checkpoints(folder)
    trainer = sae.Trainer(rows.source, recipe, checkpoints, mesh=mesh, seed=config.seed)
    _log_start(trainer, recipe, mesh)
    _train(trainer, recipe, context)
    _measure(trainer, rows, config, context)
    checkpoints.close()


def _make_mesh(n_layers: int, config: RunConfig) -> Mesh:
    return meshes.make_mesh(n_layers, layer=config.mesh.layer, data=config.mesh.data, latent=config.mesh.latent)


def _store(config: RunConfig, context: Context) -> tuple[Rows, Mesh]:
    """Open the store that `extract` wrote."""
    store = activations.open(context.workdir / "activations")
    meta = store.meta
    mesh = _make_mesh(meta.n_layers, config)
    source = activations.StoreSource(
        store,
        batch=config.train.batch,
        seed=config.seed,
        held_out=config.train.held_out,
        buffer_tokens=config.train.buffer_tokens,
        layers=meshes.local_layers(meta.n_layers, mesh),
    )
    names = ("n_layers", "d_model", "model", "model_fingerprint", "corpus_fingerprint", "context", "bos_id")
    return Rows(source, **{name: getattr(meta, name) for name in names}), mesh


def _stream(config: RunConfig, context: Context) -> tuple[Rows, Mesh]:
    """Load the language model and the corpus; activations are computed while training."""
    lm = load_model(config.model)
    contexts, bos_id = tokenise(config.corpus, lm)
    mesh = _make_mesh(lm.n_layers, config)
    source = activations.StreamSource(
        lm,
        contexts,
        bos_id=bos_id,
        batch=config.train.batch,
        seed=config.seed,
        held_out=config.train.held_out,
        buffer_tokens=config.train.buffer_tokens,
        replace=config.activations.replace,
        forward_batch=config.activations.batch,
        mesh=mesh,
    )
    sizes = source.sizes
    logging.info(
        "streaming %d contexts of %d tokens (each starts with BOS %d) through a buffer of %d rows, %s a device; %d "
        "rows are replaced at a time, by %d contexts",
        *contexts.shape, bos_id, sizes.buffer_rows, human_bytes(sizes.buffer_bytes(lm.n_layers, lm.d_model)),
        sizes.refill_rows, sizes.refill_contexts,
    )  # fmt: skip
    rows = Rows(
        source,
        n_layers=lm.n_layers,
        d_model=lm.d_model,
        model=lm.name,
        model_fingerprint=lm.fingerprint,
        corpus_fingerprint=hashlib.sha256(contexts.tobytes()).hexdigest(),
        context=contexts.shape[1],
        bos_id=bos_id,
        lm=lm,
        settings=("activations", "mesh.data"),
    )
    return rows, mesh


def _write_about(folder: Path, config: RunConfig, rows: Rows, recipe: sae.Recipe) -> None:
    """Write `suite.json`; refuse to mix two configurations in one folder."""
    about: dict[str, Any] = {
        "architecture": config.sae.architecture,
        "k": config.sae.k,
        "n_layers": rows.n_layers,
        "d_model": rows.d_model,
        "n_latents": recipe.n_latents,
        "model": rows.model,
        "model_fingerprint": rows.model_fingerprint,
        "corpus_fingerprint": rows.corpus_fingerprint,
        "total_steps": recipe.total_steps,
        "total_tokens": recipe.total_tokens,
        "batch": config.train.batch,
        "dead_tokens": recipe.dead_tokens,
        "settings": config.select("sae", "train", "seed", *rows.settings),
    }
    path = folder / "suite.json"
    if path.exists():
        have = artifacts.read_json(path, rebuild="run jaxsae train --redo")
        for name, setting in {**about, **about["settings"]}.items():
            found = have["settings"].get(name, have.get(name))
            if name != "settings" and found != setting:
                raise InputError(
                    f"{folder} holds SAEs with {name} {found}, this run asks for {setting}; use a new --workdir, or "
                    "jaxsae train --redo to replace them"
                )
        return
    artifacts.write_json(path, about)


def _log_start(trainer: sae.Trainer, recipe: sae.Recipe, mesh: Any) -> None:
    logging.info(
        "%d SAEs, %s, D %d, F %d, k %d; %d steps of %d tokens, lr %.2g; %s; %d x %d x %d devices (layer x "
        "data x latent), from step %d",
        recipe.n_layers, recipe.sae.architecture, recipe.d_model, recipe.n_latents, recipe.sae.k, recipe.total_steps,
        recipe.train.batch, recipe.lr, "products by kept latents" if recipe.is_sparse else "dense products",
        mesh.shape[meshes.LAYER], mesh.shape[meshes.DATA], mesh.shape[meshes.LATENT], trainer.step,
    )  # fmt: skip


def _train(trainer: sae.Trainer, recipe: sae.Recipe, context: Context) -> None:
    history = MetricsLog(context.workdir / "logs", resume_step=trainer.step, process_index=context.process_index)

    def on_evaluation(step: int, numbers: dict[str, np.ndarray]) -> None:
        names = {"fvu": "eval/fvu", "mse": "eval/mse", "l0": "eval/l0", "loss": "train/loss", "dead": "train/dead"}
        names["l0_train"] = "train/l0"
        history.write(
            step,
            {
                f"{names[name]}/layer_{layer:02d}": float(number)
                for name, layers in numbers.items()
                for layer, number in enumerate(layers)
            },
        )

    progress = Progress("train", recipe.total_steps, "steps", done=trainer.step, process_index=context.process_index)
    try:
        with progress, context.stop.polled() as should_stop:
            trainer.run(on_step=progress.update, on_evaluation=on_evaluation, should_stop=should_stop)
    finally:
        history.close()


def _measure(trainer: sae.Trainer, rows: Rows, config: RunConfig, context: Context) -> None:
    """Write `evaluation.json`: the best SAE of each layer on held-out tokens, with PCA and the model's loss beside."""
    source = rows.source
    suite = sae.load(context.workdir / "saes")
    quality, numbers = trainer.measure_best()
    fit = source.sample(min(PCA_ROWS, source.n_train_tokens), seed=config.seed + 1)
    own_mean = np.stack([layer.astype(np.float32).mean(axis=0) for layer in fit])
    mean = meshes.gather_layers(own_mean, trainer.layers, rows.n_layers)
    held_out = (meshes.fetch_batch(acts, trainer.layers) for acts in trainer.held_out())
    own = {"pca_fvu": evaluate.pca_fvu(fit, held_out, config.sae.k)}
    own |= evaluate.crowding_by_layer(suite, trainer.layers)
    numbers |= {name: meshes.gather_layers(values, trainer.layers, rows.n_layers) for name, values in own.items()}
    numbers |= _language_model_losses(suite, source.held_out_contexts(), mean, rows, config, context)
    if context.is_main:
        edges, counts = quality.density()
        evaluated = {
            "rows": [
                {"layer": layer} | {name: _number(values[layer]) for name, values in numbers.items()}
                for layer in range(rows.n_layers)
            ],
            "held_out_tokens": quality.n_rows,
            "pca_components": config.sae.k,
            "density": {"log10_edges": edges.tolist(), "counts": counts.tolist()},
            "crowding_random": evaluate.random_crowding(suite.n_latents, suite.d_model),
        }
        artifacts.write_json(context.workdir / "saes" / "evaluation.json", evaluated)
        context.details = f"median FVU {np.median(numbers['fvu']):.4f} at L0 {np.median(numbers['l0_inference']):.1f}"


def _language_model_losses(
    suite: sae.SaeSuite,
    contexts: np.ndarray,
    mean: np.ndarray,
    rows: Rows,
    config: RunConfig,
    context: Context,
) -> dict[str, np.ndarray]:
    lm = load_model(config.model) if rows.lm is None else rows.lm
    if lm.fingerprint != rows.model_fingerprint:
        raise InputError(
            f"activations/ are of {rows.model} (fingerprint {rows.model_fingerprint[:12]}), the config's "
            f"model is {lm.name} ({lm.fingerprint[:12]}); use the model and model.dtype that were extracted"
        )
    batch = min(config.activations.batch, len(contexts))
    n_contexts = max(batch, min(len(contexts), config.train.delta_ce_tokens // rows.context))
    bos_id = -1 if rows.bos_id is None else rows.bos_id  # no token's id
    with Progress("language model's loss", n_contexts, "contexts", process_index=context.process_index) as bar:
        return evaluate.language_model_loss(
            suite, lm, contexts[:n_contexts], bos_id=bos_id, centre=mean, batch=batch, on_batch=bar.update
        )


def _number(value: Any) -> int | float | None:
    """Return a number for JSON, None where it is not defined."""
    if isinstance(value, np.integer):
        return int(value)
    return float(value) if np.isfinite(value) else None
