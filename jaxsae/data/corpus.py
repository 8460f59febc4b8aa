"""Read a corpus as a stream of documents, from files or from a Hugging Face dataset.

A .txt file holds one document a line, a .jsonl file one object a line with the document in its field "text"; each may
end in .gz or .xz. Lines end at a line feed; a carriage return before it goes with it, a byte order mark before the
first is dropped, and lines of white space alone hold no document. A .json file is one in SQuAD's layout: an article a
document, its paragraphs one a line.
"""

import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from jaxsae.artifacts import InputError, resolve_path

_SUFFIXES = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".xz"))
_ARTICLES = ".json"  # not looked for in folders, which may hold other .json files


def read_documents(path: str | os.PathLike) -> Iterator[str]:
    """Yield the documents of a file, or of a folder's corpus files in sorted order, one file after the other.

    Args:
        path: a .txt or .jsonl file, plain, .gz or .xz; or a folder, of which the files that end so are read, without
            its subfolders; or a .json file in SQuAD's layout; or "package://PACKAGE/PATH".

    Raises:
        InputError: at once, if the path is missing, has another ending, or a folder holds no corpus file; while
            reading, if a file cannot be read, is truncated or damaged, holds invalid UTF-8 or a line without a text
            (file and line named), or if there is no document at all.
    """
    path = resolve_path(path)
    return _read_files(path, _find_files(path))


def read_dataset(name: str, *, split: str = "train", field: str = "text") -> Iterator[str]:
    """Yield the documents of a Hugging Face dataset, streamed; rows whose text is only white space are left out.

    Args:
        name: the dataset's name, or "NAME:CONFIGURATION", as "wikitext:wikitext-103-raw-v1".
        split: its split.
        field: the column with the text.

    Raises:
        InputError: at once, if the package `datasets` is missing or it cannot open the dataset; while reading, if a
            row has no text in `field` or there is no document at all.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"reading the dataset {name} needs the package datasets; pip install jaxsae[data], or give a file as "
            "corpus.path"
        ) from None
    name, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(f"the dataset {name} (split {split}) cannot be opened: {first_line}") from None
    return _read_rows(rows, f"the dataset {name} (split {split})", field)


def _read_rows(rows, source: str, field: str) -> Iterator[str]:
    is_empty = True
    for number, row in enumerate(rows, start=1):
        text = row.get(field)
        if not isinstance(text, str):
            raise InputError(f"{source} row {number} has no text in {field!r}; its columns are {', '.join(row)}")
        if text.strip():
            is_empty = False
            yield text
    if is_empty:
        raise InputError(f"{source} holds no document: every {field!r} is empty")


def _find_files(path: Path) -> list[Path]:
    endings = " ".join(_SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES) and file.is_file())
        if not files:
            raise InputError(f"the corpus folder {path} holds no file that ends in one of {endings}")
        return files
    if not path.is_file():
        raise InputError(f"the corpus {path} does not exist")
    if not path.name.endswith((*_SUFFIXES, _ARTICLES)):
        raise InputError(f"the corpus {path} does not end in one of {endings} {_ARTICLES}")
    return [path]


def _read_files(path: Path, files: list[Path]) -> Iterator[str]:
    is_empty = True
    for file in files:
        for document in _read_articles(file) if file.suffix == _ARTICLES else _read_file(file):
            is_empty = False
            yield document
    if is_empty:
        raise InputError(f"the corpus {path} holds no document: every line is empty")


def _read_file(path: Path) -> Iterator[str]:
    for number, line in _read_lines(path):
        yield _read_text_field(path, number, line) if ".jsonl" in path.suffixes else line


def _read_articles(path: Path) -> Iterator[str]:
    expected = "expected SQuAD's layout, {data: [{paragraphs: [{context: TEXT}]}]}"
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
        articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in content["data"]]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}; {expected}") from None
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} has another layout ({error!r}); {expected}") from None
    for number, paragraphs in enumerate(articles, start=1):
        if not all(isinstance(paragraph, str) for paragraph in paragraphs):
            raise InputError(f"{path} article {number} has a context that is no text; {expected}")
        lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
        if any(lines):
            yield "\n".join(line for line in lines if line)


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return open(path, "rb")


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
                text = text.removeprefix("\ufeff") if number == 1 else text
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} line {number} is not valid UTF-8 (byte 0x{error.object[error.start]:02x} at column "
            f"{error.start + 1}); convert the file to UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path} cannot be read after line {number}: {error}") from None


def _read_text_field(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {number} is not JSON: {error}") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{path} line {number}: expected an object with a non-empty string "text", got {line[:80]}')
    return text
