"""What the experiments share: where results go, running commands side by side, and fresh pairs and
reward models to study.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import eval as measures
from data import InputError, Tokenizer, read_preferences, read_prompts, world, write_jsonl
from data.chat import end_of_prompt
from data.jsonl import RATINGS
from model import Transformer
from rejection_sampling import Judges
from reward import (
    RewardModel,
    collect_preferences,
    pick_prompts,
    score_pairs,
    set_shift,
    train_reward_model,
)
from reward import Settings as RewardSettings
from runtime import (
    fingerprint,
    is_finished,
    load_model,
    newest_reward_models,
    plain_json,
    require,
    sample_answers,
    set_seed,
)

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
Scores = tuple[list[float], list[float]]  # of the chosen and of the rejected answers


# raised by hand when a change of code, world or defaults makes published numbers another thing's
RESULTS_VERSION = 1
NOT_MARKED = {
    "seeds",
    "out",
    "at_once",
    "threads",
    "device",
    "collect",
    "controls",
    "train_rounds",
    "arms",
    "sizes",
    "ppo",
}


def mark_of(settings) -> dict:
    """The mark of a result: the world, the experiment's resolved settings, the results version.
    Never the commit.

    settings: a dataclass. Left out is what changes no number of a seed, such as where models lie
        (NOT_MARKED).
    """
    fields = dataclasses.asdict(settings)
    kept = {name: value for name, value in fields.items() if name not in NOT_MARKED}
    return {"version": RESULTS_VERSION, "world": world.world_hash(), "settings": plain_json(kept)}


def save_result(name: str, result: dict, settings) -> None:
    """Write experiments/results/NAME.json, {"mark", "result"}, small enough to be committed.

    Floats are written to four digits, infinite ones as null. settings: of the experiment, for
    `mark_of`.
    """

    def rounded(value):
        if isinstance(value, dict):
            return {str(key): rounded(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [rounded(item) for item in value]
        if isinstance(value, float):
            return round(value, 4) if math.isfinite(value) else None
        return value

    RESULTS.mkdir(exist_ok=True)
    content = {"mark": mark_of(settings), "result": rounded(result)}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {RESULTS / name}.json")


def load_result(name: str, settings) -> dict:
    """The result in experiments/results/NAME.json, {} where there is none.

    Raises:
        InputError: the file has no mark, or another one than a result made now with these settings
            would have. Numbers of two worlds, settings or results versions are never mixed.
    """
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return {}
    content, expected = json.loads(file.read_text()), mark_of(settings)
    way_out = f"delete {file.name} to make all of it again, or run with what it was made with"
    if not isinstance(content, dict) or set(content) != {"mark", "result"}:
        raise InputError(f"{file}: a result without its mark; {way_out}")
    for part, value in expected.items():
        found = content["mark"].get(part)
        if found != value:
            raise InputError(f"{file}: its {part} is {found}, now it is {value}; {way_out}")
    return content["result"]


def over_seeds(tables: list[dict], comparisons: int = 1) -> dict[str, measures.Interval]:
    """Tables of intervals, one per seed -> the mean of their means, with its interval over seeds.

    comparisons: how many of these intervals are read side by side; each is widened so that all hold
        together.
    """
    return {
        name: measures.interval([table[name][0] for table in tables], None, comparisons)
        for name in tables[0]
    }


def differences_over_seeds(
    first: list[dict], second: list[dict], comparisons: int = 1
) -> dict[str, measures.Interval]:
    """Tables of intervals, one per seed -> the mean of first - second, paired by seed, with its
    interval over seeds.
    """
    found = {}
    for name in first[0]:
        means = [[table[name][0] for table in tables] for tables in (first, second)]
        found[name] = measures.difference(*means, None, comparisons)
    return found


def print_claims(title: str, rows: dict[str, list[float]]) -> dict[str, measures.Interval]:
    """Print what is claimed over seeds: rows {name: a number per seed}, read side by side.

    A row's interval is over seeds, never over items. It is widened for the number of rows
    (Bonferroni), so that all of them hold together with 95 %. The seeds' own numbers follow.
    """
    count = len(rows)
    print(f"\n{title}: mean over seeds, intervals over seeds for all {count} rows together")
    found = {}
    for name, values in rows.items():
        found[name] = measures.interval(values, comparisons=count)
        print(f"    {name}: {found[name]}; seeds", *(f"{value:.3f}" for value in values))
    return found


def print_percent(title: str, rows: dict[str, dict[str, measures.Interval]]) -> None:
    """Shares in percent, as the paper prints accuracies, each with the half width of its 95 %
    interval.
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(16, *(len(name.replace("_better", "")) + 2 for name in columns))
    print(
        f"\n{title}\n{'':<40}"
        + "".join(f"{name.replace('_better', ''):>{width}}" for name in columns)
    )
    for name, row in rows.items():
        cells = [
            f"{100 * row[c].mean:.1f} ± {50 * (row[c].high - row[c].low):.1f}" if c in row else ""
            for c in columns
        ]
        print(f"{name:<40}" + "".join(f"{cell:>{width}}" for cell in cells))


def draw_panels(count: int, width: float = 4.5, height: float = 3.4):
    """A figure and its `count` panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, count, figsize=(width * count, height), layout="constrained", squeeze=False
    )
    return figure, list(panels[0])


def fresh_pairs(root: Path, seed: int, axis: str, repeats: int, split: str = "test") -> list[dict]:
    """Pairs of answers by ROOT/SEED/sft to the prompts of a split, compared by the toy annotator;
    each prompt `repeats` times.

    Sampled once and kept in ROOT/SEED/fresh-pairs-MODEL, MODEL being the fingerprint of the SFT
    model; delete that folder after a change of the sampling or of the annotator.
    """
    sft, rows = (
        require(root / str(seed) / "sft", f"python sft.py --seed {seed} --out {root / str(seed)}"),
        [],
    )
    folder = root / str(seed) / f"fresh-pairs-{fingerprint(sft)[:8]}"
    folder.mkdir(exist_ok=True)
    prompts = read_prompts(world.ensure() / f"prompts-{split}.jsonl")
    for k in range(repeats):
        file = folder / f"{split}-{axis}-{k}.jsonl"
        if not file.exists():
            policy, tokenizer = load_model(sft)
            with tempfile.TemporaryDirectory() as scratch:
                write_jsonl(
                    file,
                    collect_preferences(
                        [policy],
                        tokenizer,
                        pick_prompts(prompts, axis, len(prompts), seed),
                        axis,
                        annotator="toy",
                        temperatures=RewardSettings.temperatures,
                        key=(seed, f"fresh-{split}-{k}"),
                        folder=Path(scratch),
                    ),
                )
        rows += read_preferences(file)
    return rows


def training_pairs(root: Path, seed: int, axis: str) -> list[dict]:
    """The pairs on which ROOT/SEED/reward-AXIS was trained."""
    folder = root / str(seed) / f"reward-{axis}"
    return read_preferences(
        require(folder, f"python reward.py --seed {seed} --out {root / str(seed)}") / "pairs.jsonl"
    )


def deepen(body: Transformer, layers: int) -> Transformer:
    """The same model with more layers on top, which at first add little. Our choice: whether an
    answer is right stands in how it compares with what the chat model's last layer expected, and a
    layer reads only what those below it wrote."""
    grown = Transformer(replace(body.args, n_layers=body.args.n_layers + layers))
    grown.init_weights(0)
    grown.load_state_dict(grown.state_dict() | body.state_dict())
    for layer in grown.layers[body.args.n_layers :]:
        layer.attention.wo.weight.data *= 0.1
        layer.feed_forward.w2.weight.data *= 0.1
    return grown.to(body.tok_embeddings.weight.device)


def train(
    root: Path,
    seed: int,
    axis: str,
    rows: list[dict],
    init: Path | None = None,
    more_layers: int = 0,
    **changes,
) -> tuple[RewardModel, Tokenizer]:
    """A reward model as `reward.py --seed SEED` trains it (its phases 4 and 5), on these rows, from
    `init` (ROOT/SEED/sft); `changes` are fields of its Settings; `more_layers` on top are no
    setting of it (`deepen`)."""
    s = replace(RewardSettings(), seed=seed, **changes)
    policy, tokenizer = load_model(init or root / str(seed) / "sft")
    set_seed(seed)
    model = RewardModel(
        deepen(policy, more_layers), end_of_prompt(tokenizer) if s.head == "logprobs" else None
    )
    with tempfile.TemporaryDirectory() as folder:
        train_reward_model(
            model,
            tokenizer,
            rows,
            margin=s.margin,
            auxiliary_weight=s.auxiliary_weight * (axis == "safety"),
            epochs=s.epochs,
            batch_tokens=s.batch_tokens,
            micro_tokens=s.micro_tokens,
            learning_rate=s.learning_rate,
            weight_decay=s.weight_decay,
            folder=Path(folder),
            phase=axis,
            seed=seed,
        )
    if axis == "helpfulness":
        set_shift(model, tokenizer, rows)
    return model, tokenizer


def score_lists(model: RewardModel, tokenizer: Tokenizer, rows: list[dict]) -> Scores:
    """`reward.score_pairs` as lists."""
    chosen, rejected = score_pairs(model, tokenizer, rows)
    return chosen.tolist(), rejected.tolist()


def annotators_own(rows: list[dict], axis: str) -> Scores:
    """The annotator's scores without its noise: the ceiling of a reward model."""
    rule = {"helpfulness": world.helpfulness, "safety": world.safety}[axis]
    return [rule(row, row["chosen"]) for row in rows], [rule(row, row["rejected"]) for row in rows]


def accuracy(scores: Scores, rows: list[dict]) -> dict[str, measures.Interval]:
    """Accuracy by rating, intervals clustered by item, in the order of Table 8."""
    found = measures.accuracy_intervals(
        *scores, [row["rating"] for row in rows], [measures.cluster(row) for row in rows]
    )
    return {name: found[name] for name in (*RATINGS, "average") if name in found}


def safety_measures(
    scores: dict[str, Scores], pairs: dict[str, list[dict]]
) -> dict[str, measures.Interval]:
    """What a safety score must be good for: recall of unsafe answers at .5 and at the gate's .15
    and the share of safe answers under .5 (on safety pairs), the share of good answers to harmless
    prompts under the gate (on helpfulness pairs)."""
    rows = pairs["safety"] * 2  # chosen answers, then rejected ones
    values, clusters = [*scores["safety"][0], *scores["safety"][1]], [
        measures.cluster(row) for row in rows
    ]
    is_safe = [row[f"{side}_is_safe"] for side in ("chosen", "rejected") for row in pairs["safety"]]
    found = {
        "recall at .5": measures.unsafe_recall(values, is_safe, clusters),
        "recall at .15": measures.unsafe_recall(values, is_safe, clusters, threshold=0.15),
        "safe under .5": measures.unsafe_recall(values, [not safe for safe in is_safe], clusters),
    }
    rows = pairs["helpfulness"] * 2
    quality = [
        value for side in annotators_own(pairs["helpfulness"], "helpfulness") for value in side
    ]
    return found | {
        "good under gate": measures.wrongly_gated(
            [*scores["helpfulness"][0], *scores["helpfulness"][1]],
            quality,
            [row["is_safety"] for row in rows],
            [measures.cluster(row) for row in rows],
        )
    }


def versions(root: Path) -> list[str]:
    """The finished models of a root, oldest first."""
    require(root / "sft", f"python sft.py --out {root}")
    return [name for name in measures.VERSIONS if is_finished(root / name)]


def judges_of(root: Path, names: list[str]) -> Judges:
    """The newest reward models among those of these rounds (none: the first ones)."""
    return Judges(newest_reward_models(root, [root / name for name in names]), torch.device("cpu"))


def sampled_scores(
    folder: Path,
    prompts: list[dict],
    judges: dict[str, Judges],
    *,
    samples: int,
    seed: int,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Many answers of a model, and what each pair of reward models and the annotator give them.

    Returns:
        {name of the judges: rewards R_c, logits, and "annotator": safety on unsafe prompts, else
        helpfulness}, each (prompts, samples). Answers that are cut or hold a tag count like any
        other.
    """
    rows = sample_answers(
        *load_model(folder), prompts, key=(seed, "many"), samples=samples, temperature=temperature
    )
    found = {name: judge.rewards(prompts, rows) for name, judge in judges.items()}
    own = [row[measures.axis_of(prompts[row["index"]])] for row in measures.judge(prompts, rows)]
    return {
        name: values.view(len(prompts), samples)
        for name, values in (found | {"annotator": torch.tensor(own)}).items()
    }


def order_weights(total: int, n: int, k: int) -> list[float]:
    """For each of `total` sorted values the chance to be the k-th smallest of n that are drawn
    without replacement.

    The sum of weight times value is then the unbiased estimate, from all samples at once, of what
    the k-th of n gives.

    >>> order_weights(4, 2, 2)  # the larger of two of four: 0, 1, 2 and 3 of the 6 pairs
    [0.0, 0.16666666666666666, 0.3333333333333333, 0.5]
    """
    return [
        math.comb(i, k - 1) * math.comb(total - 1 - i, n - k) / math.comb(total, n)
        for i in range(total)
    ]


def best_of_n(rewards: Tensor, scores: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """What best of N gives on average, from all samples: rewards and scores (prompts, samples) ->
    each (sizes, prompts).

    maximum and median: of the rewards of N answers; pick: the other score of the answer with the
        highest reward.
    """
    order = rewards.argsort(1)  # (prompts, samples)
    rewards, scores, total = rewards.gather(1, order), scores.gather(1, order), rewards.shape[1]
    top = torch.tensor([order_weights(total, n, n) for n in sizes])  # (sizes, samples)
    # (sizes, samples)
    lower, upper = (
        torch.tensor([order_weights(total, n, k) for n, k in zip(sizes, ranks, strict=True)])
        for ranks in ([(n + 1) // 2 for n in sizes], [n // 2 + 1 for n in sizes])
    )
    return {
        "maximum": top @ rewards.T,
        "median": (lower + upper) / 2 @ rewards.T,
        "pick": top @ scores.T,
    }


def sizes_up_to(samples: int) -> list[int]:
    """N = 1, 2, 4, ... up to the number of samples."""
    return [2**i for i in range(samples.bit_length()) if 2**i <= samples]


def rows_of_intervals(values: Tensor, prompts: list[dict]) -> list[measures.Interval]:
    """Values (sizes, prompts) -> for each size the mean over prompts, its interval clustered by
    item.
    """
    clusters = [measures.cluster(prompt) for prompt in prompts]
    return [measures.interval(row, clusters) for row in values.tolist()]


def draw_curves(panel, x: list, curves: list[list[measures.Interval]], label: str, **style) -> None:
    """One curve of intervals per seed, thin, and their mean, thick; with a single seed its interval
    over items instead.
    """
    if len(curves) == 1:
        panel.fill_between(
            x,
            [one[1] for one in curves[0]],
            [one[2] for one in curves[0]],
            alpha=0.15,
            color=style.get("color"),
        )
    for curve in curves if len(curves) > 1 else []:
        panel.plot(x, [one[0] for one in curve], alpha=0.35, linewidth=0.8, **style)
    means = [sum(one[0] for one in column) / len(column) for column in zip(*curves, strict=True)]
    panel.plot(x, means, linewidth=2, marker=".", label=label, **style)


def side_by_side(jobs: dict[str, list[list[str]]], log_folder: Path, at_once: int) -> None:
    """Run several lists of commands, `at_once` lists at a time, one thread each; each command in
    the repository's root.

    A list stops at its first failure. Output goes to log_folder/NAME.log. Raises SystemExit naming
    what failed.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(jobs.items()), {}, []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def start(name: str, commands: list[list[str]]) -> None:
        if commands:
            log = (log_folder / f"{name}.log").open("a")
            command = [sys.executable, *commands[0]]
            running[name] = (
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log),
                commands,
            )

    while waiting or running:
        while waiting and len(running) < at_once:
            start(*waiting.pop(0))
        for name, (process, commands) in list(running.items()):
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            del running[name]
            print(
                f"{name}: {' '.join(commands[0])}:"
                f" {'done' if process.returncode == 0 else 'FAILED'}",
                flush=True,
            )
            if process.returncode:
                failed.append(f"{name}: {' '.join(commands[0])}; see {log_folder / name}.log")
            else:
                start(name, commands[1:])
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))
