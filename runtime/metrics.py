"""The log of numbers, `metrics.jsonl`."""

from pathlib import Path

from data.errors import InputError
from runtime.checkpoint import atomic_write, json_line, naming, plain_json, resume_rows


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
        with naming(self.path), open(self.path, "ab") as file:
            file.write(json_line(row))

    def rewind(self, phase, step=0):
        """Drop the rows of this phase from `step` on: they are about to be made again.

        InputError naming the first row that lacks phase or step.
        """
        kept = []
        for number, row in enumerate(resume_rows(self.path), start=1):
            if not isinstance(row.get("phase"), str) or type(row.get("step")) is not int:
                raise InputError(
                    f"{self.path}, line {number}: a row has a 'phase' (text) and a 'step' (whole"
                    " number); mend the line, or delete the file"
                )
            if row["phase"] != phase or row["step"] < step:
                kept.append(row)
        with atomic_write(self.path) as file:
            file.write(b"".join(json_line(row) for row in kept))
