"""How fast is `Tokenizer` with the real Llama 2 vocabulary, beside the sentencepiece package? One
thread, one process.

    python -m experiments.speed.tokenizer LLAMA2_FOLDER TEXT

TEXT is a plain or .gz file, cut or repeated to 5 MB. Both encode the same parts of the text, and
the ids are compared: line by line, by 1,000 characters, and all at once. The best of five runs
counts.
"""

import argparse
import gzip
import time
from collections.abc import Callable
from pathlib import Path

from data.tokenizer import Tokenizer, find_tokenizer

SIZE = 5_000_000  # characters


def best(action: Callable[[], object], repeats: int = 5) -> tuple[float, object]:
    """Seconds of the fastest run, and what the action returned."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def main() -> None:
    import sentencepiece

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "tokenizer", type=Path, help="a SentencePiece tokenizer.model, or the folder that holds it"
    )
    parser.add_argument("text", type=Path, help="English text, plain or .gz")
    arguments = parser.parse_args()
    path = find_tokenizer(arguments.tokenizer)
    ours = Tokenizer(path)
    theirs = sentencepiece.SentencePieceProcessor(str(path))
    text = read_text(arguments.text)
    print(f"{len(text.encode()) / 1e6:.1f} MB; {'MB/s':>20} ours  sentencepiece  ratio")
    thousands = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    cuts = {"by line": text.splitlines(), "by 1,000 characters": thousands, "at once": [text]}
    for name, texts in cuts.items():
        ids = race(f"encode {name}", texts, texts, ours.encode, theirs.encode)
        decoded = race(f"decode {name}", texts, ids, ours.decode, theirs.decode)
        assert decoded == texts


def read_text(path: Path) -> str:
    """SIZE characters of a plain or .gz file."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    text = content.decode()
    copies = SIZE // len(text) + 1
    return (text * copies)[:SIZE]


def race(name: str, texts: list[str], inputs: list, ours: Callable, theirs: Callable) -> list:
    """Both on the same inputs, their speed printed; what both make of them."""
    our_seconds, our_results = best(lambda: [ours(one) for one in inputs])
    their_seconds, their_results = best(lambda: [theirs(one) for one in inputs])
    assert our_results == their_results
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"{name:>31} {size / our_seconds:5.1f} {size / their_seconds:14.1f}"
        f" {their_seconds / our_seconds:6.1f}"
    )
    return our_results


if __name__ == "__main__":
    main()
