import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsae.artifacts import InputError
from jaxsae.data import pack

BOS = 0


def _make_tokenizer(n_words=50):
    """One token a word, "w1" being id 1; BOS is id 0 and its own template would add it to every text."""
    vocabulary = {"<bos>": BOS} | {f"w{i}": i for i in range(1, n_words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<bos>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def _text(ids):
    return " ".join(f"w{i}" for i in ids)


def _pack(documents, context, n_tokens=None):
    texts = [_text(ids) for ids in documents]
    return pack(texts, _make_tokenizer(), context=context, n_tokens=n_tokens, bos_id=BOS)


def test_pack__separates_documents_and_continues_the_long_one():
    contexts = _pack([[1, 2], [3, 4, 5, 6, 7], [8, 9]], context=5)
    assert contexts.tolist() == [[BOS, 1, 2, BOS, 3], [BOS, 4, 5, 6, 7], [BOS, 8, 9, BOS, BOS]][:2]
    assert contexts.dtype == np.int32


def test_pack__puts_no_second_bos_where_a_document_ends_with_its_context():
    assert _pack([[1, 2, 3], [4, 5, 6]], context=4).tolist() == [[BOS, 1, 2, 3], [BOS, 4, 5, 6]]


def test_pack__fills_one_left_over_position_with_bos():
    assert _pack([[1, 2], [3, 4, 5]], context=4).tolist() == [[BOS, 1, 2, BOS], [BOS, 3, 4, 5]]


def test_pack__spreads_one_document_over_many_contexts():
    assert _pack([range(1, 9)], context=3).tolist() == [[BOS, 1, 2], [BOS, 3, 4], [BOS, 5, 6], [BOS, 7, 8]]


def test_pack__leaves_out_documents_without_tokens():
    assert _pack([[1], [], [2, 3]], context=5).tolist() == [[BOS, 1, BOS, 2, 3]]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 49), min_size=1, max_size=13), min_size=1, max_size=12),
    context=st.integers(2, 9),
)
def test_pack__keeps_every_token_in_order(documents, context):
    wanted = [token for document in documents for token in document]
    if sum(map(len, documents)) < context - 1:
        return
    try:
        contexts = _pack(documents, context)
    except InputError:
        assert len(wanted) + len(documents) - 1 < context - 1 or len(wanted) < context
        return
    assert (contexts[:, 0] == BOS).all()
    kept = [token for token in contexts.ravel().tolist() if token != BOS]
    assert kept == wanted[: len(kept)]
    assert len(wanted) - len(kept) < context - 1  # only a part of one context was dropped


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 49), max_size=7), max_size=12),
    context=st.integers(2, 6),
)
def test_pack__equals_a_plain_loop(documents, context):
    rows, row = [], [BOS]
    for document in documents:
        if document and len(row) > 1:
            row.append(BOS)
            if len(row) == context:
                rows, row = [*rows, row], [BOS]
        for token in document:
            row.append(token)
            if len(row) == context:
                rows, row = [*rows, row], [BOS]
    if rows:
        assert _pack(documents, context).tolist() == rows
    else:
        with pytest.raises(InputError, match=f"less than one context of {context}"):
            _pack(documents, context)


def test_pack__reads_no_further_than_n_tokens_needs():
    n_read = 0

    def documents():
        nonlocal n_read
        while True:
            n_read += 1
            yield "w1 w2 w3"

    contexts = pack(documents(), _make_tokenizer(), context=4, n_tokens=11, bos_id=BOS)
    assert contexts.shape == (2, 4)
    assert n_read <= 1024


def test_pack__returns_fewer_contexts_than_asked_where_the_corpus_ends():
    assert _pack([[1, 2, 3, 4]], context=3, n_tokens=900).shape == (2, 3)


def test_pack__takes_a_transformers_tokenizer_and_its_bos_or_eos():
    backend = _make_tokenizer()
    with_bos = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w7", eos_token="w8")
    with_eos = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w8")
    assert pack(["w1 w2"], with_bos, context=3, n_tokens=None, bos_id=None).tolist() == [[7, 1, 2]]
    assert pack(["w1 w2"], with_eos, context=3, n_tokens=None, bos_id=None).tolist() == [[8, 1, 2]]
    assert pack(["w1 w2"], with_eos, context=3, n_tokens=None, bos_id=BOS).tolist() == [[BOS, 1, 2]]


def test_pack__refuses_a_tokenizer_without_bos_and_eos():
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_make_tokenizer())
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        pack(["w1 w2"], tokenizer, context=3, n_tokens=None, bos_id=None)


def test_pack__refuses_a_corpus_of_less_than_one_context():
    with pytest.raises(InputError, match="less than one context of 9 tokens"):
        _pack([[1, 2], [3]], context=9)


def test_pack__refuses_n_tokens_below_one_context():
    with pytest.raises(InputError, match=r"corpus\.n_tokens=7 is less than one context of 8"):
        _pack([[1, 2]], context=8, n_tokens=7)


def test_pack__refuses_a_context_without_room():
    with pytest.raises(InputError, match="context is 1;"):
        _pack([[1, 2]], context=1)
