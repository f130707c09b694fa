"""Chat templates rendered as transformers renders them, and refused in one sentence."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tp_mamba.text.chat import ChatTemplate, load_chat_template

CHATML = """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
<|im_start|>system
You help.<|im_end|>
{% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
WITH_TOKENS = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}User: {{ message.content }}
{%- elif message.role == 'skip' %}{% continue %}
{%- else %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ messages | tojson }}"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = [
    {"role": "user", "content": " 5 < 6 & «ja»? "},
    {"role": "skip", "content": "not shown"},
    {"role": "assistant", "content": "Ja."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def reference(template: str, **variables: object) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), **SPECIAL
    )
    return tokenizer.apply_chat_template(TURNS, chat_template=template, tokenize=False, **variables)


@pytest.mark.parametrize("template", [CHATML, WITH_TOKENS])
@pytest.mark.parametrize(
    "variables", [{}, {"add_generation_prompt": True}, {"tools": TOOLS}], ids=["bare", "prompt", "tools"]
)
def test_renders_what_transformers_renders(template: str, variables: dict) -> None:
    ours = ChatTemplate(template, SPECIAL).render(TURNS, **{"add_generation_prompt": False, **variables})
    assert ours == reference(template, **variables)
    assert "Ja." in ours


def test_by_default_it_ends_where_the_model_begins() -> None:
    assert ChatTemplate(CHATML).render(TURNS[:1]).endswith("<|im_start|>assistant\n")


def test_found_in_the_files_that_transformers_reads(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "third{{ eos_token }}", "eos_token": {"content": "</s>"}})
    )
    assert load_chat_template(tmp_path).render(TURNS) == "third</s>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "second"}))
    assert load_chat_template(tmp_path).render(TURNS) == "second"
    (tmp_path / "chat_template.jinja").write_text("first{{ bos_token }}")
    assert load_chat_template(tmp_path).render(TURNS) == "first"


def test_a_folder_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template: leave the chat out and give the prompt as"):
        load_chat_template(tmp_path)
    named = [{"name": "tool_use", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    with pytest.raises(ValueError, match=r"has no chat template named 'default' \(there is tool_use\)"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "the chat template is not a Jinja template that can be read"),
        (
            "{{ raise_exception('roles must alternate') }}",
            r"does not take these messages \(roles must altern",
        ),
        ("{{ messages[0].content + 1 }}", "does not take these messages"),
        ("{{ ''.__class__.__mro__ }}", "does not take these messages .*unsafe"),
        ("{{ messages.append(1) }}", "does not take these messages .*unsafe"),
    ],
)
def test_templates_that_fail_say_so_in_one_sentence(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ChatTemplate(template).render(TURNS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("messages", [[], "Hello", {"role": "user"}])
def test_messages_that_are_none(messages: object) -> None:
    with pytest.raises(ValueError, match=r"for messages: give a list of them, as in \[\{"):
        ChatTemplate("x").render(messages)  # type: ignore[arg-type]


def test_a_message_without_a_role() -> None:
    with pytest.raises(ValueError, match=r"message 1 is \{'content': 'x'\}, which has no role"):
        ChatTemplate("x").render([TURNS[0], {"content": "x"}])
