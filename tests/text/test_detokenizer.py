"""Incremental text against decoding everything at once, for the kinds of tokenizer that Mamba models use."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tp_mamba.text.detokenizer import Detokenizer, special_token_ids

TEXTS = [
    "The capital of France",
    " is Paris.",
    "naïve café — “quotes”",
    "日本語のテキスト",
    "👩‍👩‍👧 family 🏳️‍🌈!",
    "  two  spaces\n\n\ttab",
]


def byte_level() -> Tokenizer:
    """A byte-level BPE, as GPT-NeoX's, with a few merges and one special token (id 0)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "i"), ("Ġi", "s"), ("Ġ", "P"), ("ã", "ģ"), ("ð", "Ł"), ("ðŁ", "ĳ")]
    pieces = ["<eos>", *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """SentencePiece's kind: ``▁`` for a space, bytes for unknown characters, the first space dropped."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnoprstuvwxyzTFPi.",
        "is",
        "▁is",
        "▁P",
    ]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("i", "s"), ("▁", "is"), ("▁", "P")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True)])
    return tokenizer


KINDS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


def pieces_of(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, special_token_ids(tokenizer))
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "Hello", "日本"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_up_the_text_after_the_prompt(kind: str, prompt: str, text: str) -> None:
    tokenizer = KINDS[kind]
    prompt_ids, ids = tokenizer.encode(prompt).ids, tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, prompt_ids, ids)
    assert prompt + "".join(pieces) == tokenizer.decode(prompt_ids + ids)
    assert not any("\ufffd" in piece for piece in pieces), "half a character was given out"
    assert pieces[-1] == "", "complete text was held back"


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_between_prompt_and_text(kind: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode("".join(TEXTS)).ids
    whole = tokenizer.decode(ids)
    for cut in range(len(ids)):
        if kind == "byte_fallback" and tokenizer.decode(ids[:cut]).endswith("\ufffd"):
            continue  # this decoder gives up a whole run of bytes for one unfinished character in it
        made = "".join(pieces_of(tokenizer, ids[:cut], ids[cut:]))
        assert whole == tokenizer.decode(ids[:cut]).rstrip("\ufffd") + made, cut


def test_special_tokens_give_no_text_and_do_not_eat_a_space() -> None:
    for tokenizer in KINDS.values():
        ids = tokenizer.encode("Paris").ids
        with_special = [t for token in tokenizer.encode(" is").ids for t in (token, 0, 0)]
        assert "".join(pieces_of(tokenizer, [0, *ids, 0], with_special)) == " is"


def test_invalid_bytes_are_shown_and_held_back_only_for_a_while() -> None:
    tokenizer = KINDS["byte_level"]
    continuation = tokenizer.token_to_id("ģ")  # 0x81, never the beginning of a character
    ids = [continuation] * 1000 + tokenizer.encode("後").ids + tokenizer.encode("ok").ids
    detokenizer = Detokenizer(tokenizer, [], special_token_ids(tokenizer))
    pieces, longest = [], 0
    for token in ids:
        pieces.append(detokenizer.push(token))
        longest = max(longest, len(detokenizer._context) + len(detokenizer._pending))
    assert "".join(pieces) + detokenizer.flush() == "\ufffd" * 1000 + "後ok" == tokenizer.decode(ids)
    assert longest < 100, "the window grows with the text"


def test_an_unfinished_character_at_the_end_is_flushed() -> None:
    tokenizer = KINDS["byte_level"]
    ids = tokenizer.encode("a語").ids
    pieces = pieces_of(tokenizer, [], ids[:-1])
    assert pieces == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens_never_show_half_a_character(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(4)
    for _ in range(30):
        text = "".join(rng.choice("aé€日😀 ") for _ in range(40))
        pieces = pieces_of(tokenizer, [], tokenizer.encode(text).ids)
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text).ids)
        assert not any("\ufffd" in piece for piece in pieces)
