"""Tokenizer files, read into one `Vocabulary`: the table of merge ranks that tiktoken applies.

Our toy vocabulary is a tiktoken rank file already. Llama 2's is a SentencePiece model
(`tokenizer.model`), read here without the sentencepiece package. tiktoken builds tokens from bytes,
SentencePiece from characters, so the table for Llama 2 has three layers:

1. the 256 bytes;
2. the beginnings of multi-byte characters and the characters themselves, shorter ones first: every
   character forms before anything merges across it, and a beginning that is left over falls back to
   its bytes;
3. the pieces of several characters, in the order in which SentencePiece prefers them.

What tiktoken could not imitate exactly (Unigram models, other normalisers, user-defined pieces, …)
is refused.
"""

import base64
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from data.errors import InputError

# How toy text is cut before merging: words and punctuation with the one space before them, single
# digits, whitespace. `\s+(?= \S)` leaves that one space to the word, so that cutting a text before
# it never changes the ids.
TOY_PATTERN = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+(?= \S)|\s+"
# Llama 2 has no piece with a space ("▁") behind another character: cut before every run of spaces,
# for speed alone.
LLAMA_PATTERN = "▁+[^▁]*|[^▁]+"
NO_CUT = r"[\s\S]+"  # for a vocabulary that has such pieces

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's types of piece


@dataclass
class Vocabulary:
    """What any tokenizer file comes down to."""

    # what each id stands for; None: nothing to be seen (BOS, EOS, other control pieces)
    pieces: list[bytes | None]
    # tiktoken's table: of all neighbours that can merge, those of the lowest rank do
    ranks: dict[bytes, int]
    ids: list[tuple[int, ...]]  # of each rank: its id, or several where it falls back to bytes
    pattern: str  # each match is encoded by itself
    bos_id: int
    eos_id: int
    # SentencePiece puts a space in front of every text; decoding drops it
    add_dummy_prefix: bool = False
    # … takes runs of spaces as one, and drops those at both ends
    remove_extra_whitespaces: bool = False
    # SentencePiece's names of the ids, where a space is "▁" (U+2581); None: toy
    names: list[str] | None = None
    unknown_id: int = -1  # SentencePiece's piece for "unknown", which byte fallback leaves unused


def read_rank_file(content: bytes, path: Path) -> Vocabulary:
    """Our toy vocabulary, one `base64-bytes rank` per line. Ranks 0 … N-1 are the ids, BOS is N and
    EOS N + 1.
    """
    ranks = {}
    for number, line in enumerate(content.decode("ascii", "replace").splitlines(), 1):
        try:
            token, rank = line.split(" ")
            if ranks.setdefault(base64.b64decode(token, validate=True), int(rank)) != number - 1:
                raise ValueError
        except ValueError:
            expected = f"expected `base64-bytes {number - 1}`"
            raise InputError(f"{path}, line {number}: {expected}, found {line[:40]!r}") from None
    return toy_vocabulary(ranks, path)


def toy_vocabulary(ranks: dict[bytes, int], path: Path) -> Vocabulary:
    """Completes the ranks by BOS and EOS; InputError unless they are 0, 1, 2, … and know every
    byte.
    """
    n = len(ranks)
    refuse(path, b"" in ranks, "an empty token")
    if sorted(ranks.values()) != list(range(n)) or not all(bytes([b]) in ranks for b in range(256)):
        raise InputError(
            f"{path}: ranks must be 0, 1, 2, … without gaps or repeats, and all 256 bytes must"
            " have one"
        )
    pieces = sorted(ranks, key=ranks.__getitem__)
    return Vocabulary(
        [*pieces, None, None], ranks, [(i,) for i in range(n)], TOY_PATTERN, bos_id=n, eos_id=n + 1
    )


# ---- SentencePiece's own file ----


def read_sentencepiece(content: bytes, path: Path) -> Vocabulary:
    """Reads a `tokenizer.model`: one ModelProto of sentencepiece/src/sentencepiece_model.proto."""
    try:
        model = list(fields(content))
        # 1 text, 2 score, 3 type
        pieces = [dict(fields(value)) for number, value in model if number == 1]
        names = [piece[1].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
        types = [piece.get(3, NORMAL) for piece in pieces]
        trainer, normalizer, denormalizer = (
            dict(fields(b"".join(v for k, v in model if k == n))) for n in (2, 3, 5)
        )
        unknown = trainer.get(44, " ⁇ ".encode())
        unknown.decode("utf-8", "replace")  # an int has no such method
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, struct.error):
        raise InputError(
            f"{path}: no tokenizer (SentencePiece, tiktoken ranks or JSON), or cut short"
        ) from None
    merged = [
        text for text, type_ in zip(names, types, strict=True) if type_ == NORMAL and len(text) > 1
    ]
    score = dict(zip(names, scores, strict=True))
    # Pieces of nothing but spaces share one score in Llama 2 (-1e9). SentencePiece merges the
    # leftmost of equals, which in a run of spaces is always the longest.
    merged.sort(key=lambda text: (-score[text], -len(text)))
    times = Counter(score[text] for text in merged)
    refuse(path, trainer.get(3) != 2, "a model type other than BPE")
    refuse(path, normalizer.get(2) or denormalizer.get(2), "a normaliser that changes characters")
    refuse(
        path,
        not normalizer.get(5, 1) or trainer.get(24),
        "spaces treated in another way than Llama 2's",
    )
    refuse(path, not trainer.get(35) or types.count(BYTE) != 256, "no byte fallback")
    refuse(
        path,
        set(types) - {NORMAL, UNKNOWN, CONTROL, BYTE},
        "user-defined, unused or unknown kinds of pieces",
    )
    refuse(path, not all(map(math.isfinite, scores)), "a score that is no number")
    refuse(
        path,
        trainer.get(46, b"<s>") != b"<s>" or trainer.get(47, b"</s>") != b"</s>",
        "other names for BOS and EOS than <s> and </s>",
    )
    refuse(
        path,
        any(times[score[text]] > 1 for text in merged if text.strip("▁")),
        "pieces of equal score",
    )
    refuse(path, len(score) != len(names), "a piece that is there twice")
    flags = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
    return llama_vocabulary(names, types, merged, flags, unknown, path)


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol-buffer message: an int for a varint, bytes for
    anything else.

    >>> list(fields(bytes([0x08, 0x96, 0x01, 0x12, 0x02, 0x68, 0x69])))
    [(1, 150), (2, b'hi')]
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:  # seven bits a byte, lowest first; the eighth says that more follow
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
        else:
            length = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            if position + length > len(message):
                raise IndexError("the message ends within a field")
            yield number, message[position : position + length]
            position += length


def refuse(path: Path, condition: object, what: str) -> None:
    """InputError if the tokenizer has a trait that tiktoken cannot imitate exactly."""
    if condition:
        raise InputError(
            f"{path}: a tokenizer with {what} is refused: it could not be reproduced exactly"
        )


def llama_vocabulary(
    names: list[str],
    types: list[int],
    merged: list[str],
    flags: tuple[bool, bool],
    unknown: bytes,
    path: Path,
) -> Vocabulary:
    """The three layers of ranks. merged: the pieces of several characters, those that merge first
    in front; flags: add_dummy_prefix and remove_extra_whitespaces; unknown: what the piece for
    "unknown" looks like.
    """
    refuse(path, "" in names, "an empty piece")
    ids = {name: i for i, name in enumerate(names) if types[i] == NORMAL}
    pieces = [name.replace("▁", " ").encode() for name in names]
    byte_ids, unknown_id = [-1] * 256, -1
    for i, type_ in enumerate(types):
        if type_ == BYTE:
            refuse(path, not re.fullmatch("<0x[0-9A-F]{2}>", names[i]), f"a byte called {names[i]}")
            value = int(names[i][1:-1], 16)
            byte_ids[value], pieces[i] = i, bytes([value])
        elif type_ == UNKNOWN:
            pieces[i], unknown_id = unknown, i
        elif type_ == CONTROL:
            pieces[i] = None
    special = {name: i for i, name in enumerate(names) if types[i] == CONTROL}
    refuse(
        path,
        "<s>" not in special or "</s>" not in special or -1 in byte_ids,
        "no <s>, no </s> or too few bytes",
    )

    characters = {character.encode() for name in ids for character in name}
    beginnings = {character[:n] for character in characters for n in range(2, len(character) + 1)}
    layers = [bytes([b]) for b in range(256)] + sorted(beginnings, key=lambda b: (len(b), b))
    layers += [text.encode() for text in merged]
    crosses = any("▁" in text.lstrip("▁") for text in merged)
    pattern = NO_CUT if crosses else LLAMA_PATTERN
    # tiktoken takes a match that is a token as a whole, without merging. So a token that merging
    # never makes must go. Before a byte that merges with nothing, such a token comes out in parts.
    test = tiktoken.Encoding(
        "test", pat_str=NO_CUT, mergeable_ranks=numbered(layers), special_tokens={}
    )
    never = {text.encode() for text in merged if len(test.encode_ordinary(text + "\0")) > 2}
    layers = [token for token in layers if token not in never]

    def ids_of(token: bytes) -> tuple[int, ...]:
        text = token.decode("utf-8", "ignore")  # empty for a beginning
        return (ids[text],) if text in ids else tuple(byte_ids[b] for b in token)

    bos_eos = special["<s>"], special["</s>"]
    return Vocabulary(
        pieces,
        numbered(layers),
        [*map(ids_of, layers)],
        pattern,
        *bos_eos,
        *flags,
        names,
        unknown_id,
    )


def numbered(tokens: list[bytes]) -> dict[bytes, int]:
    """Ranks in the order of the list."""
    return {token: rank for rank, token in enumerate(tokens)}
