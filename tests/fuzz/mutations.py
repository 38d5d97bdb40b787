"""What can go wrong with a file: each function takes a random generator and something valid, and
returns it changed. `mutate_...` picks one, and says what it did.
"""

import io
import json
import math
from random import Random

import torch

# ---- bytes ----

STRANGE = [
    b"\0",
    b"\r\n",
    b"\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\x1f\x8b",
    b"{",
    b"=",
]


def flip_bits(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 4, 30])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def cut_out(rng: Random, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randint(1, 40) :]


def repeat_piece(rng: Random, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    end = start + rng.randint(1, 400)
    return content[:end] + content[start:]


def put_in(rng: Random, content: bytes) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + rng.choice(STRANGE) * rng.choice([1, 1, 8]) + content[place:]


def repeat_whole(rng: Random, content: bytes) -> bytes:
    return content * 2


def with_bom(rng: Random, content: bytes) -> bytes:
    return b"\xef\xbb\xbf" + content


def with_crlf(rng: Random, content: bytes) -> bytes:
    return content.replace(b"\n", b"\r\n")


def as_utf16(rng: Random, content: bytes) -> bytes:
    return content.decode("utf-8", "replace").encode("utf-16")


def without_content(rng: Random, content: bytes) -> bytes:
    return rng.choice([b"", b"\n", b"\0" * len(content), b"null", b"[]", b"{}", b"[" * 100_000])


def put_in_empty(rng: Random, content: bytes) -> bytes:
    return rng.choice(STRANGE)


RARE = [repeat_whole, with_bom, with_crlf, as_utf16, without_content]
BYTES = [flip_bits, truncate, cut_out, repeat_piece, put_in] * 3 + RARE


def mutate_bytes(rng: Random, content: bytes) -> tuple[str, bytes]:
    change = rng.choice(BYTES) if content else put_in_empty
    return change.__name__, change(rng, content)


# ---- JSON and trees like it ----

HOSTILE_JSON = [
    *("null", "true", "false", "0", "1", "-1", "2", "0.5", "-0.0", "1e-320", "1e308", "1e999"),
    *("NaN", "-Infinity", str(2**31), str(2**63), str(10**20), "1" * 5000),
    *('""', '" "', '"x"', '"none"', '"inf"', '"1"', '"\\ud800"', '"\\u0000"', '"\\u001b[31m"'),
    *('"[INST]"', '"a <</SYS>> b"', '"</s>"', '"\\u2028"', '"../../x"', '"' + "long " * 3000 + '"'),
    *("[]", "{}", "[null]", "[[]]", "[1, 2]", "[true]", '["a", 1]', '{"a": null}', "[-1, 0, 1]"),
    *('[{"role": "user", "content": "Hi"}]', "[0.5, NaN]", json.dumps([7] * 5000)),
    *("[" * 900 + "]" * 900, "[" * 100_000 + "]" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000),
]
MARK = "@mark@"


def pick_place(rng: Random, tree) -> tuple:
    """(container, key) of a value somewhere in a tree of dicts and lists."""
    while True:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        value = tree[key]
        has_more = isinstance(value, (dict, list)) and len(value) > 0
        if not has_more or rng.random() < 0.4:
            return tree, key
        tree = value


def mutate_json(rng: Random, tree) -> tuple[str, str]:
    """The tree with one value changed, removed, renamed or there twice, as text."""
    tree = json.loads(json.dumps(tree))  # a copy
    container, key = pick_place(rng, tree)
    kind = rng.choice(["replaced"] * 6 + ["removed", "renamed", "twice", "wrapped", "moved"])
    value = container[key]
    raw = rng.choice(HOSTILE_JSON)
    if kind == "replaced":
        container[key] = MARK
    elif kind == "wrapped":
        container[key] = [value]
    elif kind == "moved":
        other, name = pick_place(rng, tree)
        container[key] = json.loads(json.dumps(other[name]))
    elif kind == "removed" or isinstance(container, list):
        del container[key]
    elif kind == "renamed":
        container[f"{key}x"] = container.pop(key)
    else:  # the last of two counts
        raw = f"{raw}, {json.dumps(key)}: {json.dumps(value)}"
        container[key] = MARK
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5).replace(f'"{MARK}"', raw)
    shown = f" by {raw[:20]}" if kind in ("replaced", "twice") else ""
    return f"{key!r} {kind}{shown}", text


def mutate_jsonl(rng: Random, content: bytes) -> tuple[str, bytes]:
    """A JSONL file with a row changed, or bytes."""
    if rng.random() < 0.3 or not content.strip():
        return mutate_bytes(rng, content)
    lines = content.decode().splitlines()
    number = rng.randrange(len(lines))
    about, lines[number] = mutate_json(rng, json.loads(lines[number]))
    text = "".join(line + "\n" for line in lines)
    return f"line {number + 1}, {about}", text.encode("utf-8", "surrogatepass")


def mutate_json_file(rng: Random, content: bytes) -> tuple[str, bytes]:
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    about, text = mutate_json(rng, json.loads(content))
    return about, text.encode("utf-8", "surrogatepass")


# ---- tensors ----

HOSTILE_VALUES = [
    *(None, True, 0, 1, -1, 10**20, 0.5, math.nan, math.inf, "", "x", [], {}, [1], {"a": 1}, b"x"),
    *(torch.tensor(1.0), torch.tensor([]), torch.tensor(math.nan), torch.zeros(3, 3)),
]


def filled(value: float):
    return lambda tensor: torch.full_like(tensor, value)


def as_dtype(dtype: torch.dtype):
    return lambda tensor: tensor.to(dtype)


TENSORS = {
    "NaN": filled(math.nan),
    "infinite": filled(math.inf),
    "huge": filled(3e38),
    "one NaN": lambda x: x.index_fill(0, torch.tensor([0]), math.nan) if x.ndim else x * math.nan,
    "int8": as_dtype(torch.int8),
    "bool": as_dtype(torch.bool),
    "complex": as_dtype(torch.complex64),
    "float16": as_dtype(torch.float16),
    "float64": as_dtype(torch.float64),
    "float8": as_dtype(torch.float8_e4m3fn),
    "transposed": lambda x: x.T if x.ndim == 2 else x[None],
    "longer": lambda x: torch.cat([x, x]) if x.ndim else x.expand(2),
    "shorter": lambda x: x[:-1] if x.ndim else x[None][:0],
    "flat": lambda x: x.flatten(),
    "expanded": lambda x: x.flatten()[:1].expand(x.shape) if x.ndim else x,
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "with gradient": lambda x: torch.nn.Parameter(x.float()),
}


def mutate_tree(rng: Random, tree: dict) -> str:
    """Changes one value of a nested dict of tensors and plain values, in place; says which."""
    container, key = pick_place(rng, tree)
    value = container[key]
    kind = rng.choice(["tensor"] * 3 + ["replaced", "removed", "added"])
    if kind == "tensor" and isinstance(value, torch.Tensor):
        kind = rng.choice(list(TENSORS))
        container[key] = TENSORS[kind](value)
    elif kind == "removed" or (kind == "added" and isinstance(container, list)):
        del container[key]
    elif kind == "added":
        container[f"{key}.more"] = value
    else:
        container[key] = rng.choice(HOSTILE_VALUES)
        kind = f"replaced by {str(container[key])[:20]}"
    return f"{key} {kind}"


def mutate_pth(rng: Random, content: bytes) -> tuple[str, bytes]:
    """A file of `torch.save` with a value changed, in another format, or with bytes changed."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    state = torch.load(io.BytesIO(content), weights_only=True)
    kind = rng.choice(["value"] * 8 + ["old format", "list", "code", "empty"])
    about = kind
    if kind == "value":
        about = mutate_tree(rng, state)
    elif kind == "list":
        state = [state]
    elif kind == "code":
        state["code"] = Random
    elif kind == "empty":
        state = {}
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=kind != "old format")
    return about, file.getvalue()
