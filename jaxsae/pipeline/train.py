"""Phase 2: residual streams to one sparse autoencoder per layer, in `saes/`, measured on held-out tokens."""

from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jaxsae import activations, artifacts, sae
from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.config import RunConfig
from jaxsae.pipeline.extract import load_model
from jaxsae.pipeline.stages import Context
from jaxsae.progress import MetricsLog, Progress
from jaxsae.sae import evaluate

PCA_ROWS = 16_384  # training rows that the PCA beside each SAE is fitted on


def run(config: RunConfig, context: Context) -> None:
    """Train to the end of the budget, resuming from the newest checkpoint; then measure the best SAE of each layer.

    Raises:
        InputError: store or checkpoints are damaged or of another run, or the loss is not finite.
    """
    store = activations.open(context.workdir / "activations")
    meta, folder = store.meta, context.workdir / "saes"
    mesh = meshes.make_mesh(meta.n_layers, layer=config.mesh.layer, data=config.mesh.data)
    if config.train.batch % config.mesh.data:
        raise InputError(f"train.batch {config.train.batch} does not divide by mesh.data {config.mesh.data}")
    source = activations.StoreSource(
        store,
        batch=config.train.batch,
        seed=config.seed,
        held_out=config.train.held_out,
        buffer_tokens=config.train.buffer_tokens,
        layers=meshes.local_layers(meta.n_layers, mesh),
    )
    recipe = sae.make_recipe(
        config.sae,
        config.train,
        n_layers=meta.n_layers,
        d_model=meta.d_model,
        batches_per_epoch=source.batches_per_epoch,
    )
    if context.is_main:
        _write_about(folder, config, store, recipe)
    checkpoints = sae.Checkpoints(folder)
    trainer = sae.Trainer(source, recipe, checkpoints, mesh=mesh, seed=config.seed)
    _log_start(trainer, recipe, mesh)
    _train(trainer, recipe, context)
    _measure(trainer, source, config, context)
    checkpoints.close()


def _write_about(folder: Path, config: RunConfig, store: activations.Store, recipe: sae.Recipe) -> None:
    """Write `suite.json`; refuse to mix two configurations in one folder."""
    meta = store.meta
    about: dict[str, Any] = {
        "architecture": config.sae.architecture,
        "k": config.sae.k,
        "n_layers": meta.n_layers,
        "d_model": meta.d_model,
        "n_latents": recipe.n_latents,
        "model": meta.model,
        "model_fingerprint": meta.model_fingerprint,
        "total_steps": recipe.total_steps,
        "total_tokens": recipe.total_tokens,
        "batch": config.train.batch,
        "dead_tokens": recipe.dead_tokens,
        "settings": config.select("sae", "train", "seed"),
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
        "%d SAEs, %s, D %d, F %d, k %d; %d steps of %d tokens, lr %.2g; %d x %d devices (layer x data), from step %d",
        recipe.n_layers, recipe.sae.architecture, recipe.d_model, recipe.n_latents, recipe.sae.k, recipe.total_steps,
        recipe.train.batch, recipe.lr, mesh.shape[meshes.LAYER], mesh.shape[meshes.DATA], trainer.step,
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


def _measure(trainer: sae.Trainer, source: activations.StoreSource, config: RunConfig, context: Context) -> None:
    """Write `evaluation.json`: the best SAE of each layer on held-out tokens, with PCA and the model's loss beside."""
    meta = source.store.meta
    numbers = trainer.measure_best()
    fit = source.sample(min(PCA_ROWS, source.n_train_tokens), seed=config.seed + 1)
    held_out = np.concatenate(list(trainer.held_out()), axis=1)
    pca = evaluate.pca_fvu(fit, held_out, config.sae.k)
    numbers["pca_fvu"] = meshes.gather_layers(pca, trainer.layers, meta.n_layers)
    mean = meshes.gather_layers(fit.astype(np.float32).mean(axis=1), trainer.layers, meta.n_layers)
    if context.is_main:
        numbers |= _language_model_losses(source.held_out_contexts(), mean, meta, config, context)
        rows = [
            {"layer": layer} | {name: _number(values[layer]) for name, values in numbers.items()}
            for layer in range(meta.n_layers)
        ]
        evaluated = {"rows": rows, "held_out_tokens": int(held_out.shape[1]), "pca_components": config.sae.k}
        artifacts.write_json(context.workdir / "saes" / "evaluation.json", evaluated)
        context.details = f"median FVU {np.median(numbers['fvu']):.4f} at L0 {np.median(numbers['l0_inference']):.1f}"


def _language_model_losses(
    contexts: np.ndarray, mean: np.ndarray, meta: activations.StoreMeta, config: RunConfig, context: Context
) -> dict[str, np.ndarray]:
    lm = load_model(config.model)
    if lm.fingerprint != meta.model_fingerprint:
        raise InputError(
            f"activations/ are of {meta.model} (fingerprint {meta.model_fingerprint[:12]}), the config's "
            f"model is {lm.name} ({lm.fingerprint[:12]}); use the model and model.dtype that were extracted"
        )
    batch = min(config.activations.batch, len(contexts))
    n_contexts = max(batch, min(len(contexts), config.train.delta_ce_tokens // meta.context))
    bos_id = -1 if meta.bos_id is None else meta.bos_id  # no token's id
    suite = sae.load(context.workdir / "saes", arrays="jax")
    with Progress("language model's loss", n_contexts, "contexts") as bar:
        return evaluate.language_model_loss(
            suite, lm, contexts[:n_contexts], bos_id=bos_id, centre=mean, batch=batch, on_batch=bar.update
        )


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, np.integer) else float(value)
