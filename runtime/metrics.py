"""The log of numbers, `metrics.jsonl`."""

import json
from pathlib import Path

from runtime.checkpoint import atomic_write, plain_json, resume_rows


class Metrics:
    """A log `metrics.jsonl`: each call appends one line {"phase", "step", numbers…} and writes it
    out at once.

    Opening it drops a last line that a kill cut short.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        resume_rows(self.path)

    def log(self, phase, step, **numbers):
        """Append a row. Floats keep six significant digits; NaN and infinity are written as null
        (JSON has neither).
        """
        row = {"phase": phase, "step": step, **plain_json(numbers, digits=6)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rewind(self, phase, step=0):
        """Drop the rows of this phase from `step` on: they are about to be made again."""
        rows = [
            row for row in resume_rows(self.path) if row["phase"] != phase or row["step"] < step
        ]
        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
