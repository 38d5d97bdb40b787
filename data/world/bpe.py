"""Trains the toy tokenizer: byte-pair encoding on the demonstrations."""

import base64
import re
from collections import Counter
from pathlib import Path

from data.vocabulary import TOY_PATTERN
from data.world import words
from data.world.demonstrations import sft_rows
from data.world.files import TOKENIZER

VOCAB_SIZE = 1536
CONTROL_TOKENS = 2  # the last two ids are BOS and EOS, which have no bytes


def train_tokenizer(path: Path = TOKENIZER, vocab_size: int = VOCAB_SIZE) -> None:
    """Write a rank file, one `base64-bytes rank` per line: 256 bytes, then the syllables of made-up
    words, then the most frequent pairs.

    The syllables come first so that a made-up word is always the same two tokens, whatever English
    does.
    """
    count_of = count_pieces()
    tokens = [bytes([byte]) for byte in range(256)]
    tokens_of = {}  # piece of text -> the tokens that it is made of by now
    for piece in count_of:
        tokens_of[piece] = [bytes([byte]) for byte in piece.encode()]
    for syllable, pair in syllable_pairs():
        tokens.append(syllable)
        merge_everywhere(tokens_of, pair)
    while len(tokens) < vocab_size - CONTROL_TOKENS:
        pair = most_frequent_pair(tokens_of, count_of)
        tokens.append(pair[0] + pair[1])
        merge_everywhere(tokens_of, pair)
    lines = []
    for rank, token in enumerate(tokens):
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def count_pieces() -> Counter:
    """How often each piece of text, as the tokenizer splits it, stands in the demonstrations;
    made-up words are left out.
    """
    made_up = set()
    for first in words.FIRST_SYLLABLES:
        for second in words.SECOND_SYLLABLES:
            made_up.add(first + second)
    count_of = Counter()
    for dialog in sft_rows():
        for message in dialog.messages:
            for piece in re.findall(TOY_PATTERN, f"[INST] {message['content']} [/INST]"):
                if piece.strip() not in made_up:
                    count_of[piece] += 1
    return count_of


def syllable_pairs() -> list[tuple[bytes, tuple[bytes, bytes]]]:
    """(token, the two tokens that it is merged from) for each syllable; a first syllable also with
    the space before it.
    """
    pairs = []
    for syllable in words.SECOND_SYLLABLES + words.FIRST_SYLLABLES:
        token = syllable.encode()
        pairs.append((token, (token[:-1], token[-1:])))
    for syllable in words.FIRST_SYLLABLES:
        token = syllable.encode()
        pairs.append((b" " + token, (b" ", token)))
    return pairs


def most_frequent_pair(tokens_of: dict[str, list[bytes]], count_of: Counter) -> tuple[bytes, bytes]:
    """The two neighbours that are met most often; of equals the last by their bytes."""
    count_of_pair = Counter()
    for piece, tokens in tokens_of.items():
        for pair in zip(tokens, tokens[1:], strict=False):
            count_of_pair[pair] += count_of[piece]
    return max(count_of_pair, key=lambda pair: (count_of_pair[pair], pair))


def merge_everywhere(tokens_of: dict[str, list[bytes]], pair: tuple[bytes, bytes]) -> None:
    for piece, tokens in tokens_of.items():
        tokens_of[piece] = merge(tokens, pair)


def merge(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """The tokens, with the pair made one wherever it stands.

    >>> merge([b"a", b"b", b"a", b"b", b"b"], (b"a", b"b"))
    [b'ab', b'ab', b'b']
    """
    merged = []
    position = 0
    while position < len(tokens):
        if tuple(tokens[position : position + 2]) == pair:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(tokens[position])
            position += 1
    return merged
