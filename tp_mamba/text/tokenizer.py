"""The tokenizer of a checkpoint, with what the files beside it add to it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from tp_mamba.checkpoint.companions import (
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    read_companions,
)
from tp_mamba.checkpoint.location import fetch
from tp_mamba.parallel.group import TensorParallel, checked
from tp_mamba.quoting import quoted, shown, shown_path

_FILE = "tokenizer.json"
_BESIDE = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_REMEDY = (
    f"pass --tokenizer EleutherAI/gpt-neox-20b (the one of state-spaces' models) or a folder with a {_FILE}"
)


def load_tokenizer(folder_or_name: str | os.PathLike[str], tp: TensorParallel | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of a model on the Hugging Face hub.

    Truncation, padding and the dropout of merges, which a training run may have left switched on in the file, are
    switched off: they are settings of that run, not properties of the tokenizer, and would cut prompts, fill them up,
    or encode them anew in each call. Tokens that the files beside it declare and it lacks (``added_tokens_decoder`` of
    tokenizer_config.json, added_tokens.json) are added.

    Args:
        folder_or_name: a folder that holds ``tokenizer.json``, or a hub name such as
            ``EleutherAI/gpt-neox-20b``, of which this file and those beside it are downloaded.
        tp: ranks that all call this; if it fails on one, it fails on every one. None for this process alone.

    Raises:
        ValueError: the folder or the hub's repository has no ``tokenizer.json`` (the raw state-spaces
            checkpoints have none), a file is damaged, a declared token would get another id than it is declared with,
            or the name is neither a folder nor a model that the hub gives out.
        RankFailedError: it failed on another rank of ``tp``.
    """
    with checked(tp).agreed() if tp is not None else nullcontext():
        return _load(folder_or_name)


def _load(folder_or_name: str | os.PathLike[str]) -> Tokenizer:
    file = fetch(folder_or_name, (_FILE,), optional=_BESIDE, remedy=_REMEDY) / _FILE
    if not file.is_file():
        raise ValueError(f"{folder_or_name} holds no {_FILE}: {_REMEDY}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as failure:  # the tokenizers library raises nothing narrower
        raise ValueError(
            f"{shown_path(file)} is not a tokenizer that can be read ({shown(failure)}): fetch it again, or {_REMEDY}"
        ) from failure
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, BPE):
        tokenizer.model.dropout = None
    _add_declared(tokenizer, file.parent)
    return tokenizer


def _add_declared(tokenizer: Tokenizer, folder: Path) -> None:
    """Add the tokens that the files in ``folder`` declare and ``tokenizer`` lacks, each under its declared id."""
    companions = read_companions(folder)
    details = companions.tokenizer.get("added_tokens_decoder") or {}
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token_id, text in sorted(companions.added_tokens.items()):
        if text in known:
            continue  # tokenizer.json has the last word on it
        declared = details.get(str(token_id))
        options = declared if isinstance(declared, dict) else {}
        flags = {name: options[name] for name in _FLAGS if isinstance(options.get(name), bool)}
        # transformers takes every token that is named as a special one (eos_token and so on) for special.
        special = options.get("special") is True or text in companions.special_tokens.values()
        token = AddedToken(text, special=special, **flags)
        _ = tokenizer.add_special_tokens([token]) if special else tokenizer.add_tokens([token])
        if (got := tokenizer.token_to_id(text)) != token_id:
            raise ValueError(
                f"{shown_path(folder)} declares the token {quoted(text)} with id {token_id}, beside this {_FILE} it "
                f"has id {got}: the files are not of one tokenizer, fetch them again"
            )


def end_of_ids(tokenizer: Tokenizer) -> int:
    """The lowest id above all of the tokenizer's: more than its number of tokens where there are gaps.

    Goes through the whole vocabulary, so call it once.

    Raises:
        ValueError: it has no tokens.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise ValueError("the tokenizer has no tokens: load the one that belongs to this checkpoint")
    return max(ids) + 1
