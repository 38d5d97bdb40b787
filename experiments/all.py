"""Everything that is published, made again.

    python -m experiments.all --list           what is missing
    python -m experiments.all --at-once 2      make it: hours

A piece of work is one seed of one experiment, a process of its own on one thread (`python -m
experiments.NAME --seeds SEED`), which keeps OUT/results/NAME-SEED.json. What is there already, made
with the same settings, is not made again; so this command can be stopped and run again.

    1. what needs no other experiment: the chains of `seeds`, the pipelines of `reference`, ...
    2. all that measures their models
    3. experiments/results, put together from the seeds; then docs/results.md
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data import world
from experiments import publish
from experiments.shared import results
from experiments.shared.index import EXPERIMENTS, Experiment
from experiments.shared.processes import side_by_side
from experiments.shared.settings import ExperimentSettings
from runtime import parse_settings, run

# it has no seeds: one answer of one model of the reference runs
MICROSCOPE = ["-m", "experiments.ppo_microscope", "--publish", "--out", "out/final/1"]


@dataclass
class Settings(ExperimentSettings):
    at_once: int = 2  # how many seeds, of whatever experiments, run side by side
    logs: Path = Path("out/experiments")  # what they print goes there
    list: bool = False  # only say what is missing


class Piece(NamedTuple):
    """One seed of one experiment."""

    experiment: Experiment
    seed: int
    is_there: bool

    @property
    def name(self) -> str:
        return f"{self.experiment.result}-{self.seed}"

    @property
    def command(self) -> list[str]:
        option = "--seeds" if hasattr(self.experiment.load().Settings, "seeds") else "--seed"
        return ["-m", f"experiments.{self.experiment.module}", option, str(self.seed)]


def seeds_of(settings) -> tuple[int, ...]:
    """The seeds of an experiment's settings: several, or the one that it has."""
    return getattr(settings, "seeds", None) or (settings.seed,)


def pieces(experiments: Iterable[Experiment]) -> list[Piece]:
    """All published seeds of these experiments; the microscope has none.

    Raises:
        InputError: one is there that was made with other settings.
    """
    work = []
    for experiment in experiments:
        if experiment.module == "ppo_microscope":
            continue
        settings = experiment.load().Settings()
        for seed in seeds_of(settings):
            result = results.load_seed(experiment.result, seed, settings)
            work.append(Piece(experiment, seed, result is not None))
    return work


def print_missing(work: list[Piece]) -> None:
    for piece in work:
        state = "there" if piece.is_there else "missing"
        print(f"{piece.name:<24}{state:<10}python {' '.join(piece.command)}")
    count = sum(not piece.is_there for piece in work)
    print(f"{count} of {len(work)} are missing")


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv=argv)
    world.ensure()
    work = pieces(EXPERIMENTS)
    if settings.list:
        return print_missing(work)

    # 1. what needs nothing, 2. what measures the models of these
    independent = [piece for piece in work if not piece.experiment.needs]
    dependent = [piece for piece in work if piece.experiment.needs]
    for phase in (independent, dependent):
        jobs = {piece.name: [piece.command] for piece in phase if not piece.is_there}
        side_by_side(jobs, settings.logs, settings.at_once)

    # 3. put together what is published
    jobs = {}
    for experiment in EXPERIMENTS:
        command = ["-m", f"experiments.{experiment.module}"]
        if experiment.module == "ppo_microscope":
            command = MICROSCOPE
        jobs[experiment.result] = [command]
    side_by_side(jobs, settings.logs, settings.at_once)
    publish.main()


if __name__ == "__main__":
    run(main)
