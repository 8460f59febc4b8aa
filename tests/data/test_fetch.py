"""Downloads, from a server in this process."""

import dataclasses
import functools
import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import threading

import pytest

from jaxsae.artifacts import InputError
from jaxsae.data import fetch

CONTENT = b'{"question": "who", "answer": ["Ann"]}\n'


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a folder, and put the cache into another; return (folder, the address of a name in it)."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield folder, lambda name: f"http://127.0.0.1:{httpd.server_port}/{name}"
    httpd.shutdown()
    httpd.server_close()


def register(monkeypatch, url, content, *, name="nq_open", member=None):
    source = fetch.Source(url, hashlib.sha256(content).hexdigest(), len(content), "MIT", member)
    monkeypatch.setitem(fetch.SOURCES, name, source)


def test_download__comes_once_and_then_from_the_cache(server, monkeypatch):
    folder, address = server
    (folder / "a.jsonl").write_bytes(CONTENT)
    register(monkeypatch, address("a.jsonl"), CONTENT)
    path = fetch.download("nq_open")
    assert path.read_bytes() == CONTENT
    (folder / "a.jsonl").unlink()
    assert fetch.download("nq_open") == path


def test_download__of_other_bytes_is_refused_and_leaves_nothing(server, monkeypatch, tmp_path):
    folder, address = server
    (folder / "a.jsonl").write_bytes(CONTENT + b"more")
    register(monkeypatch, address("a.jsonl"), CONTENT)
    expected = hashlib.sha256(CONTENT).hexdigest()
    words = rf"^{address('a.jsonl')}: .*{expected}.*; give a file of your own as questions\.path$"
    with pytest.raises(InputError, match=words):
        fetch.download("nq_open")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_download__replaces_a_damaged_file_in_the_cache(server, monkeypatch):
    folder, address = server
    (folder / "a.jsonl").write_bytes(CONTENT)
    register(monkeypatch, address("a.jsonl"), CONTENT)
    fetch.download("nq_open").write_bytes(b"damaged")
    assert fetch.download("nq_open").read_bytes() == CONTENT


def test_download__takes_a_member_out_of_an_archive(server, monkeypatch):
    folder, address = server
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in (("sets/other.json", b"other"), ("sets/dev.json", CONTENT)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (folder / "a.tar.gz").write_bytes(packed.getvalue())
    register(monkeypatch, address("a.tar.gz"), packed.getvalue(), name="triviaqa", member="sets/dev.json")
    assert fetch.download("triviaqa").read_bytes() == CONTENT


@pytest.mark.parametrize(("name", "setting"), [("nq_open", "questions"), ("squad", "corpus")])
def test_download__without_a_network_names_address_and_way_out_in_one_line(server, monkeypatch, name, setting):
    url = "http://127.0.0.1:9/a.jsonl"  # the port of the discard service, where nobody listens
    register(monkeypatch, url, CONTENT, name=name)
    words = rf"^{url} cannot be downloaded \(.*\); give a file of your own as {setting}\.path$"
    with pytest.raises(InputError, match=words) as refused:
        fetch.download(name)
    assert "\n" not in str(refused.value)


def test_download__names_what_the_server_does_not_have(server, monkeypatch):
    register(monkeypatch, server[1]("nothing"), CONTENT)
    with pytest.raises(InputError, match=r"/nothing cannot be downloaded \(404"):
        fetch.download("nq_open")


def test_download__names_what_there_is():
    with pytest.raises(InputError, match=r"'nq' is no file to download, expected one of truthfulqa, halueval"):
        fetch.download("nq")


def test_sources__have_checksum_size_and_licence():
    for source in fetch.SOURCES.values():
        assert source.url.startswith("https://")
        assert len(bytes.fromhex(source.sha256)) == 32
        assert source.n_bytes > 100_000
        assert source.licence
    assert len({dataclasses.astuple(source)[1] for source in fetch.SOURCES.values()}) == len(fetch.SOURCES)


def test_main__prints_the_path_alone(server, monkeypatch, capsys):
    folder, address = server
    (folder / "a.jsonl").write_bytes(CONTENT)
    register(monkeypatch, address("a.jsonl"), CONTENT)
    assert fetch.main(["nq_open"]) == 0
    assert capsys.readouterr().out == f"{fetch.download('nq_open')}\n"


def test_module__ends_with_2_and_one_line_for_an_unknown_name():
    ended = subprocess.run([sys.executable, "-m", "jaxsae.data.fetch", "x"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("jaxsae: 'x' is no file to download")
    assert ended.stderr.count("\n") == 1
