"""`python -m tests.fuzz`: see `tests/fuzz/__init__.py`."""

import argparse
import queue
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from tests.fuzz.judge import FAILURES, OUTCOMES, Result
from tests.fuzz.workers import Area, Worker

COUNTS = {"readers": 4000, "folders": 3000, "options": 4000, "runs": 30, "stages": 150}
SHOWN = 5  # cases of one cause


def fuzz(area: str, numbers: range, options: argparse.Namespace, until: float) -> dict[int, Result]:
    """How the cases of an area went, by number; those that time was left for."""
    results = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        workers = []
        for number in range(options.workers):
            folder = Path(scratch) / str(number)
            workers.append(Worker(area, options.seed, folder, options.limit))
        idle = queue.SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def run(number: int) -> None:
            if time.monotonic() > until:
                return
            worker = idle.get()
            results[number] = worker.run(number)
            idle.put(worker)

        with ThreadPoolExecutor(options.workers) as pool:
            finished = pool.map(run, numbers)
            for _ in tqdm(finished, desc=area, total=len(numbers), mininterval=1, disable=None):
                pass
        for worker in workers:
            worker.stop(5)
    return results


def again(area: str, number: int, options: argparse.Namespace) -> Result:
    """One case once more, in this process; its files stay."""
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    cases = Area(area, options.seed, scratch)
    print(f"the files are in {cases.folder}")
    result = cases.run(number)
    print(f"{result.about}\n{result.trace}{result.outcome}: {result.told}")
    return result


def print_cases(area: str, results: dict[int, Result], shown: list[str], seed: int) -> None:
    """A line for each case of these outcomes, those of one cause together."""
    causes = {}
    for number, result in sorted(results.items()):
        if result.outcome in shown:
            cause = re.sub(r"\d+|'.*'|\".*\"", "...", result.told)
            causes.setdefault((result.outcome, cause), []).append(number)
    for (outcome, _), numbers in sorted(causes.items()):
        told = results[numbers[0]].told[:300]
        print(f"\n{area}, {outcome}, {len(numbers)} times: {told}")
        for number in numbers[:SHOWN]:
            command = f"python -m tests.fuzz --only {area} --seed {seed} --case {number}"
            print(f"  {command}   # {results[number].about}")


def print_table(counts: dict[str, Counter]) -> None:
    print("\n" + f"{'area':<10}{'tried':>8}" + "".join(f"{name:>14}" for name in OUTCOMES))
    for area, counter in counts.items():
        numbers = "".join(f"{counter[name]:>14}" for name in OUTCOMES)
        print(f"{area:<10}{counter.total():>8}{numbers}")


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--only", choices=[*COUNTS, "traps"], help="this area alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help=f"cases of an area (default: {COUNTS})")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="only this one, with all that can be told")
    parser.add_argument("--minutes", type=float, default=60.0, help="no new case after these")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a case")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--show", action="append", choices=OUTCOMES, help="tell of these, too")
    options = parser.parse_args(argv)
    if options.case is not None and not options.only:
        parser.error("--case needs --only")
    return options


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 if there is any failure."""
    options = read_options(argv)
    if options.case is not None:
        return int(again(options.only, options.case, options).outcome in FAILURES)
    until = time.monotonic() + 60 * options.minutes
    counts = {}
    for area in [options.only] if options.only else COUNTS:
        count = options.count or COUNTS.get(area, 20)
        results = fuzz(area, range(options.first, options.first + count), options, until)
        print_cases(area, results, [*FAILURES, *(options.show or [])], options.seed)
        counts[area] = Counter(result.outcome for result in results.values())
    print_table(counts)
    failures = sum(counter[name] for counter in counts.values() for name in FAILURES)
    print(f"\n{failures} failures" + "".join(f"\n  {n}: {OUTCOMES[n]}" for n in OUTCOMES))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
