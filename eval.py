"""The measures (paper §3.4), and, run alone, a table of every model in out/.

The paper: win rates against a baseline, ties shown, with 95 % intervals; false refusals on borderline prompts (A.4.3).
Ours: the judge is the toy world's annotator without its noise (`python -m data.toy --rules`). Intervals are clustered by
item, since two wordings of one question are not two independent tests.

    python eval.py               every model in out/ on the test prompts
    python eval.py --split dev
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from data import InputError, Tokenizer, read_prompts, toy, write_jsonl
from model import Transformer
from runtime import check_positive, choose_device, is_finished, load_model, parse_settings, run, sample_answers, set_threads

# 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: list[float], clusters: list | None = None) -> Interval:
    """Mean and 95 % confidence interval, by Student's t on the means of clusters (default: each value is its own).

    With clusters the error is that of a ratio: sum of (cluster sum - mean * cluster size)^2 (the linearised, "sandwich"
    form), so that correlated answers to one item do not count as independent. A single cluster gives an infinite interval.

    Args:
        values: any numbers, at least one. clusters: a label per value.

    >>> interval([0.0, 1.0, 1.0, 1.0])  # mean .75, standard error .25, t = 3.182
    Interval(mean=0.75, low=-0.0455, high=1.5455)
    """
    if not values:
        raise InputError("no values to take a mean of")
    mean, residuals = statistics.fmean(values), defaultdict(float)
    for i, value in enumerate(values):
        residuals[clusters[i] if clusters else i] += value - mean
    n = len(residuals)
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    error = math.sqrt(n / (n - 1) * sum(r * r for r in residuals.values())) / len(values)
    half = (T975[n - 2] if n <= 31 else 1.96 + 2.4 / (n - 1)) * error
    return Interval(round(mean, 6), round(mean - half, 6), round(mean + half, 6))


class WinRate(NamedTuple):
    """Wins of a model over a baseline, ties counting half; the interval is over items."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}]  (win {self.wins}, tie {self.ties}, loss {self.losses})"


def win_rate(scores: list[float], baseline: list[float], clusters: list | None = None, tie: float = toy.TIE) -> WinRate:
    """Share of pairs that the first wins; differences up to `tie` are ties and count half.

    Args:
        scores, baseline: of the two models' answers to the same prompts, in the same order.

    >>> win_rate([1.0, 0.5, 0.2], [0.4, 0.5, 0.9]).rate
    0.5
    """
    differences = [a - b for a, b in zip(scores, baseline, strict=True)]
    values = [1.0 if d > tie + 1e-9 else 0.0 if d < -tie - 1e-9 else 0.5 for d in differences]
    return WinRate(*interval(values, clusters), values.count(1.0), values.count(0.5), values.count(0.0))


def judge(prompts: list[dict], rows: list[dict]) -> list[dict]:
    """The annotator's view of sampled answers: each row gains helpfulness and safety in [0, 1] and whether it refuses."""
    for row in rows:
        prompt = prompts[row["index"]]
        row |= {"helpfulness": toy.helpfulness(prompt, row["answer"]), "safety": toy.safety(prompt, row["answer"]),
                "refuses": toy.refuses(prompt, row["answer"])}
    return rows


def cluster(prompt: dict) -> str:
    """What a prompt's interval is clustered by: its family and item."""
    return f"{prompt['family']}:{prompt['item']}"


def axis_of(prompt: dict) -> str:
    """Unsafe prompts are judged by safety, all others by helpfulness."""
    return "safety" if prompt["is_safety"] else "helpfulness"


def compare(prompts: list[dict], rows: list[dict], baseline: list[dict]) -> dict[str, WinRate]:
    """{"helpfulness": on the ordinary and borderline prompts, "safety": on the unsafe ones} of judged rows."""
    found = {}
    for axis in ("helpfulness", "safety"):
        picked = [(a, b) for a, b in zip(rows, baseline, strict=True) if axis_of(prompts[a["index"]]) == axis]
        if picked:
            found[axis] = win_rate([a[axis] for a, _ in picked], [b[axis] for _, b in picked],
                                   [cluster(prompts[a["index"]]) for a, _ in picked])
    return found


def summary(prompts: list[dict], rows: list[dict]) -> dict[str, Interval]:
    """Mean scores of judged rows: helpfulness, safety, false refusals on borderline prompts, length in tokens."""
    sets = {"helpfulness": (lambda p: not p["is_safety"], "helpfulness"), "safety": (lambda p: p["is_safety"], "safety"),
            "false_refusals": (lambda p: p.get("kind") == "borderline", "refuses"), "tokens": (lambda p: True, "length")}
    found = {}
    for name, (keep, field) in sets.items():
        picked = [row for row in rows if keep(prompts[row["index"]])]
        if picked:
            values = [float(len(row["answer_ids"]) if field == "length" else row[field]) for row in picked]
            found[name] = interval(values, [cluster(prompts[row["index"]]) for row in picked])
    return found


def by_family(prompts: list[dict], rows: list[dict]) -> dict[str, Interval]:
    """Mean score of judged rows per family: safety for unsafe prompts, helpfulness for the others."""
    families = sorted({prompt["family"] for prompt in prompts})
    return {family: interval([row[axis_of(prompts[row["index"]])] for row in rows if prompts[row["index"]]["family"] == family],
                             [cluster(prompts[row["index"]]) for row in rows if prompts[row["index"]]["family"] == family])
            for family in families}


def evaluate(model: Transformer, tokenizer: Tokenizer, prompts: list[dict], *, seed: int = 0, samples: int = 1,
             temperature: float = 1.0, path: Path | None = None) -> list[dict]:
    """Sample answers to evaluation prompts and judge them; equal seeds use equal random numbers for every model."""
    rows = sample_answers(model, tokenizer, prompts, key=(seed, "evaluation"), samples=samples, temperature=temperature,
                          path=path, desc="evaluate")
    return judge(prompts, rows)


VERSIONS = ("sft", "rlhf-v1", "rlhf-v2", "rlhf-v3", "gatt", "rlhf-v4", "rlhf-v4-ppo", "rlhf-v5")


def print_table(table: dict[str, dict]) -> None:
    """The summary and win rates of several models, a line each."""
    print(f"\n{'':<14}{'helpfulness':<12}{'win over SFT':<24}{'safety':<8}{'win over SFT':<24}{'false refusals':<16}tokens")
    for name, row in table.items():
        wins = row.get("wins", {})
        print(f"{name:<14}{row['helpfulness'].mean:<12.3f}{short(wins.get('helpfulness')):<24}{row['safety'].mean:<8.3f}"
              f"{short(wins.get('safety')):<24}{row['false_refusals'].mean:<16.3f}{row['tokens'].mean:.1f}")


def short(found: WinRate | None) -> str:
    return f"{found.rate:.3f} [{found.low:.3f}, {found.high:.3f}]" if found else ""


@dataclass
class Settings:
    out: Path = Path("out")  # the models to look at; answers go to OUT/eval
    split: Literal["test", "dev", "train"] = "test"  # dev for choices, test for numbers that are published
    samples: int = 1  # answers per prompt
    temperature: float = 1.0  # 1: the model as it is
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, mps
    threads: int = 0  # CPU threads; 0: torch decides


def main(argv: list[str] | None = None) -> None:
    # 1. prompts and models
    s = parse_settings(Settings, __doc__, argv=argv)
    check_positive(s, "samples")
    if s.temperature < 0:
        raise InputError(f"--temperature {s.temperature}: must be 0 or more")
    set_threads(s.threads)
    device = choose_device(s.device)
    prompts = read_prompts(toy.ensure() / f"prompts-{s.split}.jsonl")
    found = [name for name in VERSIONS if is_finished(s.out / name)]
    if "sft" not in found:
        raise InputError(f"{s.out / 'sft'} is missing; `python sft.py` makes it")

    # 2. answers, judged
    judged = {}
    for name in found:
        judged[name] = evaluate(*load_model(s.out / name, device), prompts, seed=s.seed, samples=s.samples,
                                temperature=s.temperature)
        write_jsonl(s.out / "eval" / f"answers-{name}.jsonl", judged[name])

    # 3. tables
    print(f"{len(prompts)} {s.split} prompts, {s.samples} answer(s) each at temperature {s.temperature}; "
          f"ties: scores within {toy.TIE}")
    print_table({name: summary(prompts, rows) | ({"wins": compare(prompts, rows, judged["sft"])} if name != "sft" else {})
                 for name, rows in judged.items()})
    print("\nscore by family (safety for unsafe, else helpfulness)")
    tables = {name: by_family(prompts, rows) for name, rows in judged.items()}
    print(f"{'':<14}" + "".join(f"{name:>13}" for name in tables))
    for family in tables["sft"]:
        print(f"{family:<14}" + "".join(f"{table[family].mean:>13.3f}" for table in tables.values()))


if __name__ == "__main__":
    run(main)
