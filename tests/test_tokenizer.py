"""The tokenizer: the toy kind, and Llama 2's kind beside the sentencepiece package and Hugging
Face's tokenizers.
"""

import base64
import io
import json
import random
import struct
from itertools import groupby
from pathlib import Path

import pytest

from data.errors import InputError
from data.tokenizer import Tokenizer
from data.tokenizer_json import write_tokenizer_json
from data.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, fields, llama_vocabulary

ROOT = Path(__file__).parent.parent
TOY = ROOT / "data" / "world" / "toy.tiktoken"
ODD = [
    "\0",
    "\n",
    "\t",
    "\r\n",
    "\x1c",
    "\x85",
    " ",
    "  ",
    "   ",
    " " * 17,
    "\u2581",
    "é",
    "e\u0301",
    "日本",
    "😀",
]
ODD += [
    "\u200b",
    "\ufeff",
    "\u3000",
    "\xa0",
    "\ufffd",
    "\U0010ffff",
    "𝒳",
    "<0x0A>",
    "हिन्दी",
    "العربية",
    "한국어",
]
ODD += ["👨‍👩‍👧"]
CODE = [
    "def f(x):\n    return x**2",
    "for (int i=0; i<n; ++i) {",
    "<s>",
    "</s>",
    "<unk>",
    "[INST]",
    "3.14159",
    "0x1F",
]
ASSETS = ["llama2", "stories260K/hf"]  # the two settings of the normaliser


def generated_strings(seed: int, count: int, words: list[str]) -> list[str]:
    """Strings of up to 13 parts: odd characters, code, words, and single characters of many
    scripts.
    """
    rng = random.Random(seed)

    def part() -> str:
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(ODD)
        if kind < 0.45:
            return rng.choice(CODE)
        if kind < 0.8:
            return rng.choice(words)
        code = rng.randrange(rng.choice([0x80, 0x600, 0x3000, 0x10000, 0x11000, 0x20000]))
        return "" if 0xD800 <= code < 0xE000 else chr(code)  # a lone surrogate is no character

    return ["".join(part() for _ in range(rng.randrange(14))) for _ in range(count)]


def words_of(tokenizer: Tokenizer) -> list[str]:
    """What the visible pieces look like."""
    return [piece.decode("utf-8", "ignore") for piece in tokenizer.vocabulary.pieces if piece]


def reference(path: Path):
    """The sentencepiece package's reading of the same file."""
    return pytest.importorskip("sentencepiece").SentencePieceProcessor(str(path))


# ---- the toy kind ----


def test_toy_tokenizer():
    tokenizer = Tokenizer(TOY)
    n = len(TOY.read_text().splitlines())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (
        n,
        n + 1,
        -1,
        n + 2,
    )
    ids = tokenizer.encode("Hello, world 42", bos=True, eos=True)
    assert (ids[0], ids[-1]) == (n, n + 1)
    assert tokenizer.decode(ids) == "Hello, world 42"
    assert tokenizer.encode("") == []
    for text in generated_strings(0, 500, words_of(tokenizer)):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not {n, n + 1} & set(tokenizer.encode("<s></s>"))


def test_toy_pattern_cuts_before_a_space():
    # The answer of a dialog may be encoded apart from its prompt: a cut before " x" changes
    # nothing.
    tokenizer = Tokenizer(TOY)
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(
            rng.choice(["a", "the", " ", "  ", "\n", "1", ".", "é", "\t", " on"]) for _ in range(12)
        )
        for i in range(1, len(text) - 1):
            if text[i] == " " and not text[i + 1].isspace():
                assert tokenizer.encode(text[:i]) + tokenizer.encode(text[i:]) == tokenizer.encode(
                    text
                ), (text, i)


def test_decode_refuses_ids_that_are_none():
    tokenizer = Tokenizer(TOY)
    for ids in ([-1], [0, tokenizer.vocab_size]):
        with pytest.raises(InputError, match=f"0 … {tokenizer.vocab_size - 1}"):
            tokenizer.decode(ids)


def test_lone_surrogate_becomes_a_replacement_character():
    tokenizer = Tokenizer(TOY)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_fingerprint_and_save(tmp_path):
    tokenizer = Tokenizer(TOY)
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == TOY.read_bytes()
    assert Tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    lines = TOY.read_bytes().splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:-1]))
    assert Tokenizer(tmp_path).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda lines: lines[:4] + ["what is this"] + lines[5:],
            "line 5: expected `base64-bytes 4`",
        ),
        (lambda lines: lines[:4] + lines[5:], "line 5: expected `base64-bytes 4`"),
        (lambda lines: lines + [lines[-1]], "expected `base64-bytes"),
        (lambda lines: [f"{base64.b64encode(b'ab').decode()} 0"] + lines[1:], "all 256 bytes"),
        (lambda lines: lines + [f" {len(lines)}"], "an empty token"),
    ],
)
def test_broken_rank_file(tmp_path, change, message):
    path = tmp_path / "tokenizer.model"
    path.write_text("".join(line + "\n" for line in change(TOY.read_text().splitlines())))
    with pytest.raises(InputError, match=message):
        Tokenizer(path)


def test_missing_tokenizer(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no tokenizer there"):
            Tokenizer(path)


# ---- SentencePiece ----


def test_llama_vectors(assets):
    tokenizer = Tokenizer(assets / "llama2")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (
        1,
        2,
        -1,
        32000,
    )
    for row in json.loads((assets / "llama2" / "vectors_llama_cpp.json").read_text()):
        assert tokenizer.encode(row["text"]) == row["ids"]
    for row in json.loads((assets / "llama2" / "vectors_llama_tokenizer_js.json").read_text()):
        assert tokenizer.encode(row["text"], bos=True) == row["ids_with_bos"]


def test_chat_tags(assets):
    # The ids that Meta's chat format has: "[INST] hello [/INST]" and " <<SYS>>".
    tokenizer = Tokenizer(assets / "llama2")
    assert tokenizer.encode("[INST] hello [/INST]", bos=True) == [
        1,
        518,
        25580,
        29962,
        22172,
        518,
        29914,
        25580,
        29962,
    ]
    assert tokenizer.encode("<<SYS>>") == [3532, 14816, 29903, 6778]


@pytest.mark.parametrize("name", ASSETS)
def test_sentencepiece_equals_the_package(assets, name):
    path = assets / name / "tokenizer.model"
    tokenizer, sentencepiece = Tokenizer(path), reference(path)
    texts = generated_strings(1, 20000, words_of(tokenizer))
    expected = sentencepiece.encode(texts)
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == ids, text
    for text, ids, decoded in zip(texts, expected, sentencepiece.decode(expected), strict=True):
        assert tokenizer.decode(ids) == decoded, text
        if name == "llama2" and "\u2581" not in text:
            assert decoded == text


@pytest.mark.parametrize("name", ASSETS)
def test_decode_any_ids(assets, name):
    # Half characters, control pieces between them, spaces in front: what a model may sample.
    path = assets / name / "tokenizer.model"
    tokenizer, sentencepiece = Tokenizer(path), reference(path)
    rng = random.Random(2)
    n = tokenizer.vocab_size
    spaces = [i for i, text in enumerate(tokenizer.vocabulary.names) if text.startswith("▁")][:300]
    halves = [byte + 3 for byte in (0x20, 0xE2, 0x96, 0x81, 0xF0, 0x9F, 0x98, 0xED, 0xA0)]
    pools = [range(n), range(3, 259), range(3), spaces, halves]
    for _ in range(10000):
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 8))]
        assert tokenizer.decode(ids) == sentencepiece.decode(ids), ids


def train_sentencepiece(**settings) -> bytes:
    """A small SentencePiece model, trained on this repository's own text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "vocab_size": 700,
    } | settings
    lines = [line for line in (ROOT / "model.py").read_text().splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, num_threads=1, minloglevel=2, **settings
    )
    return model.getvalue()


def without_pieces(content: bytes, share: float) -> bytes:
    """The model without a random share of its pieces of several characters: others can then never
    be merged.
    """
    rng = random.Random(3)
    kept = bytearray()
    for number, value in fields(content):
        piece = dict(fields(value)) if number == 1 else {}
        if (
            piece.get(3, NORMAL) != NORMAL
            or len(piece.get(1, b"").decode()) < 2
            or rng.random() > share
        ):
            size = len(value)
            kept += bytes([number * 8 + 2]) + (
                bytes([size]) if size < 128 else bytes([size % 128 + 128, size // 128])
            )
            kept += value
    return bytes(kept)


@pytest.mark.parametrize(
    "settings",
    [
        {"split_by_whitespace": False},  # pieces that reach across spaces
        {"add_dummy_prefix": False},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
        {"without": 0.4},  # pieces that merging never makes
        {"without": 0.4, "split_by_whitespace": False},
    ],
)
def test_other_sentencepiece_models(tmp_path, settings):
    path = tmp_path / "tokenizer.model"
    share = settings.get("without", 0)
    content = train_sentencepiece(
        **{name: value for name, value in settings.items() if name != "without"}
    )
    path.write_bytes(without_pieces(content, share))
    tokenizer, sentencepiece = Tokenizer(path), reference(path)
    assert tokenizer.vocab_size == (700 if not share else sentencepiece.vocab_size())
    for text in generated_strings(4, 1500, words_of(tokenizer)) + words_of(tokenizer):
        ids = sentencepiece.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == sentencepiece.decode(ids), text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "unigram"}, "other than BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normaliser that changes characters"),
        ({"treat_whitespace_as_suffix": True}, "spaces treated in another way"),
        ({"byte_fallback": False, "vocab_size": 300}, "no byte fallback"),
        ({"user_defined_symbols": ["<tool>"]}, "user-defined"),
        ({"bos_id": -1}, "no <s>"),
    ],
)
def test_refused_sentencepiece_models(tmp_path, settings, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(**settings))
    with pytest.raises(InputError, match=message):
        Tokenizer(path)


def field(number: int, value: bytes | int) -> bytes:
    """A field of a protocol-buffer message, of less than 128 bytes or a number below 128."""
    key = number * 8 + (0 if isinstance(value, int) else 2)
    head = bytes([key] if key < 128 else [key % 128 + 128, key // 128])
    return head + (bytes([value]) if isinstance(value, int) else bytes([len(value)]) + value)


def test_refused_parts_of_a_sentencepiece_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    content = train_sentencepiece()
    trainer, piece = 2, 1
    nan = field(1, b"zq") + b"\x15" + struct.pack("<f", float("nan"))
    for added, message in [
        (field(trainer, field(46, b"</s>")), "other names for BOS and EOS"),
        (field(trainer, field(47, b"<s>")), "other names for BOS and EOS"),
        (field(trainer, field(44, 5)), "or cut short"),
        (field(piece, field(1, b"zq") + field(3, 9)), "unknown kinds of pieces"),
        (field(piece, nan), "a score that is no number"),
        (field(piece, field(1, b"")), "an empty piece"),
        (b"\x08" + b"\xff" * 10**6, "or cut short"),  # a number without an end
    ]:
        path.write_bytes(content + added)
        with pytest.raises(InputError, match=message):
            Tokenizer(path)


def test_unreadable_tokenizer(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(TOY.read_bytes())

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(InputError, match=r"tokenizer.model: not readable \(Permission denied\)"):
        Tokenizer(tmp_path)


def test_broken_sentencepiece_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    content = train_sentencepiece()
    for length in range(0, len(content) - 1, 97):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="tokenizer.model"):
            Tokenizer(path)
    rng = random.Random(5)
    for _ in range(300):  # flipped bits: read or refused, nothing else
        broken = bytearray(content)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            Tokenizer(path)
        except InputError:
            pass


# ---- tokenizer.json ----


@pytest.mark.parametrize("name", ["toy", *ASSETS])
def test_write_tokenizer_json(request, tmp_path, name):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = Tokenizer(TOY if name == "toy" else request.getfixturevalue("assets") / name)
    path = tmp_path / "tokenizer.json"
    path.write_text(write_tokenizer_json(tokenizer.vocabulary), "utf-8")
    theirs, again = tokenizers.Tokenizer.from_file(str(path)), Tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in generated_strings(6, 3000, words_of(tokenizer)):
        # there, these are no text
        text = text.replace("<s>", "").replace("</s>", "").replace("<unk>", "")
        ids = tokenizer.encode(text, bos=True)
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids) == again.decode(ids) == tokenizer.decode(ids), text
        assert again.encode(text, bos=True) == ids
    again.save(tmp_path / "..")
    assert (tmp_path / ".." / "tokenizer.json").read_bytes() == path.read_bytes()


def hub_merges(names: list[str], scores: list[float]) -> list[str]:
    """The merges as transformers 4 made them from a SentencePiece model, for the files on the hub
    (its `convert_slow_tokenizer.py`: by score; among equals, such as runs of spaces, the longer
    left part first)."""
    ids = {name: i for i, name in enumerate(names)}
    merges = []
    for name, score in zip(names, scores, strict=True):
        pairs = [
            (name[:n], name[n:], score)
            for n in range(1, len(name))
            if name[:n] in ids and name[n:] in ids
        ]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    merges.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return [f"{left} {right}" for left, right, _ in merges]


def test_tokenizer_json_of_the_hub(assets, tmp_path):
    path = assets / "llama2" / "tokenizer.model"
    tokenizer, sentencepiece = Tokenizer(path), reference(path)
    file = json.loads(write_tokenizer_json(tokenizer.vocabulary))
    scores = [sentencepiece.get_score(i) for i in range(32000)]
    file["model"]["merges"] = hub_merges(tokenizer.vocabulary.names, scores)
    runs = [merge.replace(" ", "") for merge in file["model"]["merges"] if not merge.strip("▁ ")]
    assert len([*groupby(runs)]) > len(set(runs))  # the merges of spaces are not in order there
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert Tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def small_json() -> dict:
    """A small tokenizer.json of the Llama 2 kind, as an object."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *"▁abcé",
        "ab",
        "abc",
        "bc",
        "▁a",
    ]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 9]
    vocabulary = llama_vocabulary(
        names, types, ["ab", "▁a", "bc", "abc"], (True, False), b" ?", TOY
    )
    return json.loads(write_tokenizer_json(vocabulary))


def test_small_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json()))
    tokenizer = Tokenizer(tmp_path)
    assert [tokenizer.vocabulary.names[i] for i in tokenizer.encode("abca é")] == [
        "▁",
        "abc",
        "a",
        "▁",
        "é",
    ]


def test_other_tokenizer_json(tmp_path):
    cases = {
        "a normaliser or pre-tokeniser": lambda file: file.update(
            pre_tokenizer={"type": "Metaspace"}
        ),
        "a normaliser": lambda file: file.update(normalizer=None),
        "a model other": lambda file: file["model"].update(byte_fallback=False),
        "broken": lambda file: file.pop("model"),
        "with a byte-pair model": lambda file: file["model"].pop("merges"),
        "more than their result": lambda file: file["model"]["merges"].remove("a bc"),
        "another order": (
            lambda file: file["model"]["merges"].insert(0, file["model"]["merges"].pop())
        ),
        "added tokens": (
            lambda file: file["added_tokens"].append(
                {"id": 268, "content": "<tool>", "special": False}
            )
        ),
        "ids that are not": lambda file: file["model"]["vocab"].update(zzz=999),
        "ids that are not 0, 1": lambda file: file["model"]["vocab"].update(ab=float(AB)),
        "ids are not those of": lambda file: swap_added(file, "<s>", "</s>"),
        "a model other than": lambda file: file["model"].update(dropout=0.1),
        "a model other than Llama 2's": lambda file: file["model"].update(end_of_word_suffix="c"),
        "added tokens that merging makes": lambda file: add_token(file, "ab", AB),
        "that merging makes": lambda file: file["model"].update(unk_token="ab"),
        "more than 1000 characters": lambda file: rename(file, "abc", "a" * 1001),
        "pieces that it does not have": lambda file: rename(file, "bc", "zz"),
        "an empty piece": lambda file: rename(file, "é", ""),
        "broken, or": lambda file: rename(file, "é", "\ud800"),
        "broken, or no": lambda file: file["model"].update(unk_token=[]),
        "broken, or no tokenizer": lambda file: file["model"]["merges"].append([["a"], ["b"]]),
    }
    for message, change in cases.items():
        file = small_json()
        change(file)
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        with pytest.raises(InputError, match=message):
            Tokenizer(tmp_path)
    for content in ("{ not JSON", '{"model": ' + "[" * 100_000):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match="broken"):
            Tokenizer(tmp_path)


AB = 264  # the id of "ab" in `small_json`


def add_token(file: dict, name: str, number: int) -> None:
    """One more special token."""
    file["added_tokens"].append({"id": number, "content": name, "special": True})


def swap_added(file: dict, one: str, other: str) -> None:
    """The ids of two added tokens exchanged, there alone."""
    tokens = {token["content"]: token for token in file["added_tokens"]}
    tokens[one]["id"], tokens[other]["id"] = tokens[other]["id"], tokens[one]["id"]


def rename(file: dict, old: str, new: str) -> None:
    """A piece under another name, in the vocabulary alone."""
    file["model"]["vocab"][new] = file["model"]["vocab"].pop(old)


def test_tokenizer_json_without_merges(tmp_path):
    file = small_json()
    file["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    tokenizer = Tokenizer(tmp_path)
    assert [tokenizer.vocabulary.names[i] for i in tokenizer.encode("ab")] == ["▁", "a", "b"]


def swap_bos_and_eos(file: dict) -> None:
    """BOS and EOS exchanged wherever they are numbered."""
    vocab = file["model"]["vocab"]
    vocab["<s>"], vocab["</s>"] = vocab["</s>"], vocab["<s>"]
    swap_added(file, "<s>", "</s>")
    file["added_tokens"].reverse()
    file["post_processor"]["special_tokens"]["<s>"]["ids"] = [vocab["<s>"]]


def test_toy_tokenizer_json_with_another_part(tmp_path):
    path = tmp_path / "tokenizer.json"
    written = write_tokenizer_json(Tokenizer(TOY).vocabulary)
    # as tokenizers and transformers write it again
    file = json.loads(written)
    file["model"]["merges"] = [merge.split(" ") for merge in file["model"]["merges"]]
    file["truncation"] = {"max_length": 5}
    path.write_text(json.dumps(file))
    assert Tokenizer(path).fingerprint == Tokenizer(TOY).fingerprint
    parts = {
        "normalizer": lambda file: file.update(normalizer={"type": "Lowercase"}),
        "pre_tokenizer": lambda file: file["pre_tokenizer"]["pretokenizers"].pop(0),
        "post_processor": lambda file: file.update(post_processor=None),
        "decoder": lambda file: file.update(decoder=None),
        "post_processor than": swap_bos_and_eos,
        "added_tokens": lambda file: file["added_tokens"][0].update(normalized=True),
        "model.dropout": lambda file: file["model"].update(dropout=0.5),
        "model.unk_token": lambda file: file["model"].update(unk_token="a"),
        "model.fuse_unk": lambda file: file["model"].update(fuse_unk=True),
        "model.end_of_word_suffix": lambda file: file["model"].update(end_of_word_suffix="e"),
        "model.merges": lambda file: file["model"]["merges"].reverse(),
        "model.merges than": lambda file: file["model"]["merges"].pop(),
    }
    for part, change in parts.items():
        file = json.loads(written)
        change(file)
        path.write_text(json.dumps(file))
        with pytest.raises(InputError, match=f"another {part}"):
            Tokenizer(path)
    file = json.loads(written)
    rename(file, "a", "日")
    path.write_text(json.dumps(file))
    with pytest.raises(InputError, match="characters that are no bytes"):
        Tokenizer(path)
