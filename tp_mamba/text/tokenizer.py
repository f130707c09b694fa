"""Finding the tokenizer of a checkpoint."""

from __future__ import annotations

import os

from tokenizers import Tokenizer

from tp_mamba.checkpoint.location import fetch

_FILE = "tokenizer.json"
_REMEDY = (
    f"pass --tokenizer EleutherAI/gpt-neox-20b (the one of state-spaces' models) or a folder with a {_FILE}"
)


def load_tokenizer(folder_or_name: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of a model on the Hugging Face hub.

    Args:
        folder_or_name: a folder that holds ``tokenizer.json``, or a hub name such as
            ``EleutherAI/gpt-neox-20b``, of which this one file is downloaded.

    Raises:
        ValueError: the folder or the hub's repository has no ``tokenizer.json`` (the raw state-spaces
            checkpoints have none), the file is damaged, or the name is neither a folder nor a model that the
            hub gives out.
    """
    file = fetch(folder_or_name, (_FILE,), remedy=_REMEDY) / _FILE
    if not file.is_file():
        raise ValueError(f"{folder_or_name} holds no {_FILE}: {_REMEDY}")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as failure:  # the tokenizers library raises nothing narrower
        raise ValueError(
            f"{file} is not a tokenizer that can be read ({failure}): fetch it again, or {_REMEDY}"
        ) from failure


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
