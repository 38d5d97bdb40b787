"""Does the reward model see content, or only style? Two answers to an unseen prompt, alike in
style, one of them right.

    python -m experiments.reward_sees_content --seeds 1,2,3      after experiments.seeds

The SFT model's own log-probability nearly always tells which answer is right; the default, a scalar
head on its last state trained on sampled pairs, does not at all. Beside it: with pairs that people
wrote, alike in style and one of them wrong (many of them, in small steps: `reward.py --mix-share
0.65,0`); with two more layers for the head to read from, too (`deepen`); with four times as many
pairs; and, a departure from the paper, a head that reads the answer's log-probabilities (`--head
logprobs`). Each is measured where it counts, too: on pairs that the policy sampled, and by the
annotator's score of the best of 16 answers. Keeps OUT/results/reward_sees_content-SEED.json. Each
arm's difference from the default is shown, paired by seed, its interval over seeds corrected for
the number of arms and measures.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import eval as measures
from data import Answer, Pair, Prompt, Tokenizer, encode_dialog, encode_prompt, read_prompts, world
from experiments.shared import results
from experiments.shared.over_seeds import (
    claimed,
    claims_table,
    each_seed,
    over_seeds,
    percent_table,
    plus_minus,
    verdict,
)
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.reward_models import (
    accuracy,
    clusters_of,
    fresh_pairs,
    score_lists,
    train,
    training_pairs,
)
from experiments.shared.settings import ExperimentSettings
from model import Transformer
from rejection_sampling import best_of
from report import Figure, Section
from reward import RewardModel, score
from runtime import check_between, load_model, parse_settings, run, sample_answers, set_threads
from sft import answer_loss

SMALL_STEPS = dict(batch_tokens=500, learning_rate=8e-4)
ARMS = {  # name: (written pairs, changes of reward.py's settings)
    "the default": (0, {}),
    "9,000 written pairs": (9000, SMALL_STEPS),
    "9,000 written pairs, 2 more layers": (9000, SMALL_STEPS | dict(more_layers=2)),
    "36,000 written pairs, 2 more layers": (36_000, SMALL_STEPS | dict(more_layers=2)),
    "reads log-probabilities (not the paper's)": (0, dict(head="logprobs")),
}
DEFAULT = "the default"
READS_LOGPROBS = "reads log-probabilities (not the paper's)"
OWN = "SFT's own log-probability"


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    arms: tuple[int, ...] = (0, 2, 4)  # which of the arms, in the order of ARMS
    pairs: int = 3000  # pairs of the test
    split: Literal["test", "dev", "train"] = "test"  # of its prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, len(ARMS) - 1, "arms")


# ---- what is measured ----


def logprob(model: Transformer, tokenizer: Tokenizer, prompt: Prompt, answer: str) -> float:
    """The answer's summed log-probability under a language model, in nats."""
    messages = [*prompt.messages, world.assistant(answer)]
    with torch.inference_mode():
        dialog = encode_dialog(tokenizer, messages)
        loss, _ = answer_loss(model, [dialog])
    return -loss.item()


def right_first(pair: Pair) -> Pair:
    """A written pair with its right answer as the chosen one, whatever the annotator said."""
    wrong = pair.chosen if pair.rejected == pair.right else pair.rejected
    return replace(pair, chosen=pair.right, rejected=wrong)


def right_and_wrong_pairs(split: str, count: int) -> list[Pair]:
    """Written pairs that ask for neither name nor hobby, the right answer first."""
    pairs = []
    for pair in world.written_pairs(split, count):
        if pair.prompt.family not in world.PROBES:
            pairs.append(right_first(pair))
    return pairs


def share_right(
    right: list[float], wrong: list[float], pairs: list[Pair]
) -> dict[str, measures.Interval]:
    """Share of the written pairs whose right answer has the higher score, over all and by family.
    """
    families = [pair.prompt.family for pair in pairs]
    chosen = measures.accuracy_intervals(right, wrong, families, clusters_of(pairs))
    return {"all": chosen.pop("average"), **chosen}


def best_of_answers(
    model: RewardModel, tokenizer: Tokenizer, prompts: list[Prompt], answers: list[Answer]
) -> measures.Interval:
    """The annotator's helpfulness of the answers that the reward model likes best."""
    sequences = []
    for answer in answers:
        sequences.append(encode_prompt(tokenizer, prompts[answer.index].messages) + answer.ids)
    rewards = score(model, sequences)
    best = best_of(rewards, [answer.index for answer in answers])
    picks = [world.helpfulness(prompts[i], answers[k].text) for i, k in best.items()]
    return measures.interval(picks, [measures.cluster(prompts[i]) for i in best])


def training_set(settings: Settings, seed: int, written: int) -> list[Pair]:
    """The pairs of the seed's own reward model, and so many written ones."""
    pairs = []
    for pair in training_pairs(settings.out, seed, "helpfulness"):
        if not pair.extra:
            pairs.append(pair)
    for pair in world.written_pairs("train", written, seed):
        pairs.append(replace(pair, extra=True))
    return pairs


def measure(settings: Settings, seed: int) -> dict:
    """One seed: SFT's own log-probability, and each arm."""
    prompts = read_prompts(world.ensure() / f"prompts-{settings.split}.jsonl")
    prompts = measures.harmless(prompts)
    tests = right_and_wrong_pairs(settings.split, settings.pairs)
    sft, tokenizer = load_model(settings.out / str(seed) / "sft")
    sampled = fresh_pairs(settings.out, seed, "helpfulness", 2, settings.split)
    answers = sample_answers(sft, tokenizer, prompts, key=(seed, "sees content"), samples=16)

    right = [logprob(sft, tokenizer, pair.prompt, pair.chosen) for pair in tests]
    wrong = [logprob(sft, tokenizer, pair.prompt, pair.rejected) for pair in tests]
    table = {OWN: {"content": share_right(right, wrong, tests)}}
    names = list(ARMS)
    for number in settings.arms:
        name = names[number]
        written, changes = ARMS[name]
        pairs = training_set(settings, seed, written)
        started = time.process_time()
        model, _ = train(settings.out, seed, "helpfulness", pairs, **changes)
        seconds = time.process_time() - started
        table[name] = {
            "content": share_right(*score_lists(model, tokenizer, tests), tests),
            "cpu_seconds": seconds,
            "sampled pairs": accuracy(score_lists(model, tokenizer, sampled), sampled),
            "best of 16": best_of_answers(model, tokenizer, prompts, answers),
        }
        print(f"seed {seed}, {name}: content {table[name]['content']['all']}", flush=True)
    return table


# ---- over seeds ----

# where each measure's mean over all pairs stands
COLUMNS = {"content": "all", "sampled pairs": "average", "best of 16": None}


def _arms(of_seeds: list[dict]) -> list[str]:
    """The arms that all seeds have."""
    return [name for name in ARMS if all(name in one for one in of_seeds)]


def _values(of_seeds: list[dict], arm: str, measure: str) -> list[float]:
    """An arm's number, one per seed."""
    column = COLUMNS[measure]
    values = []
    for one in of_seeds:
        interval = one[arm][measure]
        values.append(interval[column][0] if column else interval[0])
    return values


def claims(of_seeds: list[dict]) -> dict[str, list[float]]:
    """{"arm, measure": its difference from the default, one per seed}."""
    rows = {}
    for arm in _arms(of_seeds):
        if arm == DEFAULT:
            continue
        for measure in COLUMNS:
            values = _values(of_seeds, arm, measure)
            defaults = _values(of_seeds, DEFAULT, measure)
            pairs = zip(values, defaults, strict=True)
            rows[f"{arm}, {measure}"] = [value - default for value, default in pairs]
    return rows


def section(result: dict) -> Section:
    """Each arm on content, on sampled pairs, and by the best of 16; then against the default."""
    of_seeds = list(result.values())
    arms = _arms(of_seeds)

    def content_of(arm: str) -> measures.Interval:
        return measures.interval(_values(of_seeds, arm, "content"))

    content = {arm: over_seeds([one[arm]["content"] for one in of_seeds]) for arm in (OWN, *arms)}
    sampled = {arm: over_seeds([one[arm]["sampled pairs"] for one in of_seeds]) for arm in arms}
    best = {}
    cost = []
    for arm in arms:
        best[arm] = {"best of 16": measures.interval(_values(of_seeds, arm, "best of 16"))}
        seconds = statistics.fmean(one[arm]["cpu_seconds"] for one in of_seeds)
        cost.append(f"{seconds:.0f} for {arm}")
    rows = claims(of_seeds)
    gains = claimed(rows)
    shown = []
    for measure in COLUMNS:
        gain = gains[f"{READS_LOGPROBS}, {measure}"]
        shown.append(f"{plus_minus(gain)} on {measure} ({verdict(gain)})")
    each = f"± is half of the 95 % interval over {len(of_seeds)} seeds, each alone."
    return Section(
        "Does the reward model see content, or only style?",
        [
            (
                "Only style: of two answers alike in style it prefers the right one in"
                f" {content_of(DEFAULT).mean:.3f} of the cases, which is chance, while SFT's own"
                f" log-probability does so in {content_of(OWN).mean:.3f}."
            ),
            percent_table(
                "The right one of two written answers, alike in style, in percent; by kind of"
                " question.",
                content,
                each,
            ),
            percent_table("Pairs that the policy sampled, by rating, in percent.", sampled, each),
            percent_table(
                "The annotator's helpfulness of the best of 16 answers, in percent.",
                best,
                f"{each} CPU seconds of training: {', '.join(cost)}.",
            ),
            claims_table("Difference from the default, paired by seed.", rows),
            Figure(
                "Content, sampled pairs, best of 16: dots are seeds.",
                file=results.RESULTS / "reward_sees_content.png",
            ),
            (
                "SFT's own log-probability knows; the paper's scalar head on the last state,"
                " trained on pairs that the policy sampled, does not. Pairs that people wrote,"
                " alike in style with one wrong, and two more layers under the head let it see"
                f" content ({each_seed(_values(of_seeds, arms[1], 'content'))}, seed by seed), but"
                " not the content that the policy itself gets wrong: sampled pairs and the best of"
                " 16 gain nothing. So the layers stay in this experiment; written pairs are an"
                " option (`reward.py --mix-share 0.65,0`). What helps is a departure from the"
                " paper, off by default: a head that also reads the answer's log-probabilities"
                f" (`reward.py --head logprobs`). Its gain over the default is {', '.join(shown)},"
                f" corrected for all {len(gains)} looks."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """Content, sampled pairs and the best of 16, a bar for each arm, a dot for each seed."""
    of_seeds = list(result.values())
    arms = _arms(of_seeds)
    titles = ("right content, style alike", "sampled pairs", "score of the best of 16")
    figure, panels = draw_panels(3, 3.2)
    for panel, title, measure in zip(panels, titles, COLUMNS, strict=True):
        values = [_values(of_seeds, arm, measure) for arm in arms]
        means = [sum(of_arm) / len(of_arm) for of_arm in values]
        panel.barh(arms, means, color="tab:blue", alpha=0.4)
        for y, of_arm in enumerate(values):
            panel.plot(of_arm, [y] * len(of_arm), "k.", markersize=4)
        panel.set(title=title, xlim=(0.4, 1))
        panel.invert_yaxis()
        panel.tick_params(labelleft=panel is panels[0])
    save_picture(figure, file)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)

    def measure_seed(seed: int) -> dict:
        return measure(settings, seed)

    of_seeds = results.measure_seeds("reward_sees_content", settings, measure_seed)
    results.finish("reward_sees_content", of_seeds, settings, section, draw)


if __name__ == "__main__":
    run(main)
