"""From what a person asks for to a trainer that is ready: the model, its tokenizer and the data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tp_mamba.checkpoint.companions import read_companions
from tp_mamba.config import MambaConfig
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sequence import SequenceParallel
from tp_mamba.text.tokenizer import end_of_ids, load_tokenizer
from tp_mamba.training.export import keep_companions
from tp_mamba.training.ranks import Ranks
from tp_mamba.training.tokens import BYTE_VOCABULARY, Tokens, read_tokens

BYTES: Final = "bytes"
"""The name of the tokenizer that there is without a file: each byte of UTF-8 is its own id, and 0 ends a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Which texts, and how they become tokens."""

    files: tuple[Path, ...]
    valid_files: tuple[Path, ...] = ()
    valid_fraction: float = 0.0
    """Of the tokens of ``files``, the last ones, for validation; where no ``valid_files`` are given."""
    tokenizer: str = BYTES
    """:data:`BYTES`, or a folder or hub name with a tokenizer.json."""
    text_field: str = "text"
    cache: Path = Path.home() / ".cache" / "tp_mamba" / "tokens"


def get_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of that name; None for :data:`BYTES`.

    Raises:
        ValueError: there is none.
    """
    return None if name == BYTES else load_tokenizer(name)


def check_vocabulary(config: MambaConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse a tokenizer with ids that the model does not have.

    Raises:
        ValueError: it has.
    """
    ids = BYTE_VOCABULARY if tokenizer is None else end_of_ids(tokenizer)
    if ids > config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {ids - 1} and the model a vocabulary of {config.vocab_size}: use the model's "
            "own tokenizer, or a model of a larger vocabulary (--vocab-size)"
        )


def load_data(
    data: Data, tokenizer: Tokenizer | None, end_of_text: int | None
) -> tuple[Tokens, Tokens | None]:
    """The tokens to train on and to validate on.

    Raises:
        ValueError: a file is missing, empty or damaged.
        OSError: the cache cannot be written.
    """

    def read(files: Sequence[Path]) -> Tokens:
        return read_tokens(files, tokenizer, cache=data.cache, end_of_text=end_of_text, field=data.text_field)

    train = read(data.files)
    if data.valid_files:
        return train, read(data.valid_files)
    return train.split(data.valid_fraction) if data.valid_fraction else (train, None)


def end_of_text_id(config: MambaConfig, checkpoint: Path | None) -> int | None:
    """The id that ends a text of the model, if it has one; generation_config.json has the last word."""
    ids = config.eos_token_ids
    if checkpoint is not None and (found := read_companions(checkpoint).eos_token_ids) is not None:
        ids = found
    return ids[0] if ids else None


def build_model(
    ranks: Ranks,
    *,
    config: MambaConfig | None,
    checkpoint: Path | None,
    seed: int,
    compute_dtype: torch.dtype,
    checkpoint_level: int = 0,
    sequence_parallel: bool = False,
) -> MambaForCausalLM:
    """A trainable model in float32: new from ``config`` and ``seed``, the same at every rank count, or loaded.

    Raises:
        ValueError: neither or both are given, the checkpoint cannot be loaded, or there are too many ranks for it.
    """
    if (config is None) == (checkpoint is None):
        raise ValueError("give either a configuration to begin with or a checkpoint to go on from")
    tp = ranks.tp
    if sequence_parallel and tp.size > 1:
        tp = TensorParallel(tp.group, device=tp.device, communicator=SequenceParallel())
    if checkpoint is not None:
        model = MambaForCausalLM.from_pretrained(
            checkpoint, tp, torch.float32, tp.device, trainable=True, compute_dtype=compute_dtype
        )
    else:
        assert config is not None
        torch.manual_seed(seed)
        model = MambaForCausalLM(
            replace(config, dtype=None),
            tp,
            torch.float32,
            tp.device,
            trainable=True,
            compute_dtype=compute_dtype,
        )
    model.checkpoint_level = checkpoint_level
    return model


def write_tokenizer(run: Path, tokenizer: str, checkpoint: Path | None) -> None:
    """Keep the tokenizer's files with the run, for :func:`tp_mamba.training.export.export_run`.

    Raises:
        OSError: they cannot be written.
    """
    if tokenizer != BYTES:
        keep_companions(Path(tokenizer) if Path(tokenizer).is_dir() else checkpoint or Path(tokenizer), run)
        return
    folder = run / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def byte_tokenizer() -> Tokenizer:
    """:data:`BYTES` as a tokenizer.json holds it: a byte-level BPE without merges, whose ids are the bytes."""
    letters = {letter: byte for byte, letter in _letters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> dict[int, str]:
    """The printable character that a byte-level BPE writes for each byte: itself, or one from 256 on (GPT-2's rule)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}
