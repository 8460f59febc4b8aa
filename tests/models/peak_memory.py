"""Read a model's weights and print what that costs in anonymous memory; a test runs this in a process of its own.

`python peak_memory.py SOURCE SHARDING` prints JSON: `peak`, bytes above what the process held before; `held`, the bytes
of the weights; `largest`, those of the largest one, or of one device's part of it where SHARDING is "split". What a
model costs beside its weights stands before the count: imports, the file's metadata, the tokenizer. What they freed
goes back to the system first, or the weights would be read into it for nothing.
"""

import ctypes
import gc
import json
import sys
import threading

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

from jaxsae import mesh as meshes  # noqa: E402 (the devices come first)
from jaxsae.models import checkpoints, weights  # noqa: E402


def anonymous_bytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def read_watched(read):
    """Return what `read` returns, and the most bytes held meanwhile above those before."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # of glibc alone
    before = highest = anonymous_bytes()
    done = threading.Event()

    def watch():
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcome = read()
    done.set()
    watcher.join()
    return outcome, highest - before


def main(source, sharding):
    mesh = meshes.make_mesh(4) if sharding == "split" else None
    jax.block_until_ready(jax.device_put(0.0))
    with checkpoints.open_checkpoint(checkpoints.locate(source)[0]) as checkpoint:
        config = weights.read_config(checkpoint)
        tokenizer = checkpoint.make_tokenizer(config.n_vocab)  # held to the end, as a loaded model does
        placed = {"dtype": "float32", "mesh": mesh, "sharding": sharding}
        params, peak = read_watched(lambda: weights.read_params(checkpoint, config, **placed))
        del tokenizer
    leaves = jax.tree.leaves(params)
    parts = [max(part.data.nbytes for part in leaf.addressable_shards) for leaf in leaves]
    held = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards)
    print(json.dumps({"peak": peak, "held": held, "largest": max(parts)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
