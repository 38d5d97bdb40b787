"""How fast is one answer, beside llama2.c?

    python -m experiments.speed.llama2c --llama2c FOLDER     FOLDER has its run.c

Batch 1, float32, greedy, from BOS on: the same tokens. llama2.c is compiled with `cc -Ofast
-march=native`, without OpenMP; its CPU seconds are those of its process. It is no package, so its
source must lie in a folder; without one, or without a compiler, it is skipped.
"""

import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from data import InputError
from experiments.speed.measuring import Case, Settings, Time, main, time_whole
from experiments.speed.sizes import Size, weight_bytes
from model import Transformer, generate

KIND = "Generation, against llama2.c"
BOS = 1  # ends an answer in llama2.c
# in the order of its file; between them stand the tables of RoPE, which it no longer reads
LAYERS = (
    "attention_norm",
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "ffn_norm",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


def cases(settings: Settings) -> Iterator[Case]:
    for size in settings.sizes:
        yield case(size, settings.llama2c, settings.few(127))


def case(size: Size, folder: str, new: int) -> Case:
    """One greedy answer of `new` tokens."""
    model = size.model()
    with torch.no_grad():
        model.output.weight[BOS] = 0  # the largest of the other logits is above 0
    skipped = why_not(folder)
    return Case(
        kind=KIND,
        name=f"{size.name}, float32, batch 1, greedy",
        unit="tokens",
        amount=new,
        ours=lambda: time_whole(lambda: sample_ours(model, new)),
        theirs=None if skipped else their_run(model, Path(folder), new),
        peer="llama2.c",
        skipped=skipped,
        bytes_read=new * weight_bytes(size.args, torch.float32),
    )


def why_not(folder: str) -> str:
    """Why llama2.c cannot run; "": it can."""
    if not folder:
        return "its source was not given (--llama2c)"
    if not (Path(folder) / "run.c").is_file():
        return f"no run.c in {folder}"
    return "" if shutil.which("cc") else "no C compiler"


def sample_ours(model: Transformer, new: int) -> list[int]:
    """The ids behind BOS."""
    return generate(model, [[BOS]], [(0,)], new, 0.0, eos_id=BOS)[0].ids


def their_run(model: Transformer, source: Path, new: int) -> Callable[[], Time]:
    """llama2.c on the same weights, compiled before the clock starts."""
    folder = tempfile.TemporaryDirectory()  # lives as long as the function below
    files = Path(folder.name)
    compiler = ["cc", "-Ofast", "-march=native", "-o", str(files / "run")]
    subprocess.run([*compiler, str(source / "run.c"), "-lm"], check=True)
    write_model(files / "model.bin", model)
    write_tokenizer(files / "tokenizer.bin", model.args.vocab_size)
    command = [str(files / "run"), str(files / "model.bin"), "-t", "0", "-n", str(new + 1)]
    command += ["-z", str(files / "tokenizer.bin")]

    def once() -> Time:
        assert folder.name
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise InputError(f"llama2.c ended with {process.returncode}")
        return Time(usage.ru_utime + usage.ru_stime, wall)

    return once


def write_model(path: Path, model: Transformer) -> None:
    """Our weights in llama2.c's first format: seven numbers, then all weights in float32."""
    args = model.args
    state = model.state_dict()
    tensors = [state["tok_embeddings.weight"]]
    for part in LAYERS:
        tensors += [state[f"layers.{i}.{part}.weight"] for i in range(args.n_layers)]
    tensors.append(state["norm.weight"])
    tensors.append(torch.zeros(args.max_seq_len, args.head_size))  # of RoPE, not read
    tensors.append(state["output.weight"])
    header = struct.pack(
        "7i",
        args.dim,
        args.hidden_size,
        args.n_layers,
        args.n_heads,
        args.kv_heads,
        -args.vocab_size,  # negative: the output matrix is not the embedding's
        args.max_seq_len,
    )
    with open(path, "wb") as file:
        file.write(header)
        for tensor in tensors:
            file.write(tensor.float().contiguous().numpy().tobytes())


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Words that mean nothing, in llama2.c's format: it prints them."""
    with open(path, "wb") as file:
        words = [f"w{i} ".encode() for i in range(vocab_size)]
        file.write(struct.pack("i", max(map(len, words))))
        for word in words:
            file.write(struct.pack("fi", 0.0, len(word)) + word)


if __name__ == "__main__":
    main(cases, __doc__)
