"""Files between the stages: whole or not at all, and every damage named with the way out."""

import dataclasses
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxsae import artifacts
from jaxsae.artifacts import Answer, Features, InputError

REBUILD = "run jaxsae something"


def make_answers():
    rows = [("a", (5, 6, 7), 1), ("b", (), 0), ("c", (8,), 1)]
    return [
        Answer(
            id=name,
            question=f"Where is {name}?",
            answers=("Rome", "Roma"),
            group=f"group {name}",
            category="often",
            prompt=f"Q: Where is {name}? <ü>",
            prompt_ids=(1, 2, 3, 4),
            answer="Rom" if ids else "",
            answer_ids=ids,
            label=label,
            logprobs=tuple(-0.5 * token for token in ids),
            entropies=tuple(0.25 * token for token in ids),
        )
        for name, ids, label in rows
    ]


def make_features(n=3, n_layers=2, n_positions=4, keep=5, d_model=7, dtype=np.float16):
    rng = np.random.default_rng(0)
    return Features(
        ids=tuple(f"question {i} ü" for i in range(n)),
        positions=tuple(f"position_{i}" for i in range(n_positions)),
        feature_ids=rng.integers(-1, 99, (n, n_layers, n_positions, keep)).astype(np.int32),
        activations=rng.random((n, n_layers, n_positions, keep)).astype(np.float32),
        resid=rng.normal(size=(n, n_layers, 3, d_model)).astype(dtype),
        recon_error=rng.random((n, n_layers, n_positions)).astype(np.float32),
        token_directions=rng.normal(size=(n, 2, d_model)).astype(np.float32),
        logprobs=-rng.random(2 * n).astype(np.float32),
        offsets=2 * np.arange(n + 1),
    )


def assert_equal_features(got, expected):
    for field in dataclasses.fields(Features):
        left, right = getattr(got, field.name), getattr(expected, field.name)
        if isinstance(right, tuple):
            assert left == right
        else:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right, err_msg=field.name)


def flip_byte(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def test_atomic_write__replaces_the_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    artifacts.write_text(path, "one ü\n")
    artifacts.write_text(path, "two\n")
    assert path.read_text(encoding="utf-8") == "two\n"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_write__leaves_the_old_file_when_the_block_raises(tmp_path):
    path = tmp_path / "file.txt"
    artifacts.write_text(path, "old\n")
    with pytest.raises(ZeroDivisionError), artifacts.atomic_write(path) as partial:
        partial.write_text(f"new, but not all of it: {1 // 0}")
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write__leaves_the_old_file_when_the_process_is_killed(tmp_path):
    path = tmp_path / "file.txt"
    artifacts.write_text(path, "old\n")
    script = (
        "import sys, time\nfrom jaxsae.artifacts import atomic_write\n"
        "with atomic_write(sys.argv[1]) as partial, open(partial, 'w') as file:\n"
        "    file.write('new ' * 9999)\n    file.flush()\n    print('half', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
    assert path.read_text() == "old\n"
    left = [other for other in tmp_path.iterdir() if other != path]
    assert [other.name for other in left] == [f".file.txt.{process.pid}.partial"]  # what a run's lock clears away


WRITERS = {
    "text": lambda path: artifacts.write_text(path, "text " * 5000),
    "json": lambda path: artifacts.write_json(path, {"numbers": list(range(5000))}),
    "jsonl": lambda path: artifacts.write_jsonl(path, ({"number": i} for i in range(5000))),
    "npz": lambda path: artifacts.write_npz(path, {"x": np.arange(5000)}),
    "answers": lambda path: artifacts.write_answers(path, make_answers() * 500),
    "features": lambda path: artifacts.write_features(path, make_features(n=300)),
}


def write_with_little_room(folder):
    """Call every writer in a process that may not write a file beyond 8 KiB, and print what each of them met."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    for name, write in WRITERS.items():
        path = Path(folder, name, "file")
        path.parent.mkdir()
        path.write_text("old\n")
        try:
            write(path)
        except OSError as error:
            print(name, errno.errorcode[error.errno])


def test_writers__leave_the_old_file_when_there_is_no_room_for_the_new_one(tmp_path):
    script = "import runpy, sys; runpy.run_path(sys.argv[1])['write_with_little_room'](sys.argv[2])"
    command = [sys.executable, "-c", script, __file__, str(tmp_path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert told.splitlines() == [f"{name} EFBIG" for name in WRITERS]
    for name in WRITERS:
        assert [path.name for path in (tmp_path / name).iterdir()] == ["file"]
        assert (tmp_path / name / "file").read_text() == "old\n"


def test_atomic_write__leaves_the_old_file_when_syncing_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    artifacts.write_text(path, "old\n")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        artifacts.write_text(path, "new\n")
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_json__comes_back_with_the_versions(tmp_path):
    artifacts.write_json(tmp_path / "x.json", {"name": "ü", "list": [1, 2.5, None]})
    content = artifacts.read_json(tmp_path / "x.json", rebuild=REBUILD)
    assert content["format_version"] == artifacts.FORMAT_VERSION
    assert content["code_version"]
    assert content["name"] == "ü"
    assert content["list"] == [1, 2.5, None]


def test_write_json__refuses_what_json_has_no_number_for(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.write_json(tmp_path / "x.json", {"x": float("nan")})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"format_version": 1, "x": ', r"is not readable JSON \(Expecting value.*\)"),
        (b'{"format_version": 1, "x": "\xff"}', r"is not readable JSON \(.*0xff"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b'{"format_version": 0}', "has format_version 0, this jaxsae reads 1"),
        (b'{"x": 1}', "has format_version None, this jaxsae reads 1"),
        (b"", "is not readable JSON"),
    ],
)
def test_read_json__names_file_damage_and_way_out(tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))} {words}.*; {REBUILD}$"):
        artifacts.read_json(path, rebuild=REBUILD)


def test_read_json__names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=rf"x\.json is missing; {REBUILD}$"):
        artifacts.read_json(tmp_path / "x.json", rebuild=REBUILD)


def test_jsonl__comes_back_row_by_row(tmp_path):
    path = tmp_path / "x.jsonl"
    artifacts.write_jsonl(path, ({"x": i, "line": "a\nb\u2028c"} for i in range(3)))
    with open(path, "a") as file:
        file.write("\n")  # an empty line is none
    rows = list(artifacts.read_jsonl(path))
    assert [number for number, _ in rows] == [1, 2, 3]
    assert [row["x"] for _, row in rows] == [0, 1, 2]
    assert rows[0][1]["line"] == "a\nb\u2028c"


@pytest.mark.parametrize(
    ("line", "words"),
    [(b'{"x": \n', "is not readable JSON"), (b'{"x": "\xff"}\n', "is not readable JSON"), (b"3\n", "holds a JSON int")],
)
def test_read_jsonl__names_the_line(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"x": 1}\n\n' + line)
    with pytest.raises(InputError, match=rf"x\.jsonl line 3 {words}"):
        list(artifacts.read_jsonl(path))


def test_read_jsonl__names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"x\.jsonl is missing or not a file"):
        list(artifacts.read_jsonl(tmp_path / "x.jsonl"))


def test_npz__comes_back_to_the_last_bit(tmp_path):
    arrays = {"x": np.arange(6.0).reshape(2, 3), "text": np.array(["ü", "long one"]), "none": np.zeros((0, 3), np.int8)}
    artifacts.write_npz(tmp_path / "x.npz", arrays)
    got = artifacts.read_npz(tmp_path / "x.npz", rebuild=REBUILD)
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def test_npz__holds_no_pickle(tmp_path):
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        artifacts.write_npz(tmp_path / "x.npz", {"x": np.array([object()])})
    assert not any(tmp_path.iterdir())


def test_read_npz__finds_a_flipped_byte_in_every_member(tmp_path):
    path = tmp_path / "x.npz"
    arrays = {f"x{i}": np.arange(40) + i for i in range(3)}
    artifacts.write_npz(path, arrays)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    assert len(members) == 5
    for member in members:
        name = member.filename.removesuffix(".npy")
        path.write_bytes(whole)
        flip_byte(path, member.header_offset + 30 + len(member.filename) + member.file_size - 1)
        with pytest.raises(InputError, match=rf"x\.npz is damaged at {name} \(.*\); {REBUILD}$"):
            artifacts.read_npz(path, rebuild=REBUILD)


def test_read_npz__never_takes_a_flipped_byte_for_another_number(tmp_path):
    path = tmp_path / "x.npz"
    artifacts.write_npz(path, {"x": np.arange(40)})
    whole = path.read_bytes()
    n_found = 0
    for offset in range(len(whole) // 2, len(whole)):  # the last members and the table of contents
        path.write_bytes(whole)
        flip_byte(path, offset)
        try:
            got = artifacts.read_npz(path, rebuild=REBUILD, required=["x"])
        except InputError:
            n_found += 1
        else:  # a byte that nothing depends on, such as a time stamp
            np.testing.assert_array_equal(got["x"], np.arange(40))
    assert n_found > 300


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.9, -1])
def test_read_npz__names_a_truncated_file(tmp_path, kept):
    path = tmp_path / "x.npz"
    artifacts.write_npz(path, {"x": np.arange(400)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match=rf"x\.npz is damaged at its table of contents \(.*\); {REBUILD}$"):
        artifacts.read_npz(path, rebuild=REBUILD)


def test_read_npz__names_a_missing_file_and_another_version(tmp_path):
    with pytest.raises(InputError, match=rf"x\.npz is missing; {REBUILD}$"):
        artifacts.read_npz(tmp_path / "x.npz", rebuild=REBUILD)
    np.savez(tmp_path / "x.npz", x=1)
    with pytest.raises(InputError, match=rf"has format_version None, this jaxsae reads 1; {REBUILD}$"):
        artifacts.read_npz(tmp_path / "x.npz", rebuild=REBUILD)
    np.savez(tmp_path / "x.npz", x=1, format_version=3)
    with pytest.raises(InputError, match=rf"has format_version 3, this jaxsae reads 1; {REBUILD}$"):
        artifacts.read_npz(tmp_path / "x.npz", rebuild=REBUILD)


def test_answers__come_back_equal(tmp_path):
    artifacts.write_answers(tmp_path / "answers.jsonl", make_answers())
    assert artifacts.read_answers(tmp_path / "answers.jsonl") == make_answers()


def rewrite(path, change):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[1].update(format_version=2), "has format_version 2, this jaxsae reads 1; run jaxsae answer"),
        (
            lambda rows: (rows[1].pop("label"), rows[1].pop("group")),
            "line 2 lacks group, label; run jaxsae answer --redo",
        ),
        (lambda rows: rows[2].update(id="a"), "line 3 repeats id 'a'; run jaxsae answer"),
        (lambda rows: rows[0].update(logprobs=[-1.0]), "line 1 has 1 logprobs for 3 answer ids; run jaxsae answer"),
        (lambda rows: rows[0].update(entropies=[1.0]), "line 1 has 1 entropies for 3 answer ids; run jaxsae answer"),
        (lambda rows: rows.clear(), "holds no answer; run jaxsae answer"),
    ],
)
def test_read_answers__names_line_damage_and_way_out(tmp_path, change, words):
    path = tmp_path / "answers.jsonl"
    artifacts.write_answers(path, make_answers())
    rewrite(path, change)
    with pytest.raises(InputError, match=rf"answers\.jsonl {words}$"):
        artifacts.read_answers(path)


def test_read_answers__names_a_torn_line_and_a_missing_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(InputError, match=r"answers\.jsonl is missing; run jaxsae answer$"):
        artifacts.read_answers(path)
    artifacts.write_answers(path, make_answers())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"answers\.jsonl line 3 is not readable JSON.*; run jaxsae answer$"):
        artifacts.read_answers(path)


def test_features__come_back_to_the_last_bit(tmp_path):
    path = tmp_path / "features.npz"
    artifacts.write_features(path, make_features())
    assert_equal_features(artifacts.read_features(path), make_features())
    assert list(tmp_path.iterdir()) == [path]


def test_features__at_a_position_are_its_slice():
    features = make_features()
    ids, activations = features.at("position_2")
    np.testing.assert_array_equal(ids, features.feature_ids[:, :, 2])
    np.testing.assert_array_equal(activations, features.activations[:, :, 2])
    with pytest.raises(InputError, match=r"keeps positions position_0, .*, not answer_max; add it to features\.posit"):
        features.at("answer_max")


def test_features__larger_than_the_limit_lie_in_a_tensorstore_beside(tmp_path, monkeypatch):
    path, features = tmp_path / "features.npz", make_features(n=300)
    monkeypatch.setattr(artifacts, "OVERFLOW_BYTES", features.resid.nbytes)
    artifacts.write_features(path, features)
    assert not (tmp_path / "features.resid.zarr").exists()  # not above it yet
    monkeypatch.setattr(artifacts, "OVERFLOW_BYTES", features.resid.nbytes - 1)
    artifacts.write_features(path, features)
    assert_equal_features(artifacts.read_features(path), features)
    with np.load(path) as archive:
        assert "resid" not in archive.files
    artifacts.write_features(path, dataclasses.replace(features, resid=features.resid + np.float16(1)))
    np.testing.assert_array_equal(artifacts.read_features(path).resid, features.resid + np.float16(1))


@pytest.fixture
def overflow(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "OVERFLOW_BYTES", 0)
    path = tmp_path / "features.npz"
    artifacts.write_features(path, make_features(n=300))
    chunks = sorted(file for file in (tmp_path / "features.resid.zarr" / "c").rglob("*") if file.is_file())
    assert len(chunks) == 2
    return path, chunks


def test_read_features__finds_a_flipped_byte_in_the_tensorstore(overflow):
    path, chunks = overflow
    for chunk in chunks:
        flip_byte(chunk, 1000)
        with pytest.raises(InputError, match=r"resid\.zarr is missing or damaged \(.*\); run jaxsae track --redo$"):
            artifacts.read_features(path)
        flip_byte(chunk, 1000)
    assert_equal_features(artifacts.read_features(path), make_features(n=300))


def test_read_features__misses_a_chunk_of_the_tensorstore(overflow):
    path, chunks = overflow
    chunks[1].unlink()
    with pytest.raises(InputError, match=r"resid\.zarr is missing or damaged .*; run jaxsae track --redo$"):
        artifacts.read_features(path)
    (path.with_suffix(".resid.zarr") / "zarr.json").unlink()
    with pytest.raises(InputError, match=r"resid\.zarr is missing or damaged .*; run jaxsae track --redo$"):
        artifacts.read_features(path)


def test_read_features__names_missing_arrays_and_rows(tmp_path):
    path = tmp_path / "features.npz"
    artifacts.write_features(path, make_features())
    arrays = artifacts.read_npz(path, rebuild=REBUILD)
    artifacts.write_npz(path, {name: x for name, x in arrays.items() if name not in ("offsets", "activations")})
    with pytest.raises(InputError, match=r"features\.npz lacks activations, offsets; run jaxsae track$"):
        artifacts.read_features(path)
    for name in ("feature_ids", "activations", "resid", "recon_error"):
        artifacts.write_npz(path, arrays | {name: arrays[name][:2]})
        with pytest.raises(InputError, match=rf"holds 3 ids but 2 rows of {name}; run jaxsae track$"):
            artifacts.read_features(path)


def test_sha256_file__is_that_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert artifacts.sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fingerprint__depends_on_content_and_not_on_the_order_of_keys():
    one = artifacts.fingerprint({"a": 1, "b": [1, "ü"]})
    assert one == artifacts.fingerprint({"b": [1, "ü"], "a": 1})
    assert one != artifacts.fingerprint({"a": 1, "b": ["ü", 1]})
    assert one != artifacts.fingerprint({"a": 1.5, "b": [1, "ü"]})
