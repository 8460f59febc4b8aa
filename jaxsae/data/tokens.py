"""Turn documents into contexts of token ids of one length."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxsae.artifacts import InputError

_BATCH = 1024  # documents a call of the tokenizer: enough to keep its threads busy, little memory


def pack(
    documents: Iterable[str], tokenizer: Any, *, context: int, n_tokens: int | None, bos_id: int | None
) -> Int[np.ndarray, "n_contexts T"]:
    """Pack documents into int32 contexts of T = `context` token ids; position 0 of each is BOS.

    Inside a context BOS stands between documents. A document that does not fit goes on in the next context, after
    that context's BOS; where a document ends one position before the context's end, a BOS fills that position.
    Documents are tokenized in batches, without special tokens of the tokenizer's own; one that gives no token is
    left out. The last context is dropped unless it is full.

    Args:
        documents: the texts; read only as far as `n_tokens` needs.
        tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`.
        context: positions a context, BOS included, at least 2. Whether the model has so many is the caller's check.
        n_tokens: the most tokens to return, BOS included; None for all. The number of contexts is at most
            `n_tokens // context`, and smaller where the documents give fewer.
        bos_id: the id to put at position 0; None for the tokenizer's BOS id or, where it has none, its EOS id.

    Raises:
        InputError: `context` < 2; no BOS and no EOS id; `n_tokens`, or all documents together, give less than one
            context.
    """
    if context < 2:
        raise InputError(f"a context needs a BOS and at least one token more, context is {context}; set corpus.context")
    if n_tokens is not None and n_tokens < context:
        raise InputError(f"corpus.n_tokens={n_tokens} is less than one context of {context} tokens")
    bos_id = find_bos_id(tokenizer) if bos_id is None else bos_id
    limit = None if n_tokens is None else n_tokens // context
    contexts = list(itertools.islice(_fill(_encode(documents, tokenizer), context, bos_id), limit))
    if not contexts:
        raise InputError(
            f"the corpus gives less than one context of {context} tokens; add text or lower corpus.context"
        )
    return np.stack(contexts)


def find_bos_id(tokenizer: Any) -> int:
    """Return a `transformers` tokenizer's BOS id, or its EOS id where it has no BOS.

    Raises:
        InputError: it has neither.
    """
    for name in ("bos_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id is not None:
            return int(token_id)
    raise InputError("the tokenizer has neither a BOS nor an EOS token to begin a context with")


def _encode(documents: Iterable[str], tokenizer: Any) -> Iterator[Sequence[int]]:
    # transformers' own call builds a Python object a document; its backend is several times faster
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _BATCH)):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            yield encoding.ids


def _fill(encoded: Iterable[Sequence[int]], context: int, bos_id: int) -> Iterator[Int[np.ndarray, " T"]]:
    row, used = np.full(context, bos_id, np.int32), 1
    for ids in encoded:
        if not ids:
            continue
        left = np.asarray(ids, np.int32)
        if used > 1:
            used += 1  # the BOS between documents: rows begin filled with it
        while used + len(left) >= context:
            row[used:] = left[: context - used]
            left = left[context - used :]
            yield row
            row, used = np.full(context, bos_id, np.int32), 1
        row[used : used + len(left)] = left
        used += len(left)
