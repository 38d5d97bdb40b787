"""How fast is `Tokenizer` with the real Llama 2 vocabulary, beside the sentencepiece package? One
thread, one process.

    python experiments/speed/tokenizer.py LLAMA2_FOLDER TEXT

TEXT is a plain or .gz file, cut or repeated to 5 MB. Both encode the same parts of the text, and
the ids are compared: line by line, by 1,000 characters, and all at once. The best of five runs
counts.
"""

import argparse
import gzip
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from data.tokenizer import Tokenizer, find_tokenizer  # noqa: E402

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
    ours, theirs = Tokenizer(path), sentencepiece.SentencePieceProcessor(str(path))
    content = arguments.text.read_bytes()
    text = (gzip.decompress(content) if arguments.text.suffix == ".gz" else content).decode()
    text = (text * (SIZE // len(text) + 1))[:SIZE]
    print(f"{len(text.encode()) / 1e6:.1f} MB; {'MB/s':>20} ours  sentencepiece  ratio")
    thousands = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    for name, texts in (
        ("by line", text.splitlines()),
        ("by 1,000 characters", thousands),
        ("at once", [text]),
    ):
        ours_s, ours_ids = best(lambda texts=texts: [ours.encode(t) for t in texts])
        theirs_s, theirs_ids = best(lambda texts=texts: [theirs.encode(t) for t in texts])
        assert ours_ids == theirs_ids
        size = sum(len(t.encode()) for t in texts) / 1e6
        print(
            f"encode {name:>24} {size / ours_s:5.1f} {size / theirs_s:14.1f}"
            f" {theirs_s / ours_s:6.1f}"
        )
        ours_s, ours_texts = best(lambda ids=ours_ids: [ours.decode(t) for t in ids])
        theirs_s, theirs_texts = best(lambda ids=ours_ids: [theirs.decode(t) for t in ids])
        assert ours_texts == theirs_texts == texts
        print(
            f"decode {name:>24} {size / ours_s:5.1f} {size / theirs_s:14.1f}"
            f" {theirs_s / ours_s:6.1f}"
        )


if __name__ == "__main__":
    main()
