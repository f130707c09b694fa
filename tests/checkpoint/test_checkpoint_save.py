"""Saving: the same bits back, whole or not at all."""

import errno
import json
import resource
import shutil

import pytest
import torch
from checkpoint_samples import (
    assert_same_bits,
    odd_config,
    random_tensors,
    read_folder,
    write_checkpoint,
    write_raw,
)
from safetensors import safe_open

from tp_mamba.checkpoint import atomic, save
from tp_mamba.checkpoint.errors import CheckpointError, CheckpointWriteError
from tp_mamba.checkpoint.replace import replacing
from tp_mamba.checkpoint.safetensors_writer import SafetensorsWriter
from tp_mamba.checkpoint.save import plan_files, save_model
from tp_mamba.config import MambaConfig
from tp_mamba.model import MambaForCausalLM


@pytest.fixture
def checkpoint(tmp_path):
    def write(**options):
        config = odd_config(**options)
        tensors = random_tensors(config)
        return write_checkpoint(tmp_path / "origin", config, tensors), tensors

    return write


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tie", [True, False])
def test_save_of_load_is_bit_equal(dtype, tie, checkpoint, tmp_path):
    folder, tensors = checkpoint(dtype=dtype, tie_word_embeddings=tie, use_bias=not tie)
    MambaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert_same_bits(read_folder(tmp_path / "saved"), tensors)
    assert MambaConfig.from_pretrained(tmp_path / "saved") == MambaConfig.from_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_raw_comes_out_as_hf(tmp_path):
    config = odd_config(vocab_size=104)
    tensors = random_tensors(config)
    write_raw(tmp_path / "raw", config, tensors, usable_vocab_size=97)
    MambaForCausalLM.from_pretrained(tmp_path / "raw").save_pretrained(tmp_path / "saved")
    assert_same_bits(read_folder(tmp_path / "saved"), tensors)
    saved = MambaConfig.from_pretrained(tmp_path / "saved")
    assert (saved.vocab_size, saved.usable_vocab_size, saved.dtype) == (104, 97, torch.float32)


def test_model_in_another_dtype(checkpoint, tmp_path):
    """bfloat16 file, float32 model: A, D and dt bias go back as they came, the rest as the model has it."""
    folder, tensors = checkpoint(dtype=torch.bfloat16)
    MambaForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    wide = {
        name: tensor if name.endswith(("A_log", ".D", "dt_proj.bias")) else tensor.float()
        for name, tensor in tensors.items()
    }
    assert_same_bits(read_folder(tmp_path / "saved"), wide)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"


def test_untrained_model_writes_float32_islands(tmp_path):
    model = MambaForCausalLM(odd_config(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    dtypes = {name.split("mixer.")[-1]: t.dtype for name, t in read_folder(tmp_path / "saved").items()}
    assert (dtypes["A_log"], dtypes["D"], dtypes["dt_proj.bias"]) == (torch.float32,) * 3
    assert dtypes["in_proj.weight"] == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_config_names_the_dtype_of_what_was_written(dtype, checkpoint, tmp_path):
    """Also after the model was converted: loading must not widen, or round, what was saved."""
    folder, _ = checkpoint()
    model = MambaForCausalLM.from_pretrained(folder).to(dtype)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    again = MambaForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, param), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        if not name.endswith((".A", ".D", "dt_proj.bias")):
            assert param.dtype == other.dtype == dtype, name
            assert torch.equal(param, other), name


def test_config_of_a_model_converted_in_part(checkpoint, tmp_path):
    """The wider dtype is named, so that loading rounds nothing."""
    model = MambaForCausalLM.from_pretrained(checkpoint()[0])
    model.lm_head.bfloat16()  # and the embedding with it, which it shares
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"
    again = MambaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.backbone.embeddings.weight, model.backbone.embeddings.weight.float())
    assert torch.equal(again.backbone.norm_f.weight, model.backbone.norm_f.weight)


@pytest.mark.parametrize("value", [0.5, float("inf")])
def test_a_that_became_positive_is_refused(value, checkpoint, tmp_path):
    folder, _ = checkpoint()
    before = contents(folder)
    model = MambaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.backbone.layers[1].mixer.A[3, 2] = value
    message = rf"backbone\.layers\.1\.mixer\.A holds {value:g}, which .*mixer\.A_log cannot stand for \(1 such in all\)"
    with pytest.raises(CheckpointError, match=message) as refusal:
        model.save_pretrained(folder)
    assert "nothing was written" in str(refusal.value)
    assert_nothing_changed(folder, before)
    with torch.no_grad():
        model.backbone.layers[1].mixer.A[3, 2] = -0.5
    model.save_pretrained(tmp_path / "saved")
    assert read_folder(tmp_path / "saved")["backbone.layers.1.mixer.A_log"][3, 2] == pytest.approx(-0.6931472)


def test_several_files_and_their_index(checkpoint, tmp_path):
    folder, tensors = checkpoint()
    limit = 6000
    save_model(MambaForCausalLM.from_pretrained(folder), tmp_path / "saved", max_shard_bytes=limit)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = [tensors[name].nbytes for name in file.keys()]  # noqa: SIM118 - not a dict
            assert sum(sizes) <= limit or len(sizes) == 1
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118
    assert_same_bits(read_folder(tmp_path / "saved"), tensors)
    MambaForCausalLM.from_pretrained(tmp_path / "saved")


def test_plan_keeps_order_and_limit():
    specs = {name: (torch.float32, (size,)) for name, size in zip("abcd", (1, 2, 9, 1), strict=True)}
    assert list(plan_files(specs, 12).values()) == [["a", "b"], ["c"], ["d"]]
    assert plan_files(specs, 10**6) == {"model.safetensors": ["a", "b", "c", "d"]}


def test_tokenizer_travels(checkpoint, tmp_path):
    folder, _ = checkpoint()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not copied")
    MambaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert sorted(contents(tmp_path / "saved")) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_replaces_an_older_checkpoint_and_its_own_origin(checkpoint):
    folder, tensors = checkpoint()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").touch()
    model = MambaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(7)
    model.save_pretrained(folder)
    assert_same_bits(read_folder(folder), tensors | {"backbone.norm_f.weight": torch.full((20,), 7.0)})
    assert sorted(contents(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["origin"]


@pytest.mark.parametrize("stranger", ["notes.txt", "runs/log.txt", "model-old.safetensors/x"])
def test_refuses_a_folder_that_is_no_checkpoint(stranger, checkpoint, tmp_path):
    model = MambaForCausalLM.from_pretrained(checkpoint()[0])
    path = tmp_path / "target" / stranger
    path.parent.mkdir(parents=True)
    path.write_text("dear")
    with pytest.raises(
        CheckpointError, match=f"holds {stranger.split('/')[0]}, which is not part of a checkpoint"
    ):
        model.save_pretrained(tmp_path / "target")
    assert path.read_text() == "dear"


def test_refuses_a_file_and_takes_an_empty_folder(checkpoint, tmp_path):
    model = MambaForCausalLM.from_pretrained(checkpoint()[0])
    (tmp_path / "file").write_text("dear")
    with pytest.raises(CheckpointError, match="file is a file: choose a folder"):
        model.save_pretrained(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    model.save_pretrained(tmp_path / "new" / "deep")
    assert contents(tmp_path / "empty") == contents(tmp_path / "new" / "deep")


def assert_nothing_changed(folder, before):
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("limit", [100, 3000, 20000])
def test_full_disk_leaves_the_old_checkpoint(limit, checkpoint):
    """A file-size limit of the operating system stands in for the disk: the write itself fails."""
    folder, _ = checkpoint()
    before = contents(folder)
    model = MambaForCausalLM.from_pretrained(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write {folder} .* nothing was changed there") as failure:
            model.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(failure.value, CheckpointWriteError)
    assert isinstance(failure.value, CheckpointError)
    assert "\n" not in str(failure.value)
    assert_nothing_changed(folder, before)


@pytest.mark.parametrize("when", ["__init__", "write", "__exit__"])
def test_no_space_at_any_moment(when, checkpoint, monkeypatch):
    folder, _ = checkpoint()
    before = contents(folder)
    model = MambaForCausalLM.from_pretrained(folder)
    whole = getattr(SafetensorsWriter, when)
    calls = []

    def fail(self, *args):
        calls.append(args)
        result = whole(self, *args)
        if len(calls) == (5 if when == "write" else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return result

    monkeypatch.setattr(SafetensorsWriter, when, fail)
    with pytest.raises(CheckpointWriteError, match=r"\(No space left on device\)"):
        model.save_pretrained(folder)
    assert_nothing_changed(folder, before)


def test_gathering_goes_on_after_a_failed_write(checkpoint, monkeypatch):
    """The other ranks wait in the gathers: rank 0 must take part in every one of them."""
    folder, tensors = checkpoint()
    model = MambaForCausalLM.from_pretrained(folder)
    gathered = []
    gather = save._gather
    monkeypatch.setattr(save, "_gather", lambda param, dtype: gathered.append(param) or gather(param, dtype))
    monkeypatch.setattr(
        SafetensorsWriter, "write", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "I/O"))
    )
    with pytest.raises(CheckpointWriteError):
        model.save_pretrained(folder)
    assert len(gathered) == len(tensors)


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_failure_while_putting_in_place(way, checkpoint, monkeypatch):
    folder, _ = checkpoint()
    before = contents(folder)
    rename = type(folder).rename

    def fail(self, target):
        if self.name.endswith(".new"):
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    if way == "exchange":
        monkeypatch.setattr(atomic, "exchange", fail)
    else:
        monkeypatch.setattr(atomic, "exchange", lambda a, b: False)
        monkeypatch.setattr(type(folder), "rename", fail)
    with pytest.raises(CheckpointWriteError, match="Permission denied"), replacing(folder) as new:
        (new / "config.json").write_text("{}")
    assert_nothing_changed(folder, before)


def test_other_errors_leave_no_trace_either(checkpoint):
    folder, _ = checkpoint()
    before = contents(folder)

    def interrupted():
        with replacing(folder) as new:
            (new / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_nothing_changed(folder, before)


def test_writer_matches_safetensors(tmp_path):
    """Mixed widths, an odd count of narrow elements, an empty tensor: aligned, and read back by the library."""
    tensors = {
        "narrow": torch.randn(3).bfloat16(),
        "wide": torch.randn(5, 2, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "view": torch.randn(6, 4).t(),
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "x.safetensors", specs) as writer:
        for name in ("wide", "empty", "view", "narrow"):
            writer.write(name, tensors[name])
    read = read_folder(tmp_path)
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )
    shutil.rmtree(tmp_path)


def test_writer_refuses_what_was_not_announced(tmp_path):
    specs = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with SafetensorsWriter(tmp_path / "x", specs) as writer:
        with pytest.raises(ValueError, match="announced is a"):
            writer.write("b", torch.ones(2))
        with pytest.raises(ValueError, match="announced is b"):
            writer.write("b", torch.ones(3))
