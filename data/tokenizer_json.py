"""Hugging Face's `tokenizer.json`: reads one of the Llama 2 kind, and writes one for any of our
tokenizers.

A tokenizer.json lists the *pairs* that merge ("▁t" + "he"), in order; SentencePiece and tiktoken
rank the *results* ("▁the"). The two agree when the pairs of one result stand together and every way
to split it is among them. That is checked, and anything else is refused.
"""

import json
import re
from itertools import groupby
from pathlib import Path

from data.errors import InputError
from data.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    TOY_PATTERN,
    UNKNOWN,
    Vocabulary,
    llama_vocabulary,
    refuse,
    toy_vocabulary,
)

TOY_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": TOY_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
# Longer than any piece in use; the work of reading one grows with the square of this.
MOST_CHARACTERS = 1000
TOY_DECODER = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def llama_normalizer(add_dummy_prefix: bool, remove_extra_whitespaces: bool) -> dict:
    """What a tokenizer.json calls the two flags of a SentencePiece model; (True, False) is Llama 2.
    """
    steps = []
    if remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +|[ ▁]+\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "})
    if add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return {"type": "Sequence", "normalizers": steps}


def llama_decoder(remove_extra_whitespaces: bool) -> dict:
    """And what it calls decoding; the last step drops the space in front (or all of them)."""
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {
            "type": "Strip",
            "content": " ",
            "start": 1000 if remove_extra_whitespaces else 1,
            "stop": 0,
        },
    ]
    return {"type": "Sequence", "decoders": steps}


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in "byte-level" vocabularies (GPT-2's table).

    >>> byte_alphabet()[65], byte_alphabet()[32]
    ('A', 'Ġ')
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves
    others = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + others.index(b)) for b in range(256)]


def read_tokenizer_json(content: bytes, path: Path) -> Vocabulary:
    """Reads a tokenizer.json of the Llama 2 kind, or one that `write_tokenizer_json` made from a
    toy vocabulary. InputError for any other, and where a part of it would give other ids.
    """
    try:
        file = json.loads(content)
        model, added = file["model"], {
            token["content"]: token for token in file.get("added_tokens") or []
        }
        ids = {**model["vocab"], **{name: token["id"] for name, token in added.items()}}
        moved = [name for name in model["vocab"] if ids[name] != model["vocab"][name]]
        pairs = [
            tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]
        ]
        products = [left + right for left, right in pairs]
        names = sorted(ids, key=ids.__getitem__)
        special = {*added, model.get("unk_token")}
        "".join([*names, *products]).encode()  # all are text, without lone surrogates
        kind = model["type"], bool(model.get("byte_fallback")), bool(model.get("ignore_merges"))
        normalizer, pre_tokenizer = file["normalizer"], file["pre_tokenizer"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: broken, or no tokenizer.json with a byte-pair model") from None
    whole = all(type(i) is int for i in ids.values())
    consecutive = sorted(ids.values()) == list(range(len(names)))
    refuse(path, not whole or not consecutive, "ids that are not 0, 1, 2, …")
    refuse(path, moved, "added tokens whose ids are not those of the vocabulary")
    refuse(
        path,
        max(map(len, names), default=0) > MOST_CHARACTERS,
        f"a piece of more than {MOST_CHARACTERS} characters",
    )
    if kind == ("BPE", False, True):
        vocabulary = read_toy(names, path)
        check_toy(file, pairs, vocabulary, path)
        return vocabulary

    choices = [(dummy, extra) for dummy in (False, True) for extra in (False, True)]
    flags = next((choice for choice in choices if llama_normalizer(*choice) == normalizer), None)
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    refuse(
        path,
        kind != ("BPE", True, False) or any(model.get(name) for name in others),
        "a model other than Llama 2's",
    )
    refuse(
        path, flags is None or pre_tokenizer, "a normaliser or pre-tokeniser other than Llama 2's"
    )
    refuse(
        path,
        any(not token.get("special") for token in added.values()),
        "added tokens that are part of the text",
    )
    tokens = {*products, *(name for name in names if len(name) == 1)}
    refuse(path, tokens & special, "added tokens that merging makes")
    listed = set(pairs)
    pieces_of_merges = {*products, *(name for pair in pairs for name in pair)}
    refuse(path, pieces_of_merges - ids.keys(), "merges of pieces that it does not have")
    splits = ((name[:n], name[n:]) for name in set(products) for n in range(1, len(name)))
    missing = any(pair not in listed and tokens.issuperset(pair) for pair in splits)
    refuse(path, missing, "merges that depend on more than their result")

    types = []
    for name in names:
        special = UNKNOWN if name == model.get("unk_token") else CONTROL if name in added else None
        types.append(special or (BYTE if re.fullmatch("<0x[0-9A-F]{2}>", name) else NORMAL))
    return llama_vocabulary(names, types, merge_order(products, path), flags, " ⁇ ".encode(), path)


def read_toy(names: list[str], path: Path) -> Vocabulary:
    """The toy vocabulary of these names in the order of their ids; the last two are BOS and EOS."""
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    refuse(path, not byte_of.keys() >= set("".join(names[:-2])), "characters that are no bytes")
    tokens = [bytes(byte_of[character] for character in name) for name in names[:-2]]
    return toy_vocabulary({token: rank for rank, token in enumerate(tokens)}, path)


def check_toy(file: dict, pairs: list[tuple], vocabulary: Vocabulary, path: Path) -> None:
    """InputError, naming the part, unless a tokenizer.json says what we write for this vocabulary.
    Merges may be written as lists; padding and truncation, which change no id, may be there.
    """
    expected = json.loads(write_tokenizer_json(vocabulary))
    for part in ("pre_tokenizer", "normalizer", "post_processor", "decoder", "added_tokens"):
        refuse(path, file.get(part) != expected[part], f"another {part} than ours")
    model = file["model"] | {"merges": [" ".join(pair) for pair in pairs]}
    for part, value in expected["model"].items():
        refuse(path, model.get(part) != value, f"another model.{part} than ours")


def merge_order(products: list[str], path: Path) -> list[str]:
    """The results of the merges, each once, those that merge first in front.

    In Llama 2's file the pairs that make runs of spaces are mixed with one another. They stand
    last, and "▁" + "▁" is the very last: so a run always grows at its left end before a new one
    begins, as if longer runs merged first.
    """
    order = list(dict.fromkeys(products))
    together = len([*groupby(products)]) == len(order)
    words = [name for name in products if name.strip("▁")]
    spaces_last = words == products[: len(words)] and products[-1:] == ["▁▁"]
    words_together = len([*groupby(words)]) == len(set(words))
    refuse(
        path,
        not together and not (spaces_last and words_together),
        "merges in another order than Llama 2's",
    )
    return (
        order
        if together
        else sorted(order, key=lambda name: 0 if name.strip("▁") else 100 - len(name))
    )


def write_tokenizer_json(v: Vocabulary) -> str:
    """The text of a tokenizer.json from which Hugging Face's tokenizers give our ids, with BOS in
    front.

    One difference stays: there, "<s>" and "</s>" within a text do become BOS and EOS.
    """
    toy, alphabet = v.names is None, byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[b] for b in token) if toy else token.decode("utf-8", "ignore")

    names = v.names or [*map(spell, v.pieces[:-2]), "<s>", "</s>"]
    special = [i for i, piece in enumerate(v.pieces) if piece is None or i == v.unknown_id]
    ids = {name: i for i, name in enumerate(names)}
    splits = ((name[:n], name[n:]) for name in map(spell, v.ranks) for n in range(1, len(name)))
    bos = names[v.bos_id]
    put_bos = {"SpecialToken": {"id": bos, "type_id": 0}}
    text_a, text_b = ({"Sequence": {"id": text, "type_id": 0}} for text in "AB")
    file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": names[i], "special": True}
            | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            for i in special
        ],
        "normalizer": (
            None if toy else llama_normalizer(v.add_dummy_prefix, v.remove_extra_whitespaces)
        ),
        "pre_tokenizer": TOY_PRE_TOKENIZER if toy else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [put_bos, text_a],
            "pair": [put_bos, text_a, put_bos, text_b],
            "special_tokens": {bos: {"id": bos, "ids": [v.bos_id], "tokens": [bos]}},
        },
        "decoder": TOY_DECODER if toy else llama_decoder(v.remove_extra_whitespaces),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if v.unknown_id < 0 else names[v.unknown_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": not toy,
            "byte_fallback": not toy,
            # tiktoken's rule for a word that is a token as a whole; Llama 2 has no words
            "ignore_merges": toy,
            "vocab": ids,
            "merges": [f"{left} {right}" for left, right in splits if left in ids and right in ids],
        },
    }
    return json.dumps(file, ensure_ascii=False, indent=1)
