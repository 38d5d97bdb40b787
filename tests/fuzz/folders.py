"""Model folders of every layout: Meta's, Hugging Face's, with each kind of tokenizer, and reward
models.
"""

import contextlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import torch

from data import Tokenizer, world
from data.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN
from model import ModelArgs, Transformer
from reward import RewardModel, load_reward_model, save_reward_model, score
from runtime import export_hf, load_model, run, save_model
from tests.fuzz.judge import Case, OtherResult, Wrong
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_json_file, mutate_pth

TEXTS = ["Hi  there, 12 birds!", " [INST] é\n\tab  abc [/INST] ", "hubba ab a b  bab", ""]
SHAPE = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16}


# ---- valid folders ----


def small_ranks() -> bytes:
    """The first 300 lines of the toy vocabulary: all bytes and 44 merges."""
    return b"".join(world.TOKENIZER.read_bytes().splitlines(keepends=True)[:300])


def varint(number: int) -> bytes:
    more = b""
    while number > 127:
        more += bytes([number & 127 | 128])
        number >>= 7
    return more + bytes([number])


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol-buffer message."""
    if isinstance(value, int):
        return varint(8 * number) + varint(value)
    return varint(8 * number + 2) + varint(len(value)) + value


def sentencepiece() -> bytes:
    """A small `tokenizer.model` of Llama 2's kind."""
    control = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    characters = [(name, NORMAL) for name in "▁abhuité,!12"]
    merges = [(name, NORMAL) for name in ("ab", "▁a", "▁ab", "bb", "▁h", "▁hu", "▁▁")]
    names = control + [(f"<0x{byte:02X}>", BYTE) for byte in range(256)] + merges + characters
    content = b""
    for number, (name, kind) in enumerate(names):
        score = varint(8 * 2 + 5) + struct.pack("<f", -number)
        content += field(1, field(1, name.encode()) + score + field(3, kind))
    return content + field(2, field(3, 2) + field(35, 1)) + field(3, field(4, 0))


def model_for(tokenizer: Tokenizer, **changes) -> Transformer:
    args = {**SHAPE, "vocab_size": tokenizer.vocab_size, "max_seq_len": 64}
    model = Transformer(ModelArgs(**args | changes))
    model.init_weights(0)
    return model.eval()


def prepare(folder: Path) -> dict[str, tuple]:
    """{layout: (its files by name, what loading it gives)}."""
    shutil.rmtree(folder)
    for kind, content in (("toy", small_ranks()), ("llama", sentencepiece())):
        (folder / kind).mkdir(parents=True)
        (folder / kind / "tokenizer.model").write_bytes(content)
    toy, llama = Tokenizer(folder / "toy"), Tokenizer(folder / "llama")
    save_model(folder / "meta", model_for(toy), toy)
    save_model(folder / "meta-llama", model_for(llama, rope_theta=5e5), llama)
    export_hf(folder / "hf", model_for(toy, tie_word_embeddings=True), toy)
    export_hf(folder / "hf-shards", model_for(llama), llama, max_file_bytes=20_000)
    (folder / "hf-shards" / "tokenizer.model").unlink()
    torch.manual_seed(0)
    reward_model = RewardModel(model_for(toy))
    reward_model.shift.fill_(0.25)
    save_reward_model(folder / "reward", reward_model, toy)
    valid = {}
    for layout in ("meta", "meta-llama", "hf", "hf-shards", "reward"):
        files = {path.name: path.read_bytes() for path in (folder / layout).iterdir()}
        for unread in ("generation_config.json", "tokenizer_config.json"):
            files.pop(unread, None)
        valid[layout] = files, load(folder / layout)
    return valid


# ---- loading ----


@torch.inference_mode()
def load(folder: Path) -> tuple:
    """(logits or scores, ids): all that a model and its tokenizer give."""
    if (folder / "reward_head.pth").exists():
        model, tokenizer = load_reward_model(folder)
        numbers = score(model, [[1, 2, 3], [4, 5]])
    else:
        model, tokenizer = load_model(folder)
        count = min(8, model.args.max_seq_len)
        numbers = model(torch.arange(count)[None])  # (1, count, vocab)
    ids = [tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]
    decoded = [tokenizer.decode(one) for one in ids]
    return numbers, (ids, decoded)


def load_and_compare(folder: Path, expected: tuple, changed: str) -> None:
    numbers, ids = load(folder)
    if changed == "tokenizer.json":
        check_tokenizer(folder, ids[0])
    if changed == "config.json":
        check_config(folder, numbers)
    if ids != expected[1]:
        raise OtherResult("other ids")
    if not torch.equal(numbers, expected[0]):
        raise OtherResult("other numbers" if numbers.isfinite().all() else "numbers not finite")


def warm_up() -> None:
    """Hugging Face's libraries, which take seconds; without them nothing is compared with."""
    os.environ["RUST_BACKTRACE"] = "0"
    with contextlib.suppress(ImportError):
        from transformers import LlamaForCausalLM, utils

        utils.logging.disable_progress_bar()
        utils.logging.set_verbosity_error()
        assert LlamaForCausalLM


def their_ids(folder: Path) -> list[list[int]]:
    tokenizer = sys.modules["tokenizers"].Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


@torch.inference_mode()
def their_logits(folder: Path) -> torch.Tensor:
    cls = sys.modules["transformers"].LlamaForCausalLM
    model = cls.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(8)[None]).logits  # (1, 8, vocab)


def theirs(read: Callable, folder: Path):
    """Hugging Face's own reading of an accepted folder; None where it refuses it, too."""
    if "transformers" not in sys.modules:
        return None
    try:
        return read(folder)
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of the tokenizers library is no Exception
        return None


def check_tokenizer(folder: Path, ids: list[list[int]]) -> None:
    others = theirs(their_ids, folder)
    if others is None:
        return
    for text, ours, other in zip(TEXTS, ids, others, strict=True):
        ours = ours[:-1]  # without EOS
        if ours != other:
            raise Wrong(f"{text!r} is {ours[:9]}, by Hugging Face's tokenizers {other[:9]}")


def check_config(folder: Path, logits: torch.Tensor) -> None:
    other = theirs(their_logits, folder)
    if other is not None and logits.shape[1] == 8:
        difference = (other - logits).abs().max().item()
        if not difference < 1e-3:
            raise Wrong(f"logits differ from transformers' by {difference:.2g}")


# ---- one case ----


def mutate_header(rng: Random, content: bytes) -> tuple[str, bytes]:
    """A .safetensors file (eight bytes of length, a JSON header, numbers) with a header changed."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, content)
    length = struct.unpack("<Q", content[:8])[0]
    about, text = mutate_json(rng, json.loads(content[8 : 8 + length]))
    header = text.encode("utf-8", "surrogatepass")
    return f"header, {about}", struct.pack("<Q", len(header)) + header + content[8 + length :]


def mutate_lines(rng: Random, content: bytes) -> tuple[str, bytes]:
    """A file of lines with one there twice, gone, moved or cut; or bytes changed."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    kind = rng.choice(["bytes", "bytes", "twice", "gone", "last", "cut"])
    if kind == "bytes":
        return mutate_bytes(rng, content)
    line = lines.pop(number)
    if kind == "twice":
        lines[number:number] = [line, line]
    elif kind == "last":
        lines.append(line)
    elif kind == "cut":
        lines.insert(number, line[: rng.randrange(len(line) + 1)])
    return f"line {number + 1} {kind}", b"\n".join(lines)


MUTATE = {
    ".json": mutate_json_file,
    ".pth": mutate_pth,
    ".safetensors": mutate_header,
    ".model": mutate_lines,
}


def change_file(rng: Random, path: Path) -> str:
    """The file itself is gone, a folder, or another name's."""
    kind = rng.choice(["gone", "a folder", "renamed", "twice"])
    content = path.read_bytes()
    if kind == "twice":
        path.with_name(path.name.replace(".00.", ".01.") + "x").write_bytes(content)
        path.with_name(path.name.replace(".00.", ".01.")).write_bytes(content)
        return kind
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "renamed":
        path.with_name("x" + path.name).write_bytes(content)
    return kind


def make(valid: dict[str, tuple], rng: Random, folder: Path) -> Case:
    layout = rng.choice(list(valid))
    files, expected = valid[layout]
    model = folder / layout  # beside nothing: a tokenizer one folder up would do
    model.mkdir()
    for name, content in files.items():
        (model / name).write_bytes(content)
    name = rng.choice(list(files))
    if rng.random() < 0.03:
        about = change_file(rng, model / name)
    else:
        about, content = MUTATE[Path(name).suffix](rng, files[name])
        (model / name).write_bytes(content)
    action = partial(run, partial(load_and_compare, model, expected, name))
    return Case(f"{layout}/{name}: {about}", action, folder, where=layout)
