"""Text to token ids and back (paper §2.2: byte-pair encoding, numbers cut into digits, unknown
characters as bytes).

One class, `Tokenizer`, for three kinds of file; which kind it is shows in the content:

* a tiktoken rank file, one `base64-bytes rank` per line: our toy vocabulary (`data/vocabulary.py`);
* a SentencePiece model, the `tokenizer.model` that Meta ships with Llama 2 (`data/vocabulary.py`);
* a Hugging Face `tokenizer.json` of the Llama 2 kind, or one that `runtime.export_hf` wrote
(`data/tokenizer_json.py`).

All three end up as a table of merge ranks, which tiktoken, a fast byte-pair encoder, applies.
"""

import codecs
import hashlib
import os
import re
from itertools import chain
from pathlib import Path

import tiktoken

from data.errors import InputError
from data.tokenizer_json import read_tokenizer_json
from data.vocabulary import TOY_PATTERN, Vocabulary, read_rank_file, read_sentencepiece

__all__ = ["TOY_PATTERN", "Tokenizer"]


class Tokenizer:
    """`path` is a tokenizer file, or a folder that holds `tokenizer.model` or `tokenizer.json`.

    `vocab_size`, `bos_id`, `eos_id`, `pad_id` (-1: Llama 2 has no padding token) and `fingerprint`,
    a hash of the vocabulary: two tokenizers with the same fingerprint give the same ids. A file
    that is missing, broken, or that we could not honour exactly raises InputError.
    """

    def __init__(self, path: str | Path):
        path = find_tokenizer(Path(path))
        try:
            self.content = path.read_bytes()
        except OSError as problem:
            raise InputError(f"{path}: not readable ({problem.strerror})") from None
        self.vocabulary = v = read_vocabulary(self.content, path)
        self.file_name = "tokenizer.json" if self.content.startswith(b"{") else "tokenizer.model"
        self.encoding = tiktoken.Encoding(
            "llama", pat_str=v.pattern, mergeable_ranks=v.ranks, special_tokens={}
        )
        self.vocab_size, self.bos_id, self.eos_id, self.pad_id = (
            len(v.pieces),
            v.bos_id,
            v.eos_id,
            -1,
        )
        decisive = (
            v.pattern,
            v.add_dummy_prefix,
            v.remove_extra_whitespaces,
            self.vocab_size,
            v.bos_id,
            v.eos_id,
        )
        self.fingerprint = hashlib.sha256(
            repr((decisive, list(v.ranks), v.ids)).encode()
        ).hexdigest()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS in front and EOS behind when asked. Text never becomes BOS or
        EOS: "<s>" is three ordinary characters. A lone surrogate, which is no character, counts as
        U+FFFD."""
        ranks = self.encoding.encode_ordinary(self._normalise(text))
        ids = chain.from_iterable(map(self.vocabulary.ids.__getitem__, ranks))
        return [*([self.bos_id] * bos), *ids, *([self.eos_id] * eos)]

    def _normalise(self, text: str) -> str:
        """SentencePiece's normaliser without character maps (its `normalizer.cc`)."""
        v = self.vocabulary
        if v.remove_extra_whitespaces:
            text = re.sub(" +", " ", text.lstrip(" ").rstrip(" ▁"))
        if v.add_dummy_prefix and text:
            text = " " + text
        return text.replace(" ", "▁") if v.names else text

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; BOS and EOS are invisible, and a byte that is no part of a character
        becomes U+FFFD.
        """
        v = self.vocabulary
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise InputError(
                f"cannot decode token ids outside 0 … {self.vocab_size - 1}: {min(ids)} …"
                f" {max(ids)}"
            )
        # where encoding may have put in a space
        at_start = v.add_dummy_prefix or v.remove_extra_whitespaces
        runs = [bytearray()]
        for i in ids:
            piece = v.pieces[i]
            if piece is None:
                runs.append(bytearray())  # invisible, but no character reaches across it
                continue
            if at_start and v.names[i].startswith("▁"):
                piece = piece[1:]
            at_start = at_start and v.remove_extra_whitespaces and not piece
            runs[-1] += piece
        return "".join(run.decode("utf-8", "one_mark_per_byte") for run in runs)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.model` (or `tokenizer.json`) into `folder`, byte for byte as it was
        read, in one step.
        """
        path = Path(folder) / self.file_name
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(self.content)
        os.replace(temporary, path)


# Python's own "replace" writes one U+FFFD for a cut-off character; SentencePiece writes one for
# each of its bytes.
codecs.register_error(
    "one_mark_per_byte", lambda error: ("\ufffd" * (error.end - error.start), error.end)
)


def find_tokenizer(path: Path) -> Path:
    """The file itself, or the one inside a folder; `tokenizer.model` first, being the original."""
    for candidate in (path, path / "tokenizer.model", path / "tokenizer.json"):
        if os.path.isfile(candidate):
            return candidate
    raise InputError(f"{path}: no tokenizer there (tokenizer.model or tokenizer.json)")


def read_vocabulary(content: bytes, path: Path) -> Vocabulary:
    """Reads a tokenizer file of any kind, which its first bytes show."""
    if content.startswith(b"{"):
        return read_tokenizer_json(content, path)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", content):
        return read_rank_file(content, path)
    return read_sentencepiece(content, path)
