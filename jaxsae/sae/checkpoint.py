"""SAE suites and training states on disk: Orbax writes them, a sha256 manifest vouches for every byte.

    saes/suite.json                what the suite is: architecture, sizes, language model, settings
    saes/checkpoints/<step>/       Orbax: `best` and `last` weights, `train` state, `reader` position,
                                   `buffer` of a source on the devices
    saes/manifests/<step>.json     written last; a step without it was interrupted and does not count;
                                   it also vouches for suite.json, which therefore comes before the first save

Orbax restores a flipped byte silently; here every file is compared with the manifest before it is used. Arrays are
chunked by layer, so that one layer's SAE is read without touching the others' bytes.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jaxtyping import Shaped

from jaxsae.artifacts import InputError, read_json, sha256_file, write_json
from jaxsae.mesh import wait_for_all
from jaxsae.sae.suite import SaeSuite, fold_scale

REBUILD = "run jaxsae train"
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "scale")
_ARRAY_ITEMS = ("best", "last", "train", "buffer")
_KEPT_STEPS = 2


class Checkpoints:
    """The checkpoints of one training run: save, find the newest whole one, restore it."""

    def __init__(self, directory: str | os.PathLike) -> None:
        """Open `directory`, made if need be, and remove what interrupted saves left behind."""
        self.directory = Path(directory).absolute()
        if jax.process_index() == 0:
            self._remove_interrupted()
        wait_for_all("checkpoints opened")
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in _ARRAY_ITEMS:
            registry.add(item, ocp.args.PyTreeSave, handler)
            registry.add(item, ocp.args.PyTreeRestore, handler)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT_STEPS, cleanup_tmp_directories=True, enable_async_checkpointing=False, create=True
        )
        self.manager = ocp.CheckpointManager(self.directory / "checkpoints", options=options, handler_registry=registry)

    def _remove_interrupted(self) -> None:
        whole = set(manifest_steps(self.directory))
        for path in (self.directory / "checkpoints").glob("*"):
            step = path.name.split(".")[0]  # 12, or 12.orbax-checkpoint-tmp
            if step.isdigit() and not (path.name == step and int(step) in whole):
                shutil.rmtree(path)

    def latest_step(self) -> int | None:
        """Return the step of the newest whole checkpoint, None if there is none."""
        return max(manifest_steps(self.directory), default=None)

    def save(self, step: int, trees: dict[str, Any], reader: dict[str, Any]) -> None:
        """Write pytrees of arrays [L ...] (see above) and the reader's position; vouch for them last.

        Raises:
            InputError: the disk is full; what was saved before stays.
        """
        items = {
            name: ocp.args.PyTreeSave(tree, save_args=jax.tree.map(_by_layer, tree)) for name, tree in trees.items()
        }
        try:
            self.manager.save(step, args=ocp.args.Composite(reader=ocp.args.JsonSave(reader), **items), force=True)
            self.manager.wait_until_finished()
            if jax.process_index() == 0:
                self._vouch(step)
        except (OSError, ValueError) as error:
            if "No space left" in str(error) or "ENOSPC" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
                raise InputError(
                    f"no space left for checkpoint {step} in {self.directory}; free some and run jaxsae train again, "
                    "it resumes from the checkpoint before"
                ) from None
            raise
        wait_for_all(f"checkpoint {step}")

    def _vouch(self, step: int) -> None:
        folder = self.directory / "checkpoints" / str(step)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        digests = {str(path.relative_to(folder)): sha256_file(path) for path in files}
        about = sha256_file(self.directory / "suite.json")
        write_json(_manifest_path(self.directory, step), {"step": step, "suite": about, "files": digests})
        for old in manifest_steps(self.directory):
            if not (self.directory / "checkpoints" / str(old)).exists():
                _manifest_path(self.directory, old).unlink()

    def restore(self, step: int, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (trees, reader position) of a step, arrays sharded like those of `like`.

        Raises:
            InputError: a file is missing or differs from the manifest; or names, shapes or dtypes differ from `like`.
        """
        verify(self.directory, step)
        metadata = self.manager.item_metadata(step)
        items = {}
        for name, tree in like.items():
            _check_like(metadata[name].tree, tree, f"{self.directory}/checkpoints/{step}/{name}")
            restore_args = jax.tree.map(
                lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype), tree
            )
            items[name] = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args)
        restored = self.manager.restore(step, args=ocp.args.Composite(reader=ocp.args.JsonRestore(), **items))
        return {name: restored[name] for name in like}, restored["reader"]

    def close(self) -> None:
        """Release Orbax's resources."""
        self.manager.close()


def write_suite(directory: str | os.PathLike, suite: SaeSuite, *, about: dict[str, Any]) -> None:
    """Write a finished suite as a run's `saes/`, its weights both as `best` and as `last`, with no state to train from.

    Args:
        directory: holds no suite yet.
        suite: of all layers, in residual units.
        about: what `suite.json` says beside architecture, k and sizes.

    Raises:
        InputError: the disk is full.
    """
    directory, n_layers = Path(directory), suite.W_enc.shape[0]
    sizes = {"n_layers": n_layers, "d_model": suite.d_model, "n_latents": suite.n_latents}
    write_json(directory / "suite.json", {"architecture": suite.architecture, "k": suite.k, **sizes, **about})
    arrays = {name: getattr(suite, name) for name in _WEIGHTS if name != "scale"}
    weights = jax.tree.map(jax.numpy.asarray, arrays | {"scale": np.ones(n_layers, np.float32)})
    checkpoints = Checkpoints(directory)
    try:
        checkpoints.save(0, {"best": weights, "last": weights}, {})
    finally:
        checkpoints.close()


def _by_layer(array: jax.Array) -> ocp.SaveArgs:
    """Return chunks of one layer, or of a part of it, so that a chunk is named by its layer.

    Several devices each write a part of a layer, and those that hold the same write a part of that; a chunk of a whole
    layer's size would then hold parts of several.
    """
    layers_of_device = array.sharding.shard_shape(array.shape)[0]
    n_writers = len(array.sharding.device_set) * layers_of_device // array.shape[0]
    return ocp.SaveArgs(
        chunk_byte_size=max(array.nbytes // array.shape[0] // n_writers, array.dtype.itemsize), shard_axes=(0,)
    )


def _check_like(stored: Any, wanted: Any, where: str) -> None:
    """Compare names, shapes and dtypes; Orbax would cast some differences silently."""

    def describe(tree: Any) -> dict[str, tuple]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {_simple_name(path): (tuple(leaf.shape), np.dtype(leaf.dtype).name) for path, leaf in leaves}

    have, want = describe(stored), describe(wanted)
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise InputError(
                f"{where} holds {name} as {have.get(name)}, this run needs {want.get(name)}; "
                "the checkpoint is of another configuration: use a new --workdir"
            )


def _simple_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def manifest_steps(directory: str | os.PathLike) -> list[int]:
    """Return the steps that have a manifest, ascending."""
    return sorted(int(path.stem) for path in (Path(directory) / "manifests").glob("*.json") if path.stem.isdigit())


def _manifest_path(directory: Path, step: int) -> Path:
    return directory / "manifests" / f"{step}.json"


def verify(
    directory: str | os.PathLike, step: int, *, under: tuple[str, ...] = ("",), chunk: str | None = None
) -> None:
    """Compare a checkpoint's files with its manifest.

    Args:
        under: only files whose path inside the step starts with one of these.
        chunk: of chunk files (names of numbers), only those whose first number is this one; metadata always.

    Raises:
        InputError: a file is missing or differs, or the manifest is damaged; the file is named, and how to go on
            without it.
    """
    directory = Path(directory)
    folder = directory / "checkpoints" / str(step)
    way_out = _way_out(directory, step)
    for name, digest in _read_manifest(directory, step, "files").items():
        if not name.startswith(under) or not _is_of_chunk(name, chunk):
            continue
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing; {way_out}")
        if sha256_file(path) != digest:
            raise InputError(f"{path} is damaged (its sha256 is not the manifest's); {way_out}")


def _way_out(directory: Path, step: int) -> str:
    others = [other for other in manifest_steps(directory) if other != step]
    folder, manifest = directory / "checkpoints" / str(step), _manifest_path(directory, step)
    goes_on = f"goes on from step {max(others)}" if others else "starts anew"
    return f"delete {folder} and {manifest}, then run jaxsae train again: it {goes_on}"


def _read_manifest(directory: Path, step: int, key: str) -> Any:
    path, way_out = _manifest_path(directory, step), _way_out(directory, step)
    content = read_json(path, rebuild=way_out)
    if key not in content:
        raise InputError(f"{path} is damaged (it lacks {key!r}); {way_out}")
    return content[key]


def _read_about(directory: Path) -> tuple[dict[str, Any], int]:
    """Return what `suite.json` says, and the newest step, whose manifest vouches for it."""
    path = directory / "suite.json"
    about = read_json(path, rebuild=REBUILD)
    step = max(manifest_steps(directory), default=None)
    if step is None:
        raise InputError(f"{directory} holds no whole checkpoint; {REBUILD}")
    if sha256_file(path) != _read_manifest(directory, step, "suite"):
        raise InputError(
            f"{path} is damaged (its sha256 is not the manifest's); delete it, then run jaxsae train again: it writes "
            "the file anew and keeps the checkpoints"
        )
    return about, step


def _is_of_chunk(name: str, chunk: str | None) -> bool:
    last = Path(name).name
    return chunk is None or not last[0].isdigit() or last.split(".")[0] == chunk


def load(
    directory: str | os.PathLike, *, layer: int | None = None, which: str = "best", arrays: str = "numpy"
) -> SaeSuite:
    """Read a trained suite, each byte checked against its manifest.

    Args:
        directory: the run's `saes/`.
        layer: read this layer's bytes only, and drop the L axis.
        which: "best" (each layer at its own lowest held-out FVU) or "last" (the newest state).
        arrays: "numpy" or "jax".

    Raises:
        InputError: there is no whole checkpoint there, a file is damaged, or an argument is none of the choices.
    """
    directory = Path(directory)
    if which not in ("best", "last") or arrays not in ("numpy", "jax"):
        raise InputError(f"which={which!r}, arrays={arrays!r}; expected which=best or last, arrays=numpy or jax")
    about, step = _read_about(directory)
    if layer is not None and not 0 <= layer < about["n_layers"]:
        raise InputError(f"layer {layer} asked for, {directory} holds layers 0 to {about['n_layers'] - 1}")
    verify(directory, step, under=(f"{which}/",), chunk=None if layer is None else str(layer))
    rows = slice(0, about["n_layers"]) if layer is None else layer
    weights = {name: _read(directory / "checkpoints" / str(step) / which / name, rows) for name in _WEIGHTS}
    suite = fold_scale(weights, architecture=about["architecture"], k=about["k"])
    return jax.tree.map(jax.numpy.asarray, suite) if arrays == "jax" else suite


def _read(path: Path, rows: slice | int) -> Shaped[np.ndarray, "..."]:
    """Read rows of the first axis of one Orbax array; Orbax itself offers whole arrays only."""
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}, "fill_missing_data_reads": False}
    return ts.open(spec, read=True).result()[rows].read().result()


class Decoders:
    """Each layer's decoder rows [F, D], read from the checkpoint when asked for, the last two kept in memory."""

    def __init__(self, directory: str | os.PathLike, *, which: str = "best") -> None:
        """Look at the suite of a run's `saes/`.

        Raises:
            InputError: there is none.
        """
        self._directory, self._which = Path(directory), which
        self._n_layers = _read_about(self._directory)[0]["n_layers"]
        self._kept: dict[int, Shaped[np.ndarray, "F D"]] = {}

    def __len__(self) -> int:
        return self._n_layers

    def __getitem__(self, layer: int) -> Shaped[np.ndarray, "F D"]:
        if not 0 <= layer < self._n_layers:
            raise IndexError(layer)
        if layer not in self._kept:
            rows = load(self._directory, layer=layer, which=self._which).W_dec
            self._kept = {**dict(list(self._kept.items())[-1:]), layer: np.asarray(rows)}
        return self._kept[layer]
