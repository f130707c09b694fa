"""Reading tensors out of files: slices, counting, and files that are not to be trusted."""

import json
import os
import pickle
import shutil

import pytest
import torch
from layout_samples import (
    TENSORS,
    refuse,
    write_bin,
    write_index,
    write_indexed_bin,
    write_indexed_safetensors,
    write_legacy_bin,
    write_safetensors,
)
from safetensors.torch import save_file

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.sources.open import open_source

LAYOUTS = [write_safetensors, write_indexed_safetensors, write_bin, write_legacy_bin, write_indexed_bin]


@pytest.mark.parametrize("write", LAYOUTS)
def test_slices_and_bytes(write, tmp_path):
    write(tmp_path)
    source = open_source(tmp_path)
    assert source.names() == ["a", "b", "c"]
    assert source.bytes_read == 0
    for name, tensor in TENSORS.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert torch.equal(source.read_all(name), tensor)
    read = source.bytes_read
    assert read == sum(tensor.nbytes for tensor in TENSORS.values())
    for dim, start, stop in [(0, 3, 7), (1, 0, 2), (1, 4, 5), (0, 11, 12), (0, 4, 4), (1, 5, 5)]:
        expected = TENSORS["a"].narrow(dim, start, stop - start)
        got = source.read("a", dim, start, stop)
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        read += expected.nbytes
        assert source.bytes_read == read


def test_no_weights(tmp_path):
    refuse(tmp_path, "holds no weights, neither model.safetensors nor pytorch_model.bin .*: give the folder")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_lfs_pointer(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 134\n"
    (tmp_path / name).write_text(pointer)
    refuse(tmp_path, f"{tmp_path / name} is a git-lfs pointer, not the file: run git lfs pull in its folder")


@pytest.mark.parametrize("keep", [0, 4, 40, -8])
def test_truncated_safetensors(tmp_path, keep):
    write_safetensors(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(tmp_path, f"{path} is not a whole safetensors file .* truncated or damaged, fetch it again")


def test_corrupt_safetensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not json at all." + b"\0" * 99)
    refuse(tmp_path, "is not a whole safetensors file")


def test_safetensors_dtype_without_a_torch_name(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"a in .* has dtype F8_E8M0, which is not supported"):
        open_source(tmp_path).dtype("a")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
@pytest.mark.parametrize("write", [write_bin, write_legacy_bin])
def test_truncated_bin(write, tmp_path, keep):
    write(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refuse(tmp_path, f"{path} is not a whole file of torch.save")


def test_zip_with_a_damaged_end(tmp_path):
    """Not even zipfile.is_zipfile answers for such a file."""
    write_bin(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x06\x07") + 16] = 9  # number of disks
    path.write_bytes(content)
    refuse(tmp_path, f"{path} is not a whole file of torch.save: it is truncated or damaged, fetch it again")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_not_executed(tmp_path, zipped):
    marker = tmp_path / "executed"
    torch.save(
        {"a": torch.ones(2), "b": Payload(marker)},
        tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    refuse(
        tmp_path,
        r"asks for \w+.mkdir to be called while loading: it was not loaded and nothing of it was executed",
    )
    assert not marker.exists()


@pytest.mark.parametrize("content", ["payload", "payload among tensors", "name told in memo"])
@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickle_with_code_is_not_executed(tmp_path, protocol, content, recwarn):
    marker = tmp_path / "executed"
    objects = {
        "payload": Payload(marker),
        "payload among tensors": {"a": torch.ones(2), "b": Payload(marker)},
        "name told in memo": ["mkdir", "posix", "nt", "mkdir", Payload(marker)],
    }
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(objects[content], protocol=protocol))
    # A tensor that pickle wrote asks for torch.load itself.
    called = r"torch\.storage\._load_from_bytes" if "tensors" in content else r"\w+\.mkdir"
    refuse(
        tmp_path, f"asks for {called} to be called while loading: .* nothing of it was executed; use a safe"
    )
    assert not marker.exists()
    assert not recwarn.list  # torch's, about the pickle protocol, would say nothing to a user


def test_name_in_a_pickle_does_not_reach_the_terminal_raw(tmp_path):
    content = pickle.dumps(["os\n\x1b[31m", "system"], protocol=4)[:-2] + b"\x93."  # STACK_GLOBAL
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    refuse(tmp_path, "asks for something to be called while loading")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_protocols_of_torch_save(tmp_path, protocol, zipped):
    """Whatever torch.load then says of the protocol, no code is called, and a whole file is not to be fetched again."""
    path = tmp_path / "pytorch_model.bin"
    marker = tmp_path / "executed"
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save({"a": torch.ones(2), "b": Payload(marker)}, path, **options)
    refuse(tmp_path, r"asks for \w+\.mkdir to be called while loading")
    assert not marker.exists()
    tensors = {"a": torch.randn(3, 2), "b": torch.ones(4, dtype=torch.bfloat16)}
    torch.save(tensors, path, **options)
    if protocol == 3:
        assert torch.equal(open_source(tmp_path).read_all("a"), tensors["a"])
    else:
        refuse(
            tmp_path, f"{path} cannot be read as a file of torch.save: nothing of it was executed; use a safe"
        )


@pytest.mark.parametrize(
    "content", [b"<!doctype html><title>Not found</title>", b"\x80\x04K\x01.", bytes(1000)]
)
def test_bin_that_torch_did_not_save(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    refuse(
        tmp_path, r"cannot be read as a file of torch\.save: nothing of it was executed; use a safetensors"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [torch.ones(2)],
            "holds a list, it must be a dictionary of named tensors: save the model's state_dict alone",
        ),
        (
            {"state_dict": {"a": torch.ones(2)}},
            "holds 'state_dict' of type dict, it must hold nothing but named dense tensors: save",
        ),
        ({3: torch.ones(2)}, "holds 3 of type Tensor, it must hold nothing but named dense tensors: save"),
        (
            {"a": torch.eye(3).to_sparse()},
            "holds 'a' of type Tensor, it must hold nothing but named dense tensors: save",
        ),
    ],
)
def test_bin_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    refuse(tmp_path, message)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
class TestIndex:
    @pytest.fixture
    def folder(self, kind, tmp_path):
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        (write_indexed_safetensors if kind == "safetensors" else write_indexed_bin)(folder)
        return folder

    @pytest.fixture
    def index(self, folder):
        return next(folder.glob("*.index.json"))

    @pytest.fixture
    def weight_map(self, index):
        return json.loads(index.read_text())["weight_map"]

    def test_missing_file(self, folder, weight_map):
        (folder / weight_map["b"]).unlink()
        refuse(folder, f"names {weight_map['b']}, which is missing")

    def test_outside_by_dots(self, folder, index, weight_map):
        shutil.copy(folder / weight_map["a"], folder.parent / "a")
        write_index(index, weight_map | {"a": "../a"})
        refuse(folder, "points at ../a, outside its folder")

    def test_outside_by_absolute_path(self, folder, index, weight_map):
        outside = shutil.copy(folder / weight_map["a"], folder.parent / "a")
        write_index(index, weight_map | {"a": str(outside)})
        refuse(folder, f"points at {outside}, outside its folder")

    def test_outside_by_link(self, folder, weight_map):
        outside = folder.parent / "a"
        shutil.move(folder / weight_map["a"], outside)
        (folder / weight_map["a"]).symlink_to(outside)
        refuse(folder, f"a link to {outside} outside its folder")

    def test_hub_cache_links_are_inside(self, folder, weight_map):
        snapshot = folder.parent / "models--x" / "snapshots" / "0123"
        blobs = folder.parent / "models--x" / "blobs"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for i, file in enumerate(folder.iterdir()):
            shutil.copy(file, blobs / str(i))
            (snapshot / file.name).symlink_to(blobs / str(i))
        assert open_source(snapshot).names() == ["a", "b", "c"]

    def test_tensor_not_in_its_file(self, folder, index, weight_map):
        write_index(index, weight_map | {"a": weight_map["b"]})
        refuse(folder, "index says that a is in .*, but it is not there")

    def test_tensor_not_in_any_file(self, folder, index, weight_map):
        write_index(index, weight_map | {"d": weight_map["b"]})
        refuse(folder, "index says that d is in .*, but it is not there")

    def test_tensor_not_in_the_index(self, folder, index, weight_map, kind):
        path = folder / weight_map["a"]
        both = {"a": TENSORS["a"], "z": torch.ones(1)}
        save_file(both, path) if kind == "safetensors" else torch.save(both, path)
        refuse(folder, f"{path} holds z, which the index does not list")

    def test_tensor_in_two_files(self, folder, weight_map, kind):
        path = folder / weight_map["a"]
        both = {"a": TENSORS["a"], "b": TENSORS["b"]}
        save_file(both, path) if kind == "safetensors" else torch.save(both, path)
        refuse(folder, f"b is both in {path} and in {weight_map['b']}")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not JSON"),
            ("[]", "holds a JSON list, it must be an object"),
            ("3" * 5000, "is not JSON"),
            ('{"weight_map": []}', "has no weight_map"),
            ('{"weight_map": {"a": 3}}', "has no weight_map"),
            ('{"weight_map": {}}', "lists no tensors"),
        ],
    )
    def test_damaged(self, folder, index, text, message):
        index.write_text(text)
        refuse(folder, message)
