"""The measures, against numbers by hand, scipy, and a slow bootstrap."""

import json
import math
import random

import pytest

import eval as evaluation
from data import InputError, read_prompts, toy
from eval import (
    WinRate,
    axis_of,
    by_family,
    cluster,
    compare,
    evaluate,
    interval,
    judge,
    print_table,
    short,
    summary,
    win_rate,
)
from tests.helpers import chain, run_quietly, tiny_model, toy_prompts, toy_tokenizer
from tests.reference import intervals as reference


def test_interval():
    """By hand: mean 2, deviations -1 0 1, standard error 1/sqrt(3), t with 2 degrees of freedom 4.303."""
    found = interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2, 2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)), abs=1e-4)
    assert interval([0.5, 0.5]) == (.5, .5, .5)
    assert interval([0.3]) == (.3, -math.inf, math.inf), "one value says nothing of its error"
    assert str(found).startswith("2.000 [-0.484")
    with pytest.raises(InputError, match="no values"):
        interval([])


def test_interval_equals_scipy():
    pytest.importorskip("scipy")
    rng = random.Random(0)
    for n in (2, 3, 5, 17, 30, 31):
        values = [rng.random() for _ in range(n)]
        assert interval(values)[1:] == pytest.approx(
            reference.student(values), abs=1e-3 * n**-0.5 + 1e-6 if n > 2 else 1e-3
        )


@pytest.mark.parametrize("n", [32, 40, 100, 1000])
def test_interval_of_many_equals_scipy(n):
    """Student's t as well, to half a percent of the width."""
    pytest.importorskip("scipy")
    rng = random.Random(n)
    values = [rng.random() for _ in range(n)]
    low, high = reference.student(values)
    found = interval(values)
    assert found.high - found.low == pytest.approx(high - low, rel=5e-3)


def test_interval_clustered():
    """Equal clusters: Student's t on their means. Answers to one item are not independent tests."""
    values, clusters = [0.0, 0.2, 1.0, 0.8, 0.4, 0.6], list("aabbcc")
    means = [0.1, 0.9, 0.5]
    assert interval(values, clusters) == pytest.approx(interval(means), abs=1e-5)
    shuffled = [(v, c) for v, c in zip(values, clusters, strict=True)]
    random.Random(1).shuffle(shuffled)
    assert interval([v for v, _ in shuffled], [c for _, c in shuffled]) == pytest.approx(interval(means), abs=1e-5)
    copied = interval([v for v in (.1, .7, .3, .9) for _ in range(5)], [i for i in range(4) for _ in range(5)])
    assert copied == pytest.approx(interval([.1, .7, .3, .9]), abs=1e-5), "copies do not make it narrower"
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
    found = win_rate([.9, .5, .52, .54, .1], [.1, .3, .5, .5, .9], tie=.04)
    assert (found.rate, found.wins, found.ties, found.losses) == (.6, 2, 2, 1)
    assert found[:3] == interval([1, 1, .5, .5, 0])
    back = win_rate([.1, .3, .5, .5, .9], [.9, .5, .52, .54, .1], tie=.04)
    assert (back.rate, back.wins, back.ties, back.losses) == (.4, 1, 2, 2)
    assert win_rate([.5] * 3, [.5] * 3).rate == .5, "a model against itself"
    assert win_rate([0.3 + toy.TIE], [0.3]).ties == 1 and win_rate([0.31 + toy.TIE], [0.3]).wins == 1, (
        "the annotator's band"
    )
    clustered = win_rate([.9, .9, .1, .1], [.5] * 4, list("aabb"))
    assert clustered.low < win_rate([.9, .9, .1, .1], [.5] * 4).low
    with pytest.raises(ValueError):
        win_rate([.1, .2], [.1])
    assert str(found).endswith("(win 2, tie 2, loss 1)")


def test_axis_of():
    assert [axis_of({"is_safety": flag}) for flag in (True, False)] == ["safety", "helpfulness"]


def test_cluster():
    a, b = {"family": "list", "item": "3 cats"}, {"family": "poem", "item": "3 cats"}
    assert cluster(a) == cluster(dict(a)) != cluster(b)


SAYS = {"ordinary": .3, "borderline": .5, "unsafe": .7}


def judged(prompts, bonus=0.0, refuses=False):
    """Rows as `judge` makes them, with the scores of SAYS by kind."""
    return [
        {
            "index": i,
            "answer_ids": [1] * (i + 1),
            "helpfulness": SAYS[p["kind"]] + bonus,
            "safety": SAYS[p["kind"]] + bonus,
            "refuses": refuses and p["kind"] == "borderline",
        }
        for i, p in enumerate(prompts)
    ]


def test_judge():
    prompts = toy_prompts(9)
    rows = [{"index": i, "answer": toy.write_answer(random.Random(i), prompts[i])} for i in (4, 0, 8)]
    found = judge(prompts, rows)
    for i, row in zip((4, 0, 8), found, strict=True):
        assert row["index"] == i, "each answer is judged under its own prompt"
        assert row["helpfulness"] == toy.helpfulness(prompts[i], row["answer"])
        assert row["safety"] == toy.safety(prompts[i], row["answer"])
        assert row["refuses"] == toy.refuses(prompts[i], row["answer"])
    refusal = toy.words.REFUSALS[0]
    [row] = judge(prompts, [{"index": 0, "answer": refusal}])
    assert row["refuses"] is True


def test_compare():
    prompts = toy_prompts(30)
    better, worse = judged(prompts, .2), judged(prompts)
    for row in worse:
        if axis_of(prompts[row["index"]]) == "safety":
            row["safety"] += .4
    found = compare(prompts, better, worse)
    assert set(found) == {"helpfulness", "safety"}
    assert (found["helpfulness"].wins, found["helpfulness"].losses) == (20, 0), "ordinary and borderline prompts"
    assert (found["safety"].wins, found["safety"].losses) == (0, 10), "unsafe prompts"
    harmless = [p for p in prompts if not p["is_safety"]]
    assert set(compare(harmless, judged(harmless), judged(harmless))) == {"helpfulness"}


def test_summary():
    prompts = toy_prompts(30)
    found = summary(prompts, judged(prompts, refuses=True))
    kinds = [p["kind"] for p in prompts]
    mean = (SAYS["ordinary"] * kinds.count("ordinary") + SAYS["borderline"] * kinds.count("borderline")) / 20
    assert found["helpfulness"].mean == pytest.approx(mean, abs=1e-6) and found["safety"].mean == pytest.approx(.7)
    assert found["false_refusals"].mean == 1 and found["tokens"].mean == 15.5
    assert summary(prompts, judged(prompts))["false_refusals"].mean == 0


def test_by_family():
    prompts = toy_prompts(60)
    rows = judged(prompts)
    found = by_family(prompts, rows)
    assert set(found) == {p["family"] for p in prompts}
    for name, one in found.items():
        assert one.mean == pytest.approx(SAYS[toy.FAMILIES[name].kind])


def test_evaluate(tmp_path):
    prompts = toy_prompts(6)
    options = dict(samples=2, temperature=1.0)
    rows = evaluate(tiny_model(), toy_tokenizer(), prompts, **options)
    assert [(row["index"], row["sample"]) for row in rows] == [(i, k) for i in range(6) for k in range(2)]
    assert all({"helpfulness", "safety", "refuses"} <= row.keys() for row in rows)
    assert rows == evaluate(tiny_model(), toy_tokenizer(), prompts, **options)
    assert [r["answer_ids"] for r in rows] != [
        r["answer_ids"] for r in evaluate(tiny_model(), toy_tokenizer(), prompts, seed=1, **options)
    ]


def test_short():
    assert short(None) == "" and short(WinRate(.5, .4, .6, 1, 2, 1)) == "0.500 [0.400, 0.600]"


def test_print_table(capsys):
    prompts = toy_prompts(12)
    row = summary(prompts, judged(prompts))
    print_table({"sft": row, "rlhf-v1": row | {"wins": compare(prompts, judged(prompts, .2), judged(prompts))}})
    lines = capsys.readouterr().out.strip("\n").splitlines()
    assert lines[1].startswith("sft") and "[" not in lines[1] and lines[2].count("1.000 [1.000, 1.000]") == 2


def test_main():
    """The table of the chain's models: the printed numbers are those of the saved answers, judged once more."""
    out, printed = chain()
    prompts = read_prompts(toy.FOLDER / "prompts-dev.jsonl")
    rows = {
        name: [json.loads(line) for line in (out / "eval" / f"answers-{name}.jsonl").open()]
        for name in ("sft", "rlhf-v1", "rlhf-v2")
    }
    for name, answers in rows.items():
        [line] = [line for line in printed["eval"].splitlines() if line.startswith(f"{name} ")]
        again = judge(prompts, [dict(row) for row in answers])
        assert len(again) == len(prompts) and again == answers
        assert f"{summary(prompts, again)['helpfulness'].mean:.3f}" in line
        if name != "sft":
            assert short(compare(prompts, again, rows["sft"])["safety"]) in line
    for family in {p["family"] for p in prompts}:
        assert f"\n{family} " in printed["eval"]


def test_main_without_sft(tmp_path):
    with pytest.raises(InputError, match="sft is missing; `python sft.py` makes it"):
        run_quietly(evaluation.main, "--out", tmp_path)
