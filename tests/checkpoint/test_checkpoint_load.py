"""Loading: the right bits on every rank, only the needed bytes, and strictness both ways."""

import json
import shutil

import pytest
import torch
from checkpoint_samples import (
    assert_same_bits,
    load_ranks,
    merged,
    odd_config,
    random_tensors,
    write_checkpoint,
    write_indexed,
    write_raw,
)
from safetensors.torch import load_file, save_file

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.load import load_mixer, load_mixer_rank, load_model, load_rank
from tp_mamba.checkpoint.matching import compare
from tp_mamba.checkpoint.sources.open import open_source
from tp_mamba.config import MambaConfig
from tp_mamba.model import MambaForCausalLM, build_mixer
from tp_mamba.models import MAMBA
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import sharded_tensors

UNTIED = {"tie_word_embeddings": False, "use_bias": True}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("write", [write_checkpoint, write_indexed])
@pytest.mark.parametrize("options", [{}, UNTIED], ids=["tied", "untied"])
def test_every_rank_gets_its_bits(write, options, n, tmp_path):
    config = odd_config(**options)
    tensors = random_tensors(config)
    models, _ = load_ranks(write(tmp_path, config, tensors), n)
    assert_same_bits(merged(models), tensors)
    for rank, model in enumerate(models):
        for tensor in sharded_tensors(model):
            local = tensor.shard.shard(tensors[tensor.name], rank, n)
            assert torch.equal(tensor.read(), local), tensor.name  # padding is zero, too


@pytest.mark.parametrize("n", [1, 4])
def test_raw_layout(n, tmp_path):
    config = odd_config(vocab_size=104)
    tensors = random_tensors(config)
    models, _ = load_ranks(write_raw(tmp_path, config, tensors, usable_vocab_size=97), n)
    assert_same_bits(merged(models), tensors)
    assert models[0].config.usable_vocab_size == 97


def test_prefix_of_other_exports(tmp_path):
    config = odd_config()
    tensors = random_tensors(config)
    renamed = {name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}
    assert_same_bits(merged(load_ranks(write_checkpoint(tmp_path, config, renamed), 2)[0]), tensors)


@pytest.mark.parametrize("tie", [True, False])
def test_bytes_read_at_four_ranks(tie, tmp_path):
    config = odd_config(hidden_size=64, intermediate_size=128, vocab_size=400, tie_word_embeddings=tie)
    tensors = random_tensors(config)
    models, read = load_ranks(write_indexed(tmp_path, config, tensors), 4)
    splits = {tensor.name: tensor.shard for tensor in sharded_tensors(models[0])}
    share = sum(t.nbytes / 4 if splits[name].dim is not None else t.nbytes for name, t in tensors.items())
    assert share < 0.3 * sum(t.nbytes for t in tensors.values())
    for bytes_read in read:
        assert share * 0.99 <= bytes_read <= share * 1.05


def test_a_d_and_dt_bias_skip_the_models_dtype(tmp_path):
    """float32 values that bfloat16 cannot hold arrive whole in a bfloat16 model."""
    config = odd_config()
    tensors = random_tensors(config)
    (model,), _ = load_ranks(write_checkpoint(tmp_path, config, tensors), 1, dtype=torch.bfloat16)
    mixer = model.mixers()[0]
    prefix = "backbone.layers.0.mixer"
    assert torch.equal(mixer.A, -torch.exp(tensors[f"{prefix}.A_log"]))
    assert torch.equal(mixer.D, tensors[f"{prefix}.D"])
    assert torch.equal(mixer.dt_proj.bias, tensors[f"{prefix}.dt_proj.bias"])
    assert torch.equal(mixer.in_proj.weight, tensors[f"{prefix}.in_proj.weight"].bfloat16())
    assert not torch.equal(mixer.D, mixer.D.bfloat16().float())  # else this could not fail


def test_checkpoint_dtype_is_remembered(tmp_path):
    config = odd_config(dtype=torch.bfloat16)
    (model,), _ = load_ranks(
        write_checkpoint(tmp_path, config, random_tensors(config)), 1, dtype=torch.float32
    )
    assert {tensor.file_dtype for tensor in sharded_tensors(model)} == {torch.bfloat16}


def test_float64_model(tmp_path):
    config = odd_config(dtype=torch.float64)
    tensors = random_tensors(config)
    tensors = {name: tensor + 1e-12 for name, tensor in tensors.items()}
    models, _ = load_ranks(write_checkpoint(tmp_path, config, tensors), 3)
    assert_same_bits(merged(models), tensors)


def test_progress_ends_at_the_total(tmp_path):
    config = odd_config()
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    calls = []
    model = MambaForCausalLM(config, tp=TensorParallel.virtual(1, 4))
    source = load_rank(model, folder, lambda what, done, total: calls.append((what, done, total)))
    assert calls[-1] == ("loading weights", source.bytes_read, source.bytes_read)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


@pytest.fixture
def damaged(tmp_path):
    """A function that writes a checkpoint with some tensors replaced (None: left out)."""

    def write(changes, **options):
        config = odd_config(**options)
        tensors = {k: v for k, v in (random_tensors(config) | changes).items() if v is not None}
        return write_checkpoint(tmp_path, config, tensors)

    return write


def refuse(folder, message, n=1):
    model = MambaForCausalLM(MambaConfig.from_pretrained(folder), tp=TensorParallel.virtual(0, n))
    before = {name: param.clone() for name, param in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_rank(model, folder)
    assert "\n" not in str(refusal.value)
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]), f"{name} was loaded before the refusal"


MIXER = "backbone.layers.1.mixer"


def test_missing_tensor(damaged):
    refuse(damaged({f"{MIXER}.D": None}), rf"the checkpoint lacks {MIXER}\.D, which")


def test_missing_tensors_are_counted(damaged):
    refuse(
        damaged({f"{MIXER}.D": None, f"{MIXER}.A_log": None}),
        "and 1 more tensors, which its config.json asks",
    )


def test_missing_untied_head(damaged):
    refuse(damaged({"lm_head.weight": None}, **UNTIED), r"the checkpoint lacks lm_head\.weight")


def test_unknown_tensor(damaged):
    refuse(damaged({f"{MIXER}.gate": torch.ones(3)}), rf"the checkpoint holds {MIXER}\.gate, which")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (f"{MIXER}.A_log", (30,), r"\[30, 5\]"),  # as in Mamba-2
        (f"{MIXER}.in_proj.weight", (30, 20), r"\[60, 20\]"),
        ("backbone.embeddings.weight", (96, 20), r"\[97, 20\]"),
    ],
)
def test_misshapen_tensor(damaged, name, shape, expected):
    refuse(
        damaged({name: torch.ones(shape)}), rf"{name} has shape \[.*\], config.json asks for {expected}", n=2
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_wrong_dtype(damaged, dtype):
    tensor = torch.ones(20, 30).to(dtype)
    short = str(dtype).removeprefix("torch.")
    refuse(
        damaged({f"{MIXER}.out_proj.weight": tensor}),
        rf"out_proj\.weight has dtype {short}, supported are float32",
    )


def test_one_tensor_under_two_names(damaged):
    two = {"backbone.embedding.weight": torch.ones(97, 20)}
    refuse(damaged(two), r"holds both backbone\.embedding\.weight and backbone\.embeddings\.weight")


def test_every_difference_is_reported(damaged):
    changes = {f"{MIXER}.D": None, f"{MIXER}.A_log": None, f"{MIXER}.gate": torch.ones(3)}
    changes |= {
        "backbone.norm_f.weight": torch.ones(19, dtype=torch.int8),
        "model.norm_f.weight": torch.ones(20),
    }
    changes |= {
        "lm_head.weight": torch.ones(96, 20),
        f"{MIXER}.dt_proj.bias": torch.ones(30, dtype=torch.int64),
    }
    folder = damaged(changes)
    model = MambaForCausalLM(MambaConfig.from_pretrained(folder), device="meta")
    comparison = compare(sharded_tensors(model), open_source(folder), MAMBA)
    assert comparison.duplicate == [("backbone.norm_f.weight", "model.norm_f.weight")]
    assert set(comparison.missing) == {f"{MIXER}.D", f"{MIXER}.A_log"}
    assert comparison.unknown == [f"{MIXER}.gate"]
    assert set(comparison.misshapen) == {"backbone.norm_f.weight", "lm_head.weight"}
    assert set(comparison.wrong_dtype) == {"backbone.norm_f.weight", f"{MIXER}.dt_proj.bias"}
    assert comparison.matching.tied_copy == "lm_head.weight"
    refuse(folder, r"holds both backbone\.norm_f\.weight and model\.norm_f\.weight")


def test_nothing_differs(damaged):
    folder = damaged({})
    model = MambaForCausalLM(MambaConfig.from_pretrained(folder), device="meta")
    comparison = compare(sharded_tensors(model), open_source(folder), MAMBA)
    assert comparison.refusal is None
    assert not any(getattr(comparison, kind) for kind in ("duplicate", "missing", "unknown", "misshapen"))
    assert not comparison.wrong_dtype


def test_tied_head_that_equals_the_embedding(damaged):
    embedding = random_tensors(odd_config())["backbone.embeddings.weight"]
    folder = damaged({"lm_head.weight": embedding.clone()})
    models, _ = load_ranks(folder, 4)
    assert all(model.lm_head.weight is model.backbone.embeddings.weight for model in models)
    assert torch.equal(merged(models)["backbone.embeddings.weight"], embedding)


def test_tied_head_alone_is_the_embedding(damaged):
    head = torch.randn(97, 20)
    models, _ = load_ranks(damaged({"lm_head.weight": head, "backbone.embeddings.weight": None}), 2)
    assert torch.equal(merged(models)["backbone.embeddings.weight"], head)


def test_tied_head_that_differs(damaged):
    head = random_tensors(odd_config())["backbone.embeddings.weight"].clone()
    head[3, 4] = head[3, 4].nextafter(torch.tensor(9.0))
    refuse(damaged({"lm_head.weight": head}), "lm_head.weight differs from backbone.embeddings.weight", n=2)


def test_load_model_on_one_rank_raises_the_same(damaged):
    folder = damaged({f"{MIXER}.D": None})
    with pytest.raises(CheckpointError, match="the checkpoint lacks"):
        load_model(MambaForCausalLM(MambaConfig.from_pretrained(folder)), folder)


def test_from_pretrained_remembers_its_folder(tmp_path):
    config = odd_config(dtype=torch.bfloat16)
    model = MambaForCausalLM.from_pretrained(write_checkpoint(tmp_path, config, random_tensors(config)))
    assert model.dtype is torch.bfloat16
    assert model.checkpoint_folder == tmp_path


class TestMixer:
    @pytest.mark.parametrize("prefix", ["backbone.layers.1.mixer", "model.layers.1.mixer"])
    @pytest.mark.parametrize("n", [1, 4])
    def test_mamba(self, prefix, n, tmp_path):
        config = odd_config()
        tensors = random_tensors(config)
        write_checkpoint(tmp_path, config, tensors)
        for rank in range(n):
            mixer = build_mixer(config, tp=TensorParallel.virtual(rank, n), dtype=torch.float32)
            load_mixer_rank(mixer, tmp_path, prefix)
            for tensor in sharded_tensors(mixer):
                full = tensors[f"backbone.layers.1.mixer.{tensor.name}"]
                assert torch.equal(tensor.read(), tensor.shard.shard(full, rank, n)), tensor.name

    @pytest.fixture
    def jamba(self, tmp_path):
        config = odd_config(model_type="jamba", mixer_norm="weighted", intermediate_size=40)
        mixer = build_mixer(config, dtype=torch.float32)
        shapes = {tensor.name: tensor.shard.shape for tensor in sharded_tensors(mixer)}
        assert {"dt_layernorm.weight", "b_layernorm.weight", "c_layernorm.weight"} <= set(shapes)
        tensors = {f"model.layers.3.mamba.{name}": torch.randn(shape) for name, shape in shapes.items()}
        others = {
            "model.layers.3.input_layernorm.weight": torch.ones(20),
            "model.embed_tokens.weight": torch.ones(9, 20),
        }
        save_file(tensors | others, tmp_path / "model.safetensors")
        return config, mixer, tensors

    def test_jamba(self, jamba, tmp_path):
        _, mixer, tensors = jamba
        load_mixer(mixer, tmp_path, "model.layers.3.mamba")
        for tensor in sharded_tensors(mixer):
            full = tensors[f"model.layers.3.mamba.{tensor.name}"]
            assert torch.equal(tensor.read(), full), tensor.name

    def test_nothing_under_the_prefix(self, jamba, tmp_path):
        with pytest.raises(CheckpointError, match=r"holds no tensor under model\.layers\.4\.mamba"):
            load_mixer(jamba[1], tmp_path, "model.layers.4.mamba")

    def test_strict_under_the_prefix(self, jamba, tmp_path):
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {"model.layers.3.mamba.more": torch.ones(1)}, path)
        with pytest.raises(CheckpointError, match=r"holds model\.layers\.3\.mamba\.more, which"):
            load_mixer(jamba[1], tmp_path, "model.layers.3.mamba")
        tensors.pop("model.layers.3.mamba.b_layernorm.weight")
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=r"lacks .*\.b_layernorm\.weight"):
            load_mixer(jamba[1], tmp_path, "model.layers.3.mamba")


def test_config_of_another_model(tmp_path):
    config = odd_config()
    folder = write_checkpoint(tmp_path / "a", config, random_tensors(config))
    shutil.copy(folder / "config.json", tmp_path / "kept.json")
    (folder / "config.json").write_text(json.dumps(odd_config(num_hidden_layers=1).to_dict()))
    refuse(
        folder,
        r"the checkpoint holds backbone\.layers\.1\..* and \d+ more tensors, which its config.json has no",
    )
