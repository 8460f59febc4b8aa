"""Devices: the ("layer", "data", "latent") mesh, every PartitionSpec, the start of processes, and moves on and off.

Layers never talk to each other, so nothing is ever communicated along "layer"; rows of a batch are spread along "data",
the latents of an SAE that is too large for one device along "latent".
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from jaxsae.artifacts import InputError

AnyArray = Array | np.ndarray
LAYER, DATA, LATENT = "layer", "data", "latent"
BY_LAYER = P(LAYER)  # parameters, optimizer, counters: [L, ...]
BY_STEP_AND_LAYER = P(None, LAYER)  # metrics of several steps: [n, L]
BY_LAYER_AND_DATA = P(LAYER, DATA)  # activations: [L, B, D]
BY_DATA = P(DATA)  # per-row weights: [B]
REPLICATED = P()

# Which axis of a suite's arrays, and of its training state's, counts latents; what an architecture learns beside, under
# "gate", is [L, F].
_LATENT_AXES = {"W_enc": 2, "b_enc": 1, "W_dec": 1, "threshold": 1, "since_fired": 1}

# The axis, counted from the end, along which each matrix of a language model is split over all devices: the first of
# attention or MLP along what it puts out, the second along what it takes in, so that a block's only traffic is two sums
# of activations. Matrices are [out, in]; tables are split by vocabulary.
# Source: Shoeybi et al. 2019, arXiv:1909.08053.
_SPLIT_AXES = {
    **dict.fromkeys(("c_attn", "c_fc", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"), -2),
    **dict.fromkeys(("c_proj", "o_proj", "down_proj", "dense", "fc2"), -1),
    **dict.fromkeys(("wte", "embed_tokens", "lm_head"), -2),
}
PARAM_SHARDINGS = ("replicated", "split")


def start_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of the run, if there are any, before the first device is touched.

    JAXSAE_COORDINATOR (host:port), JAXSAE_PROCESSES and JAXSAE_PROCESS name the processes anywhere; under SLURM with
    more than one task, jax reads the cluster's own variables. Otherwise the run has one process.

    Raises:
        InputError: some of the three variables are set, but not all, or one is no number.
    """
    names = ("JAXSAE_COORDINATOR", "JAXSAE_PROCESSES", "JAXSAE_PROCESS")
    given = {name: environment[name] for name in names if name in environment}
    if given:
        try:
            address, count, index = given[names[0]], int(given[names[1]]), int(given[names[2]])
        except (KeyError, ValueError):
            raise InputError(f"set {', '.join(names)} together, two numbers last; found {given}") from None
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=30)
    elif int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        jax.distributed.initialize()


def make_mesh(n_layers: int, *, layer: int | None = None, data: int = 1, latent: int = 1) -> Mesh:
    """Return the ("layer", "data", "latent") mesh over the first `layer * data * latent` devices.

    Args:
        n_layers: layers of the language model; an unset `layer` takes no more devices than that.

    Raises:
        InputError: there are fewer devices than asked for, or several processes and a mesh that leaves a device idle.
    """
    available = jax.device_count()
    if layer is None:
        layer = max(1, min(available // (data * latent), n_layers))
    n_devices = layer * data * latent
    wanted = f"mesh.layer {layer} x mesh.data {data} x mesh.latent {latent}"
    if n_devices > available:
        raise InputError(f"{wanted} needs {n_devices} devices, {available} are here")
    if jax.process_count() > 1 and n_devices != available:
        raise InputError(
            f"{wanted} uses {n_devices} of {available} devices; with several processes every device takes part: set "
            "the three so that their product is the number of devices"
        )
    devices = np.array(jax.devices()[:n_devices]).reshape(layer, data, latent)
    return Mesh(devices, (LAYER, DATA, LATENT), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def data_axis(mesh: Mesh) -> str | None:
    """Return the mesh axis along which a batch's rows are spread, None where every device has all of them."""
    return DATA if mesh.shape[DATA] > 1 else None


def acts_spec(mesh: Mesh) -> P:
    """Return the PartitionSpec of a batch [L, B, D]."""
    return P(LAYER, data_axis(mesh))


def latent_axis(mesh: Mesh) -> str | None:
    """Return the mesh axis along which latents are spread, None where each SAE is whole on its device."""
    return LATENT if mesh.shape[LATENT] > 1 else None


def context_spec(mesh: Mesh) -> P:
    """Return the PartitionSpec of contexts [n, T] that all devices share out, those of a data shard side by side."""
    axis = latent_axis(mesh)
    return P((DATA, LAYER) if axis is None else (DATA, axis, LAYER))


def latent_spec(mesh: Mesh) -> P:
    """Return the PartitionSpec of one number a latent, [L, F]."""
    return P(LAYER, latent_axis(mesh))


def layer_specs(tree: Any, mesh: Mesh) -> Any:
    """Return the PartitionSpecs of a pytree of arrays [L, ...]: by layer, and by latent those that have latents.

    Args:
        tree: a suite, its weights by name, or its training state; arrays are told apart by their names.

    Raises:
        InputError: the latents do not divide by the mesh.
    """
    axis = latent_axis(mesh)

    def spec(path: tuple, array: Any) -> P:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        place = 1 if "gate" in names else _LATENT_AXES.get(names[-1])
        if axis is None or place is None:
            return BY_LAYER
        if array.shape[place] % mesh.shape[axis]:
            raise InputError(
                f"{array.shape[place]} latents do not divide by mesh.latent {mesh.shape[axis]}; change mesh.latent, or "
                "sae.n_latents or sae.expansion"
            )
        return P(LAYER, *[None] * (place - 1), axis)

    return jax.tree_util.tree_map_with_path(spec, tree)


def padded_layers(n_layers: int, mesh: Mesh) -> int:
    """Return L rounded up to a multiple of the mesh's layer axis; the added layers repeat the last one's data."""
    shards = mesh.shape[LAYER]
    return -(-n_layers // shards) * shards


def local_layers(n_layers: int, mesh: Mesh) -> slice:
    """Return the layers whose activations this process must read: never empty, never beyond `n_layers`."""
    per_shard = padded_layers(n_layers, mesh) // mesh.shape[LAYER]
    rows = [
        row
        for row, devices in enumerate(mesh.devices)
        if any(device.process_index == jax.process_index() for device in devices.flat)
    ]
    first, last = min(rows) * per_shard, (max(rows) + 1) * per_shard
    return slice(min(first, n_layers - 1), min(last, n_layers))


def put_batch(acts: Float[AnyArray, "l B D"], layers: slice, n_layers: int, mesh: Mesh) -> Float[Array, "L B D"]:
    """Place this process's layers of a batch on its devices, padding the layer axis with the last layer.

    Args:
        acts: activations of `layers` (as `local_layers` gave them), every row of the global batch; or all layers on the
            devices already, padded, which are returned as they are.
    """
    if isinstance(acts, jax.Array):
        return acts
    sharding = NamedSharding(mesh, BY_LAYER_AND_DATA)
    shape = (padded_layers(n_layers, mesh), *acts.shape[1:])

    def part(index: Any) -> np.ndarray:
        wanted = np.arange(*index[0].indices(shape[0])).clip(max=n_layers - 1) - layers.start
        return acts[wanted[0] : wanted[-1] + 1, index[1]] if _is_run(wanted) else acts[wanted][:, index[1]]

    return jax.make_array_from_callback(shape, sharding, part)


def fetch_batch(acts: Float[AnyArray, "L B D"], layers: slice) -> Float[np.ndarray, "l B D"]:
    """Return these layers of a batch on the host, the inverse of `put_batch`."""
    return fetch(acts)[layers] if isinstance(acts, jax.Array) else acts


def fill_rows(acts: Float[AnyArray, "L b D"], n_rows: int) -> Float[AnyArray, "L B D"]:
    """Repeat the last row of a batch until there are `n_rows`, where the batch is: on the host or on the devices."""
    xp = jnp if isinstance(acts, jax.Array) else np
    missing = n_rows - acts.shape[1]
    return xp.concatenate([acts, xp.repeat(acts[:, -1:], missing, axis=1)], axis=1) if missing else acts


def _is_run(indices: np.ndarray) -> bool:
    return bool((np.diff(indices) == 1).all())


def put_rows(weights: Float[np.ndarray, " B"], mesh: Mesh) -> Float[Array, " B"]:
    """Spread one number a row along the data axis."""
    return jax.make_array_from_callback(weights.shape, NamedSharding(mesh, BY_DATA), lambda index: weights[index])


def put_layers(tree: Any, mesh: Mesh) -> Any:
    """Spread arrays `[L, ...]` of a pytree, the same on every process, as `layer_specs` says."""

    def put(array: Any, spec: P) -> Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda i: np.asarray(array)[i])

    return jax.tree.map(put, tree, layer_specs(tree, mesh))


def pad_layers(array: Shaped[np.ndarray, "L ..."], mesh: Mesh) -> Shaped[np.ndarray, "..."]:
    """Repeat the last layer until the layer axis divides by the mesh's."""
    missing = padded_layers(array.shape[0], mesh) - array.shape[0]
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])


def gather_layers(rows: Shaped[np.ndarray, "l ..."], layers: slice, n_layers: int) -> Shaped[np.ndarray, "L ..."]:
    """Return the rows of all layers, given those of this process's `layers`."""
    if jax.process_count() == 1:
        return rows
    whole = np.zeros((n_layers, *rows.shape[1:]), rows.dtype)
    whole[layers] = rows
    present = np.isin(np.arange(n_layers), np.arange(n_layers)[layers])
    parts, owners = multihost_utils.process_allgather(whole), multihost_utils.process_allgather(present)
    return np.stack([parts[np.argmax(owners[:, layer]), layer] for layer in range(n_layers)])


def fetch(tree: Any) -> Any:
    """Return the pytree's arrays, whole, as NumPy arrays on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def sum_over_processes(numbers: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Return the sum of the arrays that the processes hold, the same on all of them; floats are rounded to float32."""
    if jax.process_count() == 1:
        return numbers
    return np.asarray(multihost_utils.process_allgather(numbers)).sum(axis=0)


def layer_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of everything that is `[L, ...]`."""
    return NamedSharding(mesh, BY_LAYER)


def global_any(flag: bool) -> bool:
    """Say whether the flag is up on any process, so that all of them stop at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(jnp.asarray(flag)).any())


def param_sharding(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, how: str) -> NamedSharding:
    """Return where a language model's parameter lies: whole on every device, or in parts over all devices.

    Where "split" finds no even parts along the axis that suits the matrix, it takes the matrix's other axis, and leaves
    it whole where that is uneven too; vectors and position tables are whole. The layer axis is never split: the scan
    over blocks would then fetch every block from its owner.

    Args:
        path: the parameter's place in the model's pytree, such as ("blocks", "mlp", "c_fc", "weight").
        shape: its axis sizes, [L, ...] inside the blocks.
        how: "replicated" or "split".

    Raises:
        InputError: `how` has another value.
    """
    if how not in PARAM_SHARDINGS:
        raise InputError(f"sharding is {how!r}; use one of {', '.join(PARAM_SHARDINGS)}")
    if how == "split" and path[-1] == "weight" and path[-2] in _SPLIT_AXES:
        preferred = _SPLIT_AXES[path[-2]]
        for axis in (preferred, -3 - preferred):
            if shape[axis] % mesh.size == 0:
                axes: list[Any] = [None] * len(shape)
                axes[axis] = mesh.axis_names
                return NamedSharding(mesh, P(*axes))
    return NamedSharding(mesh, REPLICATED)


def wait_for_all(name: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
