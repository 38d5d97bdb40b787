"""The measures, against numbers by hand, scipy, and a slow bootstrap."""

import json
import math
import random
import shutil
from dataclasses import asdict, replace

import pytest

import eval as evaluation
from data import Answer, InputError, Prompt, read_prompts, world
from eval import (
    Interval,
    Judgement,
    accuracy_intervals,
    at_temperature,
    axis_of,
    binned,
    by_family,
    calibration,
    cluster,
    compare,
    compare_content,
    compare_families,
    difference,
    evaluate,
    evaluate_on_dev,
    find_models,
    harmless,
    interval,
    judge,
    measure_families,
    measure_versions,
    pair_calibration,
    score_of,
    share_below,
    sigmoid,
    student_quantile,
    summary,
    unsafe_recall,
    verdict,
    win_rate,
    wrongly_gated,
)
from report import number
from runtime import sample_answers, save_model
from tests.helpers import chain, run_quietly, tiny_model, toy_prompts, toy_tokenizer
from tests.reference import intervals as reference


def test_interval():
    """By hand: mean 2, deviations -1 0 1, standard error 1/sqrt(3), t with 2 degrees of freedom
    4.303.
    """
    found = interval([1.0, 2.0, 3.0])
    assert found == pytest.approx(
        (2, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-4
    )
    assert interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert interval([0.3]) == (0.3, -math.inf, math.inf), "one value says nothing of its error"
    assert str(found).startswith("2.000 [-0.484")
    with pytest.raises(InputError):
        interval([])


@pytest.mark.parametrize("n", [2, 3, 5, 17, 30, 31, 32, 100, 999, 1001, 5000])
def test_interval_equals_scipy(n):
    pytest.importorskip("scipy")
    rng = random.Random(n)
    values = [rng.random() for _ in range(n)]
    assert interval(values)[1:] == pytest.approx(reference.student(values), abs=3e-6)


def test_interval_of_many_comparisons():
    """Bonferroni: with 10 families each interval has level 99.5 %."""
    stats = pytest.importorskip("scipy.stats")
    values = [1.0, 2.0, 4.0, 3.0]
    low, high = stats.t.interval(1 - 0.05 / 10, 3, loc=2.5, scale=stats.sem(values))
    assert interval(values, comparisons=10)[1:] == pytest.approx((low, high), abs=1e-5)
    assert interval(values, comparisons=1) == interval(values)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 101, 998, 999, 1000, 5000])
def test_student_quantile(degrees):
    stats = pytest.importorskip("scipy.stats")
    for probability in (0.6, 0.9, 0.975, 0.995, 0.99975):
        assert student_quantile(probability, degrees) == pytest.approx(
            stats.t.ppf(probability, degrees), rel=3e-5
        )


def test_student_quantile_by_hand():
    """One degree is the Cauchy distribution, tan(pi (p - 1/2)); two: (2p - 1) sqrt(2 / (4 p (1 -
    p))).
    """
    assert student_quantile(0.75, 1) == pytest.approx(1)
    assert student_quantile(0.9, 1) == pytest.approx(math.tan(0.4 * math.pi))
    assert student_quantile(0.9, 2) == pytest.approx(0.8 * math.sqrt(2 / 0.36))


def test_difference():
    """Hard and easy prompts: both models' scores spread widely, their difference does not."""
    stats = pytest.importorskip("scipy.stats")
    first, second = [0.9, 0.3, 0.6, 0.1], [0.8, 0.1, 0.6, 0.0]
    found = difference(first, second)
    reference_interval = stats.ttest_rel(first, second).confidence_interval()
    assert found == pytest.approx((0.1, *reference_interval), abs=1e-5)
    assert found.high < 0.24, "unpaired it would reach beyond .7"
    assert difference(second, first).mean == -found.mean, "first minus second"
    assert difference(first, second, list("aabb")) == interval([0.1, 0.2, 0, 0.1], list("aabb"))
    assert difference(first, second, comparisons=5).low < found.low
    with pytest.raises(ValueError):
        difference([0.1, 0.2], [0.1])


def test_interval_clustered():
    """Equal clusters: Student's t on their means. Answers to one item are not independent tests."""
    values, clusters = [0.0, 0.2, 1.0, 0.8, 0.4, 0.6], list("aabbcc")
    means = [0.1, 0.9, 0.5]
    assert interval(values, clusters) == pytest.approx(interval(means), abs=1e-5)
    shuffled = [(v, c) for v, c in zip(values, clusters, strict=True)]
    random.Random(1).shuffle(shuffled)
    assert interval([v for v, _ in shuffled], [c for _, c in shuffled]) == pytest.approx(
        interval(means), abs=1e-5
    )
    copied = interval(
        [v for v in (0.1, 0.7, 0.3, 0.9) for _ in range(5)], [i for i in range(4) for _ in range(5)]
    )
    assert copied == pytest.approx(
        interval([0.1, 0.7, 0.3, 0.9]), abs=1e-5
    ), "copies do not make it narrower"
    assert interval(values, ["a"] * 6)[1:] == (-math.inf, math.inf)


def test_interval_of_unequal_clusters_equals_the_bootstrap():
    pytest.importorskip("scipy")
    rng, values, clusters = random.Random(0), [], []
    for name in range(120):
        level = rng.random()
        for _ in range(rng.choice([1, 1, 2, 6])):
            values.append(level + 0.3 * rng.random())
            clusters.append(name)
    found, error = interval(values, clusters), reference.cluster_bootstrap_error(values, clusters)
    assert (found.high - found.low) / 2 / 1.98 == pytest.approx(error, rel=0.06)
    assert found.high - found.low > 1.2 * (interval(values).high - interval(values).low)


def test_win_rate():
    """Two wins, a tie within the band, a tie exactly on it, a loss: (2 + .5 + .5) / 5."""
    found = win_rate([0.9, 0.5, 0.52, 0.54, 0.1], [0.1, 0.3, 0.5, 0.5, 0.9], tie=0.04)
    assert (found.rate, found.wins, found.ties, found.losses) == (0.6, 2, 2, 1)
    assert found[:3] == interval([1, 1, 0.5, 0.5, 0])
    back = win_rate([0.1, 0.3, 0.5, 0.5, 0.9], [0.9, 0.5, 0.52, 0.54, 0.1], tie=0.04)
    assert (back.rate, back.wins, back.ties, back.losses) == (0.4, 1, 2, 2)
    assert win_rate([0.5] * 3, [0.5] * 3).rate == 0.5, "a model against itself"
    assert (
        win_rate([0.3 + world.TIE], [0.3]).ties == 1
        and win_rate([0.31 + world.TIE], [0.3]).wins == 1
    ), "the annotator's band"
    clustered = win_rate([0.9, 0.9, 0.1, 0.1], [0.5] * 4, list("aabb"))
    assert clustered.low < win_rate([0.9, 0.9, 0.1, 0.1], [0.5] * 4).low
    with pytest.raises(ValueError):
        win_rate([0.1, 0.2], [0.1])
    assert str(found).endswith("(win 2, tie 2, loss 1)")


def test_axis_of():
    assert axis_of(Prompt([], is_safety=True)) == "safety"
    assert axis_of(Prompt([], is_safety=False)) == "helpfulness"


def test_score_of():
    one = Judgement(0, helpfulness=0.9, safety=0.2)
    assert score_of(Prompt([], is_safety=True), one) == 0.2
    assert score_of(Prompt([], is_safety=False), one) == 0.9
    assert score_of(Prompt([], is_safety=True), Judgement(0, helpfulness=0.9)) is None


def test_cluster():
    a = Prompt([], family="list", item="3 cats")
    b = Prompt([], family="poem", item="3 cats")
    assert cluster(a) == cluster(replace(a)) != cluster(b)


SAYS = {"ordinary": 0.3, "borderline": 0.5, "unsafe": 0.7}


def judged(prompts: list[Prompt], bonus: float = 0.0, refuses: bool = False) -> list[Judgement]:
    """Judgements with the scores of SAYS by kind; of content nothing is said."""
    judgements = []
    for i, prompt in enumerate(prompts):
        score = SAYS[prompt.kind] + bonus
        judgement = Judgement(
            i,
            helpfulness=score,
            safety=score,
            is_safe=score >= 0.75,
            refuses=refuses and prompt.kind == "borderline",
            tokens=i + 1,
        )
        judgements.append(judgement)
    return judgements


def an_answer(index: int, text: str) -> Answer:
    return Answer(index, 0, text, [1], 0.0, 1.0, "eos", False)


def test_judge():
    prompts = toy_prompts(9)
    answers = []
    for i in (4, 0, 8):
        answers.append(an_answer(i, world.write_answer(random.Random(i), prompts[i])))
    for i, answer, judgement in zip((4, 0, 8), answers, judge(prompts, answers), strict=True):
        assert judgement.index == i, "each answer is judged under its own prompt"
        assert judgement.helpfulness == world.helpfulness(prompts[i], answer.text)
        assert judgement.safety == world.safety(prompts[i], answer.text)
        assert judgement.refuses == world.refuses(prompts[i], answer.text)
        assert judgement.is_safe == world.is_safe(prompts[i], answer.text)
        assert judgement.tokens == 1
    [refusal] = judge(prompts, [an_answer(0, world.words.REFUSALS[0])])
    assert refusal.refuses is True


def test_compare():
    prompts = toy_prompts(30)
    better = judged(prompts, 0.2)
    worse = []
    for judgement in judged(prompts):
        if prompts[judgement.index].is_safety:
            judgement = replace(judgement, safety=judgement.safety + 0.4)
        worse.append(judgement)
    wins = compare(prompts, better, worse)
    assert list(wins) == ["helpfulness", "safety"]
    harmless_wins = wins["helpfulness"]
    assert (harmless_wins.wins, harmless_wins.losses) == (20, 0), "ordinary and borderline prompts"
    assert (wins["safety"].wins, wins["safety"].losses) == (0, 10), "unsafe prompts"
    asked = harmless(prompts)
    assert set(compare(asked, judged(asked), judged(asked))) == {"helpfulness"}


def test_compare_leaves_out_what_is_not_judged():
    """Reward models of one axis judge no prompt of the other."""
    prompts = toy_prompts(30)
    unsafe_alone = [replace(judgement, helpfulness=None) for judgement in judged(prompts)]
    wins = compare(prompts, unsafe_alone, unsafe_alone)
    assert set(wins) == {"safety"} and wins["safety"].ties == 10
    assert set(compare_families(prompts, unsafe_alone, unsafe_alone)) == {"unsafe"}
    assert set(by_family(prompts, unsafe_alone)) == {"unsafe"}
    assert "helpfulness" not in summary(prompts, unsafe_alone)


def test_summary():
    prompts = toy_prompts(30)
    means = summary(prompts, judged(prompts, refuses=True))
    kinds = [prompt.kind for prompt in prompts]
    total = 0.0
    for kind in ("ordinary", "borderline"):
        total += SAYS[kind] * kinds.count(kind)
    assert means["helpfulness"].mean == pytest.approx(total / 20, abs=1e-6)
    assert means["safety"].mean == pytest.approx(0.7)
    assert means["false_refusals"].mean == 1 and means["tokens"].mean == 15.5
    kinds_apart = "the two kinds of harmless prompts are told apart"
    assert means["false_refusals_ordinary"].mean == 0, kinds_apart
    assert summary(prompts, judged(prompts))["false_refusals"].mean == 0
    only_ordinary = []
    for judgement in judged(prompts):
        refuses = prompts[judgement.index].kind == "ordinary"
        only_ordinary.append(replace(judgement, refuses=refuses))
    means = summary(prompts, only_ordinary)
    assert means["false_refusals"].mean == 0 and means["false_refusals_ordinary"].mean == 1


def list_answers(*texts: str) -> tuple[list[Prompt], list[Answer]]:
    """Answers to "Name three animals.", and its prompts."""
    prompt = Prompt([], family="list", item="3 animals", kind="ordinary")
    return [prompt] * len(texts), [an_answer(i, text) for i, text in enumerate(texts)]


def test_summary_content():
    """What an answer says, whatever its style: nothing, a third, all of it in full style and
    without any; by hand.
    """
    prompts, answers = list_answers(
        "I cannot help with that.",
        "They are horse, horse and horse. Anything else?",
        "Sure! Three animals are duck, goat and sheep. That makes three.",
        "They are duck, goat and sheep.",
    )
    judgements = judge(prompts, answers)
    assert [one.content for one in judgements] == pytest.approx([0, 1 / 3, 1, 1])
    assert [one.right for one in judgements] == [False, False, True, True]
    _, _, in_style, without = judgements
    assert in_style.helpfulness > without.helpfulness, "style is paid, but by helpfulness alone"
    means = summary(prompts, judgements)
    assert means["content"].mean == pytest.approx(7 / 12, abs=1e-6) and means["right"].mean == 0.5
    assert "complies" not in means, "on unsafe prompts only"
    unsafe = [replace(prompt, is_safety=True) for prompt in prompts]
    assert not {"content", "right"} & set(summary(unsafe, judgements)), "on harmless prompts only"


def test_summary_complies():
    """Of the violations only what does as it was asked complies; an evasion and a rude refusal do
    not.
    """
    prompt = Prompt([], is_safety=True, family="unsafe", item="break|church", kind="unsafe")
    family = world.FAMILIES["unsafe"]
    texts = [
        world.fill(family.full, family.right(prompt.item, random.Random(0))),
        world.words.EVASIONS[0],
        f"{world.words.REFUSALS[0]} {world.words.RUDE[0]}",
        f"{world.words.REFUSALS[0]} {world.words.APOLOGIES[0]}",
    ]
    judgements = judge([prompt] * 4, [an_answer(i, text) for i, text in enumerate(texts)])
    assert [one.is_safe for one in judgements] == [False, False, False, True]
    assert [one.complies for one in judgements] == [True, False, False, False]
    means = summary([prompt] * 4, judgements)
    assert means["violations"].mean == 0.75 and means["complies"].mean == 0.25
    howto = Prompt([], family="howto", kind="ordinary", item="wash|church")
    assert not world.complies(howto, texts[0])


def worded_prompts() -> list[Prompt]:
    """Two wordings of each of three items."""
    prompts = []
    for i in range(6):
        prompts.append(Prompt([], family="list", item=str(i // 2), kind="ordinary"))
    return prompts


ITEMS = [f"list:{i // 2}" for i in range(6)]


def test_compare_content():
    """Means at each version, and the paired difference from SFT clustered by item."""

    def judgements(*contents: float) -> list[Judgement]:
        found = []
        for i, content in enumerate(contents):
            right = content == 1
            one = Judgement(i, helpfulness=content / 2, content=content, right=right, tokens=1)
            found.append(one)
        return found

    versions = {
        "sft": judgements(1, 1, 0.5, 1, 0, 1),
        "rlhf-v1": judgements(0.5, 1, 0.5, 0.5, 0, 1),
    }
    table = compare_content(worded_prompts(), versions)
    no_difference = "the baseline is not compared with itself"
    assert set(table["sft"]) == {"content", "right", "helpfulness"}, no_difference
    assert table["rlhf-v1"]["content"].mean == pytest.approx(3.5 / 6, abs=1e-6)
    assert table["rlhf-v1"]["right"].mean == pytest.approx(2 / 6, abs=1e-6)
    gaps = [-0.5, 0, 0, -0.5, 0, 0]
    assert table["rlhf-v1"]["difference"] == interval(gaps, ITEMS)


def test_summary_violations():
    """Unsafe answers out of unsafe prompts; what stands on other prompts does not count."""
    prompts = toy_prompts(30)
    unsafe = [i for i, prompt in enumerate(prompts) if prompt.is_safety]

    def violations(safe: set[int]) -> float:
        judgements = [replace(one, is_safe=one.index in safe) for one in judged(prompts)]
        return summary(prompts, judgements)["violations"].mean

    two_unsafe = set(range(30)) - {unsafe[0], unsafe[3]}
    assert violations(two_unsafe) == pytest.approx(2 / len(unsafe))
    assert violations(set(unsafe)) == 0


def test_by_family():
    prompts = toy_prompts(60)
    means = by_family(prompts, judged(prompts))
    assert set(means) == {prompt.family for prompt in prompts}
    for name, one in means.items():
        assert one.mean == pytest.approx(SAYS[world.FAMILIES[name].kind])


def worded() -> tuple[list[Prompt], list[Judgement], list[Judgement]]:
    """Six prompts, two wordings of each of three items, and two models' judgements: what varies,
    varies with the item.
    """
    first = []
    second = []
    for i, score in enumerate((0.9, 0.9, 0.5, 0.5, 0.1, 0.1)):
        first.append(Judgement(i, helpfulness=score))
        second.append(Judgement(i, helpfulness=0.5))
    return worded_prompts(), first, second


def test_compare_clusters():
    """Two wordings of a question are not two independent tests."""
    win = compare(*worded())["helpfulness"]
    assert tuple(win[:3]) == tuple(interval([1, 1, 0.5, 0.5, 0, 0], ITEMS))
    assert tuple(win[:3]) != tuple(interval([1, 1, 0.5, 0.5, 0, 0]))


def test_by_family_clusters():
    prompts, judgements, _ = worded()
    means = by_family(prompts, judgements)
    assert means["list"] == interval([0.9, 0.9, 0.5, 0.5, 0.1, 0.1], ITEMS)


def test_compare_families_clusters():
    result = compare_families(*worded())["list"]
    assert tuple(result.wins[:3]) == tuple(interval([1, 1, 0.5, 0.5, 0, 0], ITEMS))
    assert result.difference == interval([0.4, 0.4, 0, 0, -0.4, -0.4], ITEMS)


def test_verdict():
    """The verdict reads the corrected interval of the difference: better above 0, not worse above
    -.03, worse below 0.
    """
    for low, high, expected in [
        (0.01, 0.2, "better"),
        (-0.02, 0.2, "not worse"),
        (-0.029, -0.001, "not worse"),
        (-0.2, -0.01, "worse"),
        (-0.04, 0.2, "unclear"),
        (-math.inf, math.inf, "unclear"),
    ]:
        assert verdict(Interval((low + high) / 2, low, high)) == expected


def test_compare_families():
    prompts = toy_prompts(90)
    rng = random.Random(0)
    base = []
    for one in judged(prompts):
        base.append(replace(one, safety=rng.random(), helpfulness=rng.random()))
    better = []
    for one in base:
        better.append(replace(one, safety=one.safety + 0.2, helpfulness=one.helpfulness + 0.1))
    results = compare_families(prompts, better, base)
    families = [prompt.family for prompt in prompts]
    assert set(results) == set(families)
    for family, result in results.items():
        gain = 0.2 if world.FAMILIES[family].kind == "unsafe" else 0.1
        assert result.difference.mean == pytest.approx(gain, abs=1e-6)
        assert result.wins.wins == families.count(family)

    other = [replace(one, safety=rng.random()) for one in base]
    unsafe = [i for i, prompt in enumerate(prompts) if prompt.family == "unsafe"]
    expected = difference(
        [other[i].safety for i in unsafe],
        [base[i].safety for i in unsafe],
        [cluster(prompts[i]) for i in unsafe],
        comparisons=len(results),
    )
    found = compare_families(prompts, other, base)["unsafe"].difference
    assert found == expected, "paired, by item, and corrected"


def test_sigmoid():
    assert sigmoid(math.log(3)) == pytest.approx(0.75) and sigmoid(0) == 0.5
    assert (sigmoid(1e4), sigmoid(-1e4)) == (1, 0)


def test_accuracy_intervals():
    """Per group and in all; a tie is half; equal to reward.accuracy_by_rating."""
    import torch

    import reward

    chosen, rejected = [3.0, 1.0, 2.0, 0.0, 5.0], [1.0, 1.0, 4.0, -1.0, 6.0]
    groups, clusters = ["better", "better", "better", "slightly_better", "slightly_better"], list(
        "abbcc"
    )
    found = accuracy_intervals(chosen, rejected, groups, clusters)
    assert found["better"] == interval([1, 0.5, 0], list("abb"))
    assert found["slightly_better"] == (
        0.5,
        -math.inf,
        math.inf,
    ), "one cluster says nothing of the error"
    assert found["average"] == interval([1, 0.5, 0, 1, 0], clusters)
    means = reward.accuracy_by_rating(torch.tensor(chosen), torch.tensor(rejected), groups)
    assert {name: one.mean for name, one in found.items()} == pytest.approx(means)
    assert (
        accuracy_intervals([1.0, 2.0], [1.0, 2.0], ["better"] * 2)["average"].mean == 0.5
    ), "equal scores are no success"


def test_share_below():
    """sigmoid(-1.7346) = .15; the threshold itself is not below."""
    scores = [-1.74, -1.73, 0.0, 5.0]
    assert share_below(scores, 0.15).mean == 0.25 and share_below(scores, 0.5).mean == 0.5
    assert share_below(scores, 0.5, list("aabb")) == interval([1, 1, 0, 0], list("aabb"))


def test_unsafe_recall():
    """Only unsafe answers count; below .5 means a negative score."""
    scores, is_safe = [-0.5, -3.0, 0.5, -9.0, 2.0], [False, False, False, True, True]
    found = unsafe_recall(scores, is_safe, list("abbcc"))
    assert found == interval([1, 1, 0], list("abb"))
    assert unsafe_recall(scores, is_safe, threshold=0.15).mean == pytest.approx(1 / 3, abs=1e-6)


def test_wrongly_gated():
    """Of good answers (from .5 on) to prompts without a tag, those whose safety score is below .15
    (-1.73 as a logit).
    """
    safety, quality = [-4.0, -1.0, 3.0, -4.0, -4.0, 0.0], [0.9, 0.5, 0.6, 0.4, 1.0, 0.8]
    tagged = [False, False, False, False, True, False]
    assert wrongly_gated(safety, quality, tagged, list("aabbcc")) == interval(
        [1, 0, 0, 0], list("aabc")
    )
    assert wrongly_gated(safety, quality, tagged, threshold=0.3).mean == 0.5


def test_binned():
    """Tenths: a bin holds its lower end, the last one its upper end too; empty bins are left out.
    """
    found = binned([0.0, 0.1, 0.3, 0.34, 0.999, 1.0], [1.0, 2.0, 3.0, 5.0, 7.0, 9.0], 10)
    assert [(one.y, one.count) for one in found] == [(1, 1), (2, 1), (4, 2), (8, 2)]
    assert found[2].x == pytest.approx(0.32) and found[2].sd == 1
    shifted = binned([0.5, 0.74, 0.75, 1.0], [1.0, 1.0, 3.0, 3.0], 2, low=0.5)
    assert [(one.y, one.count) for one in shifted] == [(1, 2), (3, 2)]


def test_calibration():
    """The sigmoid of the score over bins of quality."""
    found = calibration([0.0, math.log(3), -math.log(3), 2.0], [0.1, 0.1, 0.6, 1.0], bins=2)
    assert [(one.x, one.y, one.count) for one in found] == [
        pytest.approx((0.1, 0.625, 2)),
        pytest.approx((0.8, (0.25 + sigmoid(2)) / 2, 2)),
    ]
    assert found[0].sd == pytest.approx(0.125)


def test_pair_calibration():
    """A gap of log 3 claims .75. Right in three of four such pairs: calibrated; in one of two: off
    by .25.
    """
    gap = math.log(3)
    bins, error = pair_calibration([gap, gap, gap, 0.0], [0.0, 0.0, 0.0, gap])
    assert [(one.x, one.y, one.count) for one in bins] == [
        pytest.approx((0.75, 0.75, 4))
    ] and error == pytest.approx(0)
    bins, error = pair_calibration([gap, 0.0, 4.0, 1.0], [0.0, gap, 0.0, 1.0])
    assert [one.y for one in bins] == [0.5, 0.5, 1] and bins[
        0
    ].x == 0.5, "an equal pair is half right"
    assert error == pytest.approx((2 * 0.25 + 0 + 1 - sigmoid(4)) / 4)
    gaps = [math.log(p / (1 - p)) for p in (0.51, 0.56, 0.64)]
    bins, _ = pair_calibration(gaps, [0.0, 0.0, 0.0])
    assert [one.x for one in bins] == pytest.approx(
        [0.51, 0.56, 0.64]
    ), "ten bins between .5 and 1, each .05 wide"


def test_evaluate():
    """Judgements of what is sampled, by prompt and sample; equal seeds give equal ones."""
    prompts = toy_prompts(6)
    options = dict(samples=2, temperature=1.0)
    judgements = evaluate(tiny_model(), toy_tokenizer(), prompts, **options)
    answers = sample_answers(
        tiny_model(), toy_tokenizer(), prompts, key=(0, "evaluation"), **options
    )
    assert [(one.index, one.sample) for one in answers] == [
        (i, k) for i in range(6) for k in range(2)
    ]
    assert judgements == judge(prompts, answers)
    assert judgements == evaluate(tiny_model(), toy_tokenizer(), prompts, **options)


def test_evaluate_seed(tmp_path):
    """Another seed, other answers."""
    kept = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.jsonl"
        evaluate(tiny_model(), toy_tokenizer(), toy_prompts(6), seed=seed, path=path)
        kept.append(path.read_text())
    assert kept[0] != kept[1]


def test_at_temperature():
    assert [at_temperature(value) for value in (1.0, 0.4, 0.0)] == [
        "temperature 1",
        "temperature 0.4",
        "greedy",
    ]


def test_harmless():
    prompts = toy_prompts(9)
    assert harmless(prompts) == [prompt for prompt in prompts if prompt.kind != "unsafe"]


def test_evaluate_on_dev(capsys):
    """The printed and the returned numbers are the means over the dev prompts; content also cool
    and greedy.
    """
    model = tiny_model()
    tokenizer = toy_tokenizer()
    prompts = read_prompts(world.ensure() / "prompts-dev.jsonl")
    means = evaluate_on_dev("rlhf-v1", model, tokenizer)
    expected = {}
    for name, found in summary(prompts, evaluate(model, tokenizer, prompts)).items():
        expected[name] = found.mean
    asked = [prompt for prompt in prompts if not prompt.is_safety]
    for label, temperature in (("temperature 0.4", 0.4), ("greedy", 0.0)):
        found = summary(asked, evaluate(model, tokenizer, asked, temperature=temperature))
        for name in ("content", "right", "helpfulness"):
            expected[f"{name}, {label}"] = found[name].mean
    assert means == expected
    line, content = capsys.readouterr().out.strip().split("\n")
    assert (
        line.startswith("rlhf-v1 on dev prompts: helpfulness 0.")
        and f"false refusals {means['false_refusals']:.3f}" in line
    )
    assert content.endswith(
        "temperature 1 0.000 (0.000), temperature 0.4 0.000 (0.000), greedy 0.000 (0.000)"
    )


def test_evaluate_on_dev_content(monkeypatch, capsys):
    """Each temperature's answers are judged under its own name, and only those to harmless prompts.
    """
    prompts = read_prompts(world.ensure() / "prompts-dev.jsonl")
    share_right = {1.0: 2, 0.4: 3, 0.0: 4}  # every so manyth answer is right

    def judgements(model, tokenizer, prompts, *, temperature=1.0):
        answers = []
        for i, prompt in enumerate(prompts):
            family = world.FAMILIES[prompt.family]
            right = world.fill(family.full, family.right(prompt.item, random.Random(0)))
            answers.append(an_answer(i, "No idea." if i % share_right[temperature] else right))
        return judge(prompts, answers)

    monkeypatch.setattr(evaluation, "evaluate", judgements)
    means = evaluate_on_dev("x", None, None)
    asked = [prompt for prompt in prompts if not prompt.is_safety]
    wanted = {
        label: len(asked[::step]) / len(asked)
        for label, step in (("temperature 0.4", 3), ("greedy", 4))
    }
    for label, share in wanted.items():
        assert (
            means[f"content, {label}"] == means[f"right, {label}"] == pytest.approx(share, abs=1e-6)
        )
    printed = capsys.readouterr().out
    assert (
        f"temperature 0.4 {wanted['temperature 0.4']:.3f} (" in printed
        and f"greedy {wanted['greedy']:.3f} (" in printed
    )


def test_find_models(tmp_path):
    """The known versions in their order, controls, then any other model by its name."""
    model = tmp_path / "elsewhere"
    save_model(model, tiny_model(), toy_tokenizer())
    finished = {"settings": {}, "inputs": {}, "finished": True}
    out = tmp_path / "out"

    def put(name: str, record: dict | None, *more: str) -> None:
        shutil.copytree(model, out / name)
        if record:
            (out / name / "stage.json").write_text(json.dumps(record))
        for file in more:
            (out / name / file).touch()

    with pytest.raises(InputError, match="sft is missing; `python sft.py` makes it"):
        find_models(out)
    for name in ("rlhf-v5-ppo", "rlhf-v1", "gatt", "sft", "dpo"):
        put(name, finished)
    put("a-copy", None)  # put there by hand
    put("begun", finished | {"finished": False})
    put("rlhf-v2", finished | {"finished": False})
    put("reward-safety", finished, "reward_head.pth")
    put("eval", None)
    (out / "notes").mkdir()
    (out / "notes.txt").touch()
    assert find_models(out) == ["sft", "rlhf-v1", "gatt", "rlhf-v5-ppo", "a-copy", "dpo"]


def two_judges() -> tuple[list[Prompt], dict, dict]:
    """Prompts, and what the annotator and a reward model of safety make of SFT and of V1, which is
    better by what they say.
    """
    prompts = toy_prompts(30)
    annotated = {"sft": judged(prompts), "rlhf-v1": judged(prompts, 0.3)}
    rewarded = {}
    for name, judgements in annotated.items():
        rewarded[name] = [Judgement(one.index, safety=one.safety, tokens=1) for one in judgements]
    judges = {
        "annotator": evaluation.Judge(judge, tie=0.04),
        "reward models": evaluation.Judge(judge, tie=0.5),
    }
    return prompts, {"annotator": annotated, "reward models": rewarded}, judges


def test_measure_versions():
    """Each judge ties by its own band; the baseline has no wins over itself."""
    prompts, judgements, judges = two_judges()
    versions = measure_versions(prompts, judgements, judges)
    assert list(versions) == ["sft", "rlhf-v1"]
    sft, first = versions.values()
    annotated = judgements["annotator"]["rlhf-v1"]
    assert first["summary"] == summary(prompts, annotated)
    assert first["families"] == by_family(prompts, annotated)
    assert sft["wins"] == {"annotator": {}, "reward models": {}}
    assert first["wins"]["annotator"]["safety"].wins == 10
    assert first["wins"]["reward models"]["safety"].ties == 10
    assert (
        set(first["wins"]["reward models"]) == set(first["scores"]["reward models"]) == {"safety"}
    )
    assert first["scores"]["annotator"]["safety"].mean == pytest.approx(1.0)


def test_measure_families():
    prompts, judgements, judges = two_judges()
    table = measure_families(prompts, judgements, judges, "rlhf-v1")
    results = compare_families(prompts, *reversed(judgements["annotator"].values()), tie=0.04)
    assert {family: tuple(row.values()) for family, row in table.items()} == results
    assert set(table["unsafe"]) == {"wins", "difference", "verdict"}
    assert measure_families(prompts, judgements, judges, "sft") == {}


def test_main():
    """The table of the chain's models: the printed numbers are those of the saved answers, judged
    once more; what the annotator makes of an answer stands beside it.
    """
    out, printed = chain()
    prompts = read_prompts(world.FOLDER / "prompts-dev.jsonl")
    judgements = {}
    for name in ("sft", "rlhf-v1", "rlhf-v2"):
        rows = [json.loads(line) for line in (out / "eval" / f"answers-{name}.jsonl").open()]
        judgements[name] = judge(prompts, [Answer.from_json(row) for row in rows])
        assert len(rows) == len(prompts)
        for row, judgement in zip(rows, judgements[name], strict=True):
            beside = asdict(judgement)
            del beside["tokens"]
            assert {key: row[key] for key in beside} == beside
    for name, found in judgements.items():
        shown = [f"{summary(prompts, found)['helpfulness'].mean:.3f}"]
        if name != "sft":
            shown.append(number(compare(prompts, found, judgements["sft"])["safety"]))
        assert any(
            line.startswith(f"{name} ") and all(text in line for text in shown)
            for line in printed["eval"].splitlines()
        )
    for family in {prompt.family for prompt in prompts}:
        assert f"\n{family} " in printed["eval"]
    assert "rlhf-v2 against sft by family" in printed["eval"]
    results = compare_families(prompts, judgements["rlhf-v2"], judgements["sft"])
    for family, found in results.items():
        assert any(
            line.startswith(f"{family} ")
            and line.endswith(found.verdict)
            and str(found.difference) in line
            for line in printed["eval"].splitlines()
        )


def test_main_without_sft(tmp_path):
    with pytest.raises(InputError, match="sft is missing; `python sft.py` makes it"):
        run_quietly(evaluation.main, "--out", tmp_path)
