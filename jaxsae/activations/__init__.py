"""Residual streams of every layer, on disk or live: from a language model and token contexts to training rows.

In comes a language model and packed contexts of token ids. Either `extract` writes the rows of all layers to a store
and `StoreSource` reads shuffled batches back, or `StreamSource` computes them when they are needed, on the devices.
Reading text, the model itself and training on the rows are other folders' work.
"""

from jaxsae.activations.extract import ResidualModel, extract
from jaxsae.activations.source import StoreSource
from jaxsae.activations.store import (
    Store,
    StoreMeta,
    check_disk,
    create,
    open,
    required_bytes,
)
from jaxsae.activations.stream import StreamSource
from jaxsae.activations.stream_plan import StreamSizes, size_stream

__all__ = [
    "ResidualModel",
    "Store",
    "StoreMeta",
    "StoreSource",
    "StreamSizes",
    "StreamSource",
    "check_disk",
    "create",
    "extract",
    "open",
    "required_bytes",
    "size_stream",
]
