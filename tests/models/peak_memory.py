"""Load a model and print what it costs in anonymous memory, for a test that runs this in a process of its own.

`python peak_memory.py SOURCE SHARDING` prints JSON: `peak`, bytes above what the process held before; `held`, the bytes
of the weights; `largest`, those of the largest one, or of one device's part of it where SHARDING is "split".
"""

import json
import sys
import threading

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

from jaxsae import mesh as meshes  # noqa: E402 (the devices come first)
from jaxsae import models  # noqa: E402


def anonymous_bytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def main(source, sharding):
    mesh = meshes.make_mesh(4) if sharding == "split" else None
    jax.block_until_ready(jax.device_put(0.0))
    before = highest = anonymous_bytes()
    done = threading.Event()

    def watch():
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    lm = models.load(source, mesh=mesh, sharding=sharding)
    done.set()
    watcher.join()
    leaves = jax.tree.leaves(lm.params)
    parts = [max(part.data.nbytes for part in leaf.addressable_shards) for leaf in leaves]
    held = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards)
    print(json.dumps({"peak": highest - before, "held": held, "largest": max(parts)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
