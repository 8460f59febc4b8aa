"""Weights of torch.save: the same numbers as torch reads, and nothing in the file is ever run."""

import json
import os
import shutil
import zipfile

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jaxsae import models
from jaxsae.artifacts import InputError
from jaxsae.models import torch_file

TABLE = torch.arange(15.0).reshape(3, 5)
STATE = {
    "whole": TABLE,
    "turned": TABLE.T,
    "part": TABLE[1:, 2:4],
    "spread": torch.ones(1, 4).expand(3, 4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "scalar": torch.tensor(3.0),
    "nothing": torch.zeros(0, 3),
    **{
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
    },
}


def rewrite(path, change, *, compression=zipfile.ZIP_STORED):
    """Write the archive anew after `change(parts)`, a dict of the bytes of its parts."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def as_torch_file(folder, n_files=1):
    """Put pytorch_model.bin, or several of them and their index, in place of a folder's safetensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if n_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-{i % n_files:05}-of-{n_files:05}.bin" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in places if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def test_read_tensors__gives_what_torch_saved_bit_for_bit(tmp_path):
    torch.save(STATE, tmp_path / "weights.bin")
    found = torch_file.read_tensors(tmp_path / "weights.bin")
    assert list(found) == list(STATE)
    for name, tensor in STATE.items():
        tensor = tensor.detach()
        is_bfloat16 = tensor.dtype == torch.bfloat16
        expected = tensor.float().numpy() if is_bfloat16 else tensor.numpy()
        np.testing.assert_array_equal(found[name].astype(np.float32) if is_bfloat16 else found[name], expected)
        assert found[name].dtype.name == str(tensor.dtype).removeprefix("torch.")


def test_read_tensors__reads_a_modules_state_dict(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))  # its versions are attributes
    torch.save(module.state_dict(), tmp_path / "weights.bin")
    found = torch_file.read_tensors(tmp_path / "weights.bin")
    assert {name: array.tolist() for name, array in found.items()} == {
        name: tensor.tolist() for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("n_files", [1, 3])
def test_load__of_torch_files_is_that_of_safetensors(write_model, n_files):
    folder, _ = write_model()
    expected = models.load(folder)
    as_torch_file(folder, n_files)
    found = models.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.fingerprint != expected.fingerprint
    if n_files > 1:
        next(folder.glob("*.bin")).unlink()
        with pytest.raises(InputError, match=r"bin\.index\.json names the shard 'pytorch_model-0000\d-of-00003\.bin'"):
            models.load(folder)


def test_load__prefers_safetensors(write_model):
    folder, _ = write_model()
    (folder / "pytorch_model.bin").write_text("not looked at")
    assert models.load(folder).n_layers == 3


def test_load__names_a_torch_tensor_of_integers(write_model):
    folder, _ = write_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].to(torch.int64)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"tensor transformer\.ln_f\.bias has dtype int64, expected one of F32"):
        models.load(folder)


def test_load__downloads_torch_files_of_a_hub_model_that_has_no_safetensors(tmp_path, write_model, monkeypatch):
    import huggingface_hub

    folder, _ = write_model()
    as_torch_file(folder)
    commit, weights, asked = "0123456789abcdef0123456789abcdef01234567", tmp_path / "weights", []
    folder.rename(tmp_path / commit)
    shutil.move(tmp_path / commit / "pytorch_model.bin", weights)

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append(revision)
        if "pytorch_model.bin" in allow_patterns:
            shutil.move(weights, tmp_path / commit / "pytorch_model.bin")
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert models.load("someone/old", revision="main").revision == commit
    assert asked == ["main", commit]


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_load__refuses_a_file_that_would_run_code_and_does_not_run_it(tmp_path, write_model):
    folder, _ = write_model()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "payload": Malicious(tmp_path / "made")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin holds the name (posix|nt)\.mkdir, which is not read"):
        models.load(folder)
    assert not (tmp_path / "made").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # what this file does to those who trust it
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"model": {"weight": TABLE}}, "dict in place of the tensor model"),
        ({"step": 3}, "int in place of the tensor step"),
        ({"rate": 0.1}, "the pickle operation BINFLOAT"),
        ([TABLE], "the pickle operation EMPTY_LIST"),
        (TABLE, "tensor in place of tensors by name"),
        ({1: TABLE}, "int in place of a tensor's name"),
        ({"x": torch.nn.Linear(1, 1)}, r"the name torch\.nn\.modules\.linear\.Linear"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, r"the name torch\.ComplexFloatStorage"),
        ({"x": TABLE.to_sparse()}, r"the name torch\._utils\._rebuild_sparse_tensor"),
        ({"x": TABLE.to(torch.complex64).conj().imag}, "a tensor that is not simply numbers"),
    ],
)
def test_read_tensors__names_what_is_no_tensor(tmp_path, stored, message):
    torch.save(stored, tmp_path / "weights.bin")
    with pytest.raises(InputError, match=rf"weights\.bin holds {message}, which is not read; convert") as caught:
        torch_file.read_tensors(tmp_path / "weights.bin")
    assert "\n" not in str(caught.value)


def test_read_tensors__names_a_file_of_an_older_torch_and_one_that_is_compressed(tmp_path):
    path = tmp_path / "weights.bin"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"weights\.bin is damaged or truncated, or of torch before 1\.6"):
        torch_file.read_tensors(path)
    torch.save(STATE, path)
    rewrite(path, lambda parts: None, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"the compressed or encrypted part weights/data\.pkl, which is not read"):
        torch_file.read_tensors(path)
    torch.save(STATE, path)
    rewrite(path, lambda parts: parts.update({"weights/byteorder": b"big"}))
    with pytest.raises(InputError, match="holds big-endian numbers, which is not read"):
        torch_file.read_tensors(path)


def test_read_tensors__never_reads_beyond_a_storage(tmp_path):
    path = tmp_path / "weights.bin"
    torch.save(STATE, path)
    rewrite(path, lambda parts: parts.update({"weights/data/0": parts["weights/data/0"][:-4]}))
    with pytest.raises(InputError, match=r"damaged .*tensor whole has 56 bytes of 60"):
        torch_file.read_tensors(path)
    torch.save({"x": TABLE}, path)
    wider = (b"K\x03K\x05\x86", b"K\x03K\x06\x86")  # 6 columns, 5 apart: the last ends beyond the bytes
    rewrite(path, lambda parts: parts.update({"weights/data.pkl": parts["weights/data.pkl"].replace(*wider)}))
    with pytest.raises(InputError, match=r"weights\.bin is damaged"):
        torch_file.read_tensors(path)


@pytest.mark.parametrize("keep", [0, 5, 300, -1, -200])
def test_load__names_a_truncated_torch_file(write_model, keep):
    folder, _ = write_model()
    as_torch_file(folder)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"pytorch_model\.bin is damaged or truncated") as caught:
        models.load(folder)
    assert "\n" not in str(caught.value)


def test_read_tensors__names_any_damage_to_the_program(tmp_path):
    path, messages = tmp_path / "weights.bin", []
    torch.save({"a": TABLE, "b": TABLE.T, "c": torch.nn.Parameter(torch.ones(2))}, path)
    with zipfile.ZipFile(path) as archive:
        program = archive.read("weights/data.pkl")
    for at in range(len(program)):
        broken = bytearray(program)
        broken[at] ^= 1 << at % 7
        rewrite(path, lambda parts, broken=broken: parts.update({"weights/data.pkl": bytes(broken)}))
        try:
            torch_file.read_tensors(path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > len(program) / 2
    assert not any("\n" in message for message in messages)
