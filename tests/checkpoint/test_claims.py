"""Sizes that a file claims are held against the file before any work in proportion to them."""

import json
import re
import resource
import zipfile

import pytest
import torch
from layout_samples import refuse, write_bin, write_legacy_bin

from tp_mamba.checkpoint.sources.open import open_source

GIB = 2**30


@pytest.fixture(autouse=True)
def little_memory():
    """No test here may allocate what a file only claims."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_length_of_a_safetensors_header(length, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    refuse(tmp_path, "is not a whole safetensors file .* truncated or damaged, fetch it again")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [2**60, 2**60 + 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "\x1b[31m", "shape": [1], "data_offsets": [0, 4]},
    ],
)
def test_sizes_in_a_safetensors_header(entry, tmp_path):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refuse(tmp_path, "is not a whole safetensors file")


def test_deep_safetensors_header(tmp_path):
    header = b"[" * 10**6
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refuse(tmp_path, "is not a whole safetensors file")


def test_a_tensor_larger_than_its_bin_file(tmp_path):
    """Many numbers from the memory of one: what torch.save writes of an expanded tensor."""
    torch.save({"a": torch.ones(1).expand(2**40)}, tmp_path / "pytorch_model.bin")
    refuse(
        tmp_path,
        r"of \d+ bytes claims that a has shape \[1099511627776\], more than it can hold: it is damaged",
    )


def test_tensors_that_share_their_memory_are_read(tmp_path):
    a = torch.arange(6.0)
    torch.save({"a": a, "b": a, "c": a[2:]}, tmp_path / "pytorch_model.bin")
    assert torch.equal(open_source(tmp_path).read_all("c"), a[2:])


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_packed_zip(member, tmp_path):
    """Which would become a thousand times as large."""
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"archive/{member}", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(2**20))
        archive.writestr("archive/version", "3")
    refuse(tmp_path, "is a packed zip file, and torch.save packs nothing: unpack the checkpoint out of it")


@pytest.mark.parametrize("write", [write_bin, write_legacy_bin])
def test_numbers_in_a_pickle(write, tmp_path):
    """The count of a storage, patched into the pickle: 60 numbers become 2 ** 31 - 1."""
    write(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    content = re.sub(rb"K<(?=N?t)", lambda found: b"J\xff\xff\xff\x7f", path.read_bytes())
    assert content != path.read_bytes()
    path.write_bytes(content)
    refuse(tmp_path, "pytorch_model.bin ")


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"a",  # a text of 2 ** 40 characters
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"a",
        b"\x80\x02\x8b" + (2**30).to_bytes(4, "little") + b"a",  # a number of 2 ** 30 bytes
        b"\x80\x02" + b"(" * 10**6,
    ],
)
def test_lengths_in_a_bare_pickle(pickled, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickled)
    refuse(tmp_path, r"cannot be read as a file of torch\.save|is not a whole file of torch\.save")
