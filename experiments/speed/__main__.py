"""How fast is it? All kinds of work, ours and the peers' in turn, in one run.

    pip install -r experiments/speed/requirements.txt
    python -m experiments.speed             experiments/results/speed.json and .png, docs/speed.md
    python -m experiments.speed --tiny      does all of it run? into out/speed

Run it on a machine that does nothing else. `python -m experiments.speed.generation` measures one
kind and only prints it, likewise training, preferences, finetuning, llama2c,
ppo_iteration and cost.
"""

import json
from pathlib import Path

from experiments.speed import (
    cost,
    finetuning,
    generation,
    llama2c,
    measuring,
    page,
    ppo_iteration,
    preferences,
    training,
)
from experiments.speed.measuring import Settings
from report import print_tables
from runtime import atomic_write, parse_settings, run, set_threads

KINDS = (training, preferences, finetuning, generation, llama2c, ppo_iteration)


def save(file: Path, result: dict) -> None:
    """The result as JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as out:
        out.write((json.dumps(result, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv=argv)
    set_threads(1)
    trial = Path("out/speed/speed.json")
    is_published = settings == Settings()  # only the whole run is
    file = page.RESULT if is_published else trial

    machine = measuring.describe_machine()
    result = {"machine": machine, "repeats": settings.repeats, "rows": [], "cost": []}
    for kind in KINDS:
        for row in measuring.run_cases(kind.cases(settings), settings):
            result["rows"].append(row.to_json())
        save(trial, result)  # a run that is stopped keeps what it has
    if not settings.only:
        result["cost"] = cost.measure_all(settings.tiny)
        cost.draw(result["cost"], file.with_suffix(".png"))
    save(file, result)
    print_tables([page.section(result)])
    print(f"\nwrote {file}")
    if is_published:
        page.write(result)


if __name__ == "__main__":
    run(main)
