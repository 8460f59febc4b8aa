import bz2
import gzip
import json
import lzma
import sys
import types

import pytest

from jaxsae.artifacts import InputError, resolve_path
from jaxsae.data import read_dataset, read_documents

TEXTS = ["The first document.", "Zweites: ÄÖÜ «ß»", "third 文書 \\n not a line feed"]


def _write_txt(path, texts=TEXTS, open_file=open):
    with open_file(path, "wb") as file:
        file.write("\n".join(texts).encode() + b"\n")
    return path


def _write_jsonl(path, texts=TEXTS, open_file=open):
    with open_file(path, "wb") as file:
        file.writelines(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))
    return path


@pytest.mark.parametrize("write", [_write_txt, _write_jsonl])
@pytest.mark.parametrize(("packing", "open_file"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_read_documents__gives_the_same_texts_from_every_format(tmp_path, write, packing, open_file):
    kind = write.__name__.removeprefix("_write_")
    path = write(tmp_path / f"corpus.{kind}{packing}", open_file=open_file)
    assert list(read_documents(path)) == TEXTS
    assert list(read_documents(str(path))) == TEXTS


def test_read_documents__keeps_line_breaks_inside_a_jsonl_text(tmp_path):
    assert list(read_documents(_write_jsonl(tmp_path / "c.jsonl", ["one\ntwo\r\n"]))) == ["one\ntwo\r\n"]


def test_read_documents__reads_a_folders_corpus_files_in_sorted_order(tmp_path):
    _write_txt(tmp_path / "b.txt", ["from b"])
    _write_jsonl(tmp_path / "a.jsonl.xz", ["from a"], lzma.open)
    _write_txt(tmp_path / "README.md", ["not a corpus"])
    (tmp_path / "c.txt").mkdir()
    assert list(read_documents(tmp_path)) == ["from a", "from b"]


def test_read_documents__drops_carriage_returns_the_byte_order_mark_and_blank_lines(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfone \r\n\r\n \t\n\ntwo\rstill two")
    assert list(read_documents(tmp_path / "c.txt")) == ["one ", "two\rstill two"]


def test_read_documents__reads_from_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "some_pkg" / "texts").mkdir(parents=True)
    (tmp_path / "some_pkg" / "__init__.py").touch()
    _write_txt(tmp_path / "some_pkg" / "texts" / "c.txt")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(read_documents("package://some_pkg/texts/c.txt")) == TEXTS
    assert resolve_path("package://some_pkg/texts").is_dir()
    with pytest.raises(InputError, match=r"package some_pkg has no 'texts/other\.txt'"):
        resolve_path("package://some_pkg/texts/other.txt")


@pytest.mark.parametrize("text", ["package://no_such_pkg/x", "package:///x", "package://"])
def test_resolve_path__names_a_package_that_is_not_installed(text):
    with pytest.raises(InputError, match=rf"{text}: no package '.*' is installed here"):
        resolve_path(text)


def test_resolve_path__refuses_a_package_that_is_no_folder(tmp_path, monkeypatch):
    import zipfile

    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("zipped_pkg/__init__.py", "")
    monkeypatch.syspath_prepend(tmp_path / "zipped.zip")
    with pytest.raises(InputError, match="no package 'zipped_pkg' is installed here as a folder"):
        resolve_path("package://zipped_pkg/x")


def test_read_documents__names_a_missing_path_before_it_is_read(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt does not exist"):
        read_documents(tmp_path / "nowhere.txt")


def test_read_documents__names_an_unknown_ending(tmp_path):
    with bz2.open(tmp_path / "c.txt.bz2", "wb") as file:
        file.write(b"text")
    with pytest.raises(InputError, match=r"c\.txt\.bz2 does not end in one of \.txt"):
        read_documents(tmp_path / "c.txt.bz2")


def test_read_documents__names_a_folder_without_corpus_files(tmp_path):
    (tmp_path / "c.md").write_text("x")
    with pytest.raises(InputError, match=f"{tmp_path.name} holds no file that ends in one of"):
        read_documents(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_read_documents__refuses_an_empty_corpus(tmp_path, content):
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"c\.txt holds no document"):
        list(read_documents(tmp_path / "c.txt"))


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_read_documents__names_the_line_of_invalid_utf8(tmp_path, kind):
    (tmp_path / f"c.{kind}").write_bytes(b'{"text": "fine"}\n{"text": "b\xffd"}\n')
    documents = read_documents(tmp_path / f"c.{kind}")
    next(documents)
    with pytest.raises(InputError, match=rf"c\.{kind} line 2 is not valid UTF-8 \(byte 0xff at column 12\)"):
        next(documents)


@pytest.mark.parametrize(("packing", "open_file"), [("gz", gzip.open), ("xz", lzma.open)])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "another format"])
def test_read_documents__names_a_damaged_packed_file(tmp_path, packing, open_file, damage):
    path = _write_txt(tmp_path / f"c.txt.{packing}", [f"document {i} {i**5}" for i in range(5000)], open_file)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray(b"plain text")
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"c\.txt\.{packing} (cannot be read after line \d+|line \d+ is not valid)"):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2 is not JSON"),
        ('["text"]', 'line 2: expected an object with a non-empty string "text"'),
        ('{"txt": "x"}', 'line 2: expected an object with a non-empty string "text"'),
        ('{"text": 3}', 'line 2: expected an object with a non-empty string "text", got {"text": 3}'),
        ('{"text": " "}', 'line 2: expected an object with a non-empty string "text"'),
    ],
)
def test_read_documents__names_a_jsonl_line_without_a_text(tmp_path, line, message):
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(InputError, match=message):
        list(read_documents(tmp_path / "c.jsonl"))


def test_read_dataset__names_the_extra_where_datasets_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"dataset some/set needs .* pip install jaxsae\[data\]"):
        read_dataset("some/set")


def _fake_datasets(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_read_dataset__streams_one_column_of_the_split(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"body": "one", "x": 1}, {"body": "  ", "x": 2}, {"body": "two\nlines", "x": 3}])

    _fake_datasets(monkeypatch, load_dataset)
    assert list(read_dataset("wiki:raw-v1", split="test", field="body")) == ["one", "two\nlines"]
    assert list(read_dataset("wiki", field="body")) == ["one", "two\nlines"]
    assert calls == [
        (("wiki", "raw-v1"), {"split": "test", "streaming": True}),
        (("wiki", None), {"split": "train", "streaming": True}),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "x"}, {"title": "y"}],
            "dataset wiki .split train. row 2 has no text in 'text'; its columns are title",
        ),
        ([{"text": None}], "row 1 has no text in 'text'"),
        ([{"text": " "}], "dataset wiki .split train. holds no document"),
        ([], "holds no document"),
    ],
)
def test_read_dataset__names_rows_without_text(monkeypatch, rows, message):
    _fake_datasets(monkeypatch, lambda *args, **kwargs: iter(rows))
    with pytest.raises(InputError, match=message):
        list(read_dataset("wiki"))


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError, ConnectionError])
def test_read_dataset__names_a_dataset_that_cannot_be_opened(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error("no such thing on the hub\nmore lines")

    _fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(InputError, match=r"dataset wiki \(split dev\) cannot be opened: no such thing on the hub$"):
        read_dataset("wiki", split="dev")


def test_read_documents__reads_an_article_of_squads_layout_as_one_document(tmp_path):
    def article(*texts):
        return {"title": "x", "paragraphs": [{"context": text, "qas": []} for text in texts]}

    articles = {"data": [article("First  one.\nStill.", "Second."), article(" "), article("Ä.")], "version": "1.1"}
    (tmp_path / "squad.json").write_text(json.dumps(articles))
    assert list(read_documents(tmp_path / "squad.json")) == ["First one. Still.\nSecond.", "Ä."]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"data": [', r"squad\.json is not readable JSON: .*; expected SQuAD's layout"),
        ('{"rows": []}', r"squad\.json has another layout \(KeyError\('data'\)\); expected SQuAD's layout"),
        ("[1]", r"squad\.json has another layout \(TypeError"),
        ('{"data": [{"paragraphs": [{"context": 3}]}]}', r"squad\.json article 1 has a context that is no text"),
        ('{"data": []}', r"squad\.json holds no document"),
    ],
)
def test_read_documents__names_a_json_file_of_another_layout(tmp_path, content, words):
    (tmp_path / "squad.json").write_text(content)
    with pytest.raises(InputError, match=words):
        list(read_documents(tmp_path / "squad.json"))
