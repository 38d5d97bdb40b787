"""`python -m experiments`: each experiment's question, command and answer."""

from experiments.shared import results
from experiments.shared.index import CHAPTERS, Experiment
from runtime import run


def describe(experiment: Experiment) -> str:
    """An experiment in three lines."""
    command = experiment.command
    if experiment.minutes:
        command += f"    ({experiment.minutes.replace(' ', ' minutes ', 1)}, on two cores)"
    answer = "not published yet"
    if (results.RESULTS / f"{experiment.result}.json").exists():
        answer = experiment.load().section(results.published(experiment.result)).blocks[0]
    return f"{experiment.question}\n    {command}\n    {answer}"


def main() -> None:
    for chapter in CHAPTERS:
        print(f"\n=== {chapter.title}")
        for experiment in chapter.experiments:
            print(f"\n{describe(experiment)}", flush=True)
    print("\ndocs/results.md has all of it (`python -m experiments.publish`)")


if __name__ == "__main__":
    run(main)
