"""SAEs to and from other libraries: `jaxsae export` writes a run's suite, `jaxsae import` makes a run's `saes/`.

A suite has an SAE for every layer of its language model, so that tracks can go through all of them. What is imported is
not measured, since there are no activations to measure it on: `evaluation.json` says so with nulls.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float

from jaxsae import artifacts, models, sae
from jaxsae.artifacts import InputError
from jaxsae.config import ModelConfig
from jaxsae.pipeline import stages
from jaxsae.pipeline.extract import load_model
from jaxsae.progress import Progress
from jaxsae.sae import exchange
from jaxsae.sae.checkpoint import write_suite
from jaxsae.sae.exchange import EMBEDDING, Origin

EXPORT_LAYOUTS = ("saelens",)
IMPORT_LAYOUTS = tuple(exchange.LAYOUTS)
_MEASURES = (
    "mse", "fvu", "pca_fvu", "l0_train", "l0_inference", "dead", "best_step", "delta_ce", "delta_ce_zero",
    "delta_ce_mean", "kl",
)  # fmt: skip
_UNIT = 1e-3  # a decoder row whose length differs from 1 by more is worth a word


def export_suite(workdir: Path, out: Path) -> int:
    """Write each layer's best SAE of a run as a SAELens folder `OUT/blocks.N.hook_resid_post`; return how many.

    Raises:
        InputError: there is no suite, a checkpoint file is damaged, or `out` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; name a new folder with --out")
    about = artifacts.read_json(workdir / "saes" / "suite.json", rebuild="run jaxsae train, or jaxsae import")
    context = _context(workdir)
    with _whole(out) as folder, Progress("export", about["n_layers"], "layers") as bar:
        for layer in range(about["n_layers"]):
            one = sae.load(workdir / "saes", layer=layer)
            where = folder / f"blocks.{layer}.hook_resid_post"
            exchange.write_saelens(where, one, layer=layer, model=about["model"], context=context)
            bar.update(layer + 1)
    logging.info("%d SAEs (%s) of %s in %s", about["n_layers"], about["architecture"], about["model"], out)
    return about["n_layers"]


def _context(workdir: Path) -> dict[str, int | bool]:
    """Return how the suite's activations were made, as SAELens writes it; nothing where they are not at hand."""
    path = workdir / "activations" / "meta.json"
    if not path.is_file():
        return {}
    meta = artifacts.read_json(path, rebuild="run jaxsae extract")
    return {"context_size": meta["context"], "prepend_bos": meta["bos_id"] is not None}


def import_suite(
    source: Path, workdir: Path, *, model: str, dtype: str, layout: str | None = None, layer: int | None = None
) -> None:
    """Make `WORKDIR/saes` of the SAEs below `source`, one for each layer of the language model.

    Args:
        model, dtype: the language model and its compute dtype, as `model.name` (or `model.path`) and `model.dtype` of
            the runs that will use the suite.
        layout: see `exchange.find`.
        layer: where a single SAE belongs, if its files do not say.

    Raises:
        InputError: there are SAEs already; an SAE cannot be read or kept in a suite; they do not fit each other or the
            model; or a layer has none, or two.
    """
    folder = workdir / "saes"
    if folder.exists():
        raise InputError(f"{folder} holds SAEs already; use a new --workdir, or delete the folder")
    layout, found = exchange.find(source, layout)
    placed = _by_layer(source, found, layer)
    lm = dataclasses.replace(load_model(ModelConfig(name=model, dtype=dtype)), params={})  # its weights may go
    _check_complete(source, placed, lm)
    with stages.lock(workdir), _whole(folder) as partial:
        suite = _read_all(layout, placed, lm)
        origins = {str(layer): {"file": str(one.path), "site": one.site} for layer, one in placed.items()}
        about = {"model": lm.name, "model_fingerprint": lm.fingerprint, "settings": {}}
        unknown = dict.fromkeys(("total_steps", "total_tokens", "batch", "dead_tokens"))
        write_suite(partial, suite, about=about | unknown | {"imported": {"layout": layout, "layers": origins}})
        _write_unmeasured(partial, placed)
    logging.info(
        "%d SAEs (%s) as %s, D %d, F %d, in %s; for runs with model.dtype=%s",
        len(placed), layout, suite.architecture, suite.d_model, suite.n_latents, folder, dtype,
    )  # fmt: skip


def _by_layer(source: Path, found: Sequence[Origin], layer: int | None) -> dict[int, Origin]:
    """Return the SAEs by layer, ascending; those of the embedding are left out, which is logged."""
    if layer is not None and len(found) > 1:
        raise InputError(f"--layer={layer} is for one SAE, {source} holds {len(found)}; leave it out")
    placed: dict[int, Origin] = {}
    for one in found:
        if None not in (layer, one.layer) and layer != one.layer:
            raise InputError(f"--layer={layer}, but {one.path} is of layer {one.layer} ({one.site}); leave --layer out")
        at = one.layer if layer is None else layer
        if at is None:
            raise InputError(
                f"nothing says which layer {one.path} belongs to; name its folder layer_N, or give --layer"
            )
        if at == EMBEDDING:
            logging.info("%s reads the embedding (%s), before the first layer: left out", one.path, one.site)
            continue
        if at in placed:
            raise InputError(
                f"layer {at} has two SAEs, {placed[at].path} and {one.path}; give a folder with one of them"
            )
        if "hook_resid_pre" in one.site:
            logging.info("%s: before block %d is after block %d: layer %d", one.site, at + 1, at, at)
        placed[at] = one
    return dict(sorted(placed.items()))


def _check_complete(source: Path, placed: dict[int, Origin], lm: models.LanguageModel) -> None:
    beyond = [str(layer) for layer in placed if not 0 <= layer < lm.n_layers]
    if beyond:
        raise InputError(
            f"{source} has SAEs of layers {', '.join(beyond)}, {lm.name} has layers 0 to {lm.n_layers - 1}; give the "
            "model that they were trained on with --model"
        )
    missing = [str(layer) for layer in range(lm.n_layers) if layer not in placed]
    if missing:
        raise InputError(
            f"{source} has no SAE of layers {', '.join(missing)}; tracks go through all {lm.n_layers} layers of "
            f"{lm.name}: give one for each"
        )
    names = {one.model for one in placed.values() if one.model}
    if names - {lm.name}:
        logging.warning("the SAEs say that they are of %s; taken for %s", ", ".join(sorted(names)), lm.name)


def _read_all(layout: str, placed: dict[int, Origin], lm: models.LanguageModel) -> sae.SaeSuite:
    """Read the SAEs into one suite, a layer at a time; `k` is 0 where it is not known, or not the same for all."""
    first, arrays, ks = None, dict[str, np.ndarray](), set[int]()
    with Progress("import", len(placed), "layers") as bar:
        for layer, origin in placed.items():
            one = exchange.read(layout, origin.path)
            first = first or one
            _check_alike(origin, one, first, lm)
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
                if name not in arrays:
                    arrays[name] = np.empty((len(placed), *getattr(one, name).shape), np.float32)
                arrays[name][layer] = getattr(one, name)
            ks.add(one.k)
            bar.update(layer + 1)
    _warn_of_lengths(arrays["W_dec"])
    return sae.SaeSuite(**arrays, architecture=one.architecture, k=ks.pop() if len(ks) == 1 else 0)


def _warn_of_lengths(W_dec: Float[np.ndarray, "L F D"]) -> None:
    """Say which layers' decoder rows are not of length 1: their activations are no lengths in the residual stream."""
    norms = np.array([np.linalg.norm(rows, axis=1) for rows in W_dec])
    odd = np.flatnonzero(np.abs(norms - 1).max(axis=1) > _UNIT)
    if len(odd):
        logging.warning(
            "decoder rows of layers %s are %.3g to %.3g long, not 1: activations, and with them "
            "tracking.birth_threshold, are no lengths in the residual stream; cosines do not change",
            ", ".join(map(str, odd)), norms.min(), norms.max(),
        )  # fmt: skip


def _check_alike(origin: Origin, one: sae.SaeSuite, first: sae.SaeSuite, lm: models.LanguageModel) -> None:
    if one.d_model != lm.d_model:
        raise InputError(
            f"{origin.path} reads a residual stream of width {one.d_model}, that of {lm.name} has {lm.d_model}; give "
            "the model that it was trained on with --model"
        )
    for name in ("architecture", "n_latents", *(["k"] if one.architecture == "topk" else [])):
        if getattr(one, name) != getattr(first, name):
            raise InputError(
                f"{origin.path} has {name} {getattr(one, name)}, the SAE of layer 0 {getattr(first, name)}; a suite "
                "has one for all layers"
            )


def _write_unmeasured(folder: Path, placed: dict[int, Origin]) -> None:
    """Write `evaluation.json` with nulls, and the files' digests, by which later stages notice another suite."""
    rows = [{"layer": layer} | dict.fromkeys(_MEASURES) for layer in placed]
    digests = {str(layer): artifacts.sha256_file(origin.path) for layer, origin in placed.items()}
    unknown = dict.fromkeys(("held_out_tokens", "pca_components"))
    artifacts.write_json(folder / "evaluation.json", {"rows": rows, **unknown, "imported_sha256": digests})


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` that takes its place when the block ends without an error."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
