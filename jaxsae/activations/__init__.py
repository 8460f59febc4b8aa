"""Residual streams of every layer, on disk: from a language model and token contexts to batches of training rows.

In comes a language model (anything that offers `ResidualModel`) and packed contexts of token ids; `extract` writes them
to a store, `StoreSource` reads shuffled batches of all layers back. Reading text, running the model and training on
the rows are other folders' work.
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

__all__ = [
    "ResidualModel",
    "Store",
    "StoreMeta",
    "StoreSource",
    "check_disk",
    "create",
    "extract",
    "open",
    "required_bytes",
]
