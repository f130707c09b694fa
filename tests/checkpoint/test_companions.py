"""The small files beside the weights: read as data, absent without complaint, damaged by name."""

import json

import pytest

from tp_mamba.checkpoint.companions import Companions, read_companions
from tp_mamba.checkpoint.errors import CheckpointError


def write(folder, **files):
    """Each file by its name up to the first dot."""
    names = {"chat_template_jinja": "chat_template.jinja"}
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / names.get(name, f"{name}.json")).write_text(text)
    return folder


def test_none_at_all(tmp_path):
    assert read_companions(tmp_path) == Companions()
    assert read_companions(tmp_path).eos_token_ids is None
    assert read_companions(tmp_path).chat_template is None


@pytest.mark.parametrize(
    ("value", "ids"), [(2, (2,)), ([2, 519], (2, 519)), (None, None), ([], ()), (0, (0,))]
)
def test_ends_of_text(value, ids, tmp_path):
    write(tmp_path, generation_config={"eos_token_id": value, "pad_token_id": 1, "temperature": 0.6})
    found = read_companions(tmp_path)
    assert (found.eos_token_ids, found.pad_token_id) == (ids, 1)


def test_tokens(tmp_path):
    write(
        tmp_path,
        special_tokens_map={"bos_token": "<s>", "eos_token": "<old>", "additional_special_tokens": ["x"]},
        tokenizer_config={
            "eos_token": {"content": "</s>", "lstrip": False},
            "pad_token": None,
            "added_tokens_decoder": {"7": {"content": "<|im_end|>", "special": True}},
        },
        added_tokens={"<tool>": 8},
    )
    found = read_companions(tmp_path)
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert found.added_tokens == {7: "<|im_end|>", 8: "<tool>"}


def test_chat_template_has_three_places(tmp_path):
    write(tmp_path, tokenizer_config={"chat_template": "config"})
    assert read_companions(tmp_path).chat_template == "config"
    write(tmp_path, chat_template={"chat_template": "json"})
    assert read_companions(tmp_path).chat_template == "json"
    write(tmp_path, chat_template_jinja="jinja\n")
    assert read_companions(tmp_path).chat_template == "jinja\n"


def test_several_chat_templates(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write(tmp_path, tokenizer_config={"chat_template": named})
    assert read_companions(tmp_path).chat_templates == {"default": "plain", "tool_use": "tools"}
    assert read_companions(tmp_path).chat_template == "plain"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"generation_config": "{"},
            r"generation_config\.json is not JSON \(.*\): correct it, remove it, or",
        ),
        ({"generation_config": "[1]"}, r"generation_config\.json holds a JSON list, it must be an object"),
        ({"generation_config": {"eos_token_id": "</s>"}}, "eos_token_id is '</s>', it must be a token id"),
        ({"generation_config": {"eos_token_id": [2, True]}}, "eos_token_id is True, it must be a token id"),
        ({"generation_config": {"pad_token_id": -1}}, "pad_token_id is -1, it must be a token id"),
        ({"tokenizer_config": {"eos_token": 3}}, "eos_token is 3, it must be a string, or an object with"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template is 3, it must be a template, or a list"),
        ({"tokenizer_config": {"chat_template": [{"name": "a"}]}}, "it must be a template, or a list"),
        ({"tokenizer_config": {"chat_template": [{"name": []}]}}, "it must be a template, or a list"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "a"}}}, "added_tokens_decoder is 'x'"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, r"added_tokens_decoder is \[1\]"),
        (
            {"added_tokens": {"a\x1b[31m": 1.5}},
            r"added_tokens\.json: a\\x1b\[31m is 1\.5, it must be a token",
        ),
        ({"special_tokens_map": "[" * 10**5}, r"special_tokens_map\.json is not JSON that can be read"),
    ],
)
def test_damaged_ones_are_named(files, message, tmp_path):
    write(tmp_path, **files)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_companions(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_a_template_that_is_not_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read \('utf-8' codec"):
        read_companions(tmp_path)
