"""The report: made from a small chain, in one file; answers are sampled once; two models compared,
by a person too; and no evaluation prompt is ever trained on."""

import html
import html.parser
import json
import math
import random
import re
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

import eval as evaluation
import report
import runtime
from data import Answer, InputError, Prompt, encode_prompt, printable, read_prompts, world
from data.annotators import sides_swapped
from data.jsonl import AXES
from eval import (
    TURNS,
    Interval,
    Judge,
    Judgement,
    adherence_by_turn,
    allowed_outside,
    axis_of,
    cached_adherence,
    compare,
    compare_content,
    compare_families,
    compare_with_reference,
    harmless,
    health,
    interval,
    judge,
    judge_by_reward_models,
    load_judges,
    measure_adherence,
    measure_content,
    measure_system_prompt,
    prediction_interval,
    score_of,
    summary,
)
from experiments import reference
from play import compare as versus
from reward import load_reward_model
from runtime import (
    cached_answers,
    kept_rows,
    load_model,
    made_by,
    newest_reward_models,
    sample_answers,
)
from tests.helpers import (
    assistant,
    chain,
    run_quietly,
    scratch,
    system,
    tiny_model,
    toy_prompts,
    toy_tokenizer,
    user,
    write_lines,
)

MODELS = ("sft", "rlhf-v1", "rlhf-v2")


def few_prompts() -> list[Prompt]:
    """Prompts of every kind, some items twice."""
    return toy_prompts(24, "dev")


def linked(out: Path) -> Path:
    """An out/ whose models are the chain's."""
    out.mkdir(parents=True)
    for name in (*MODELS, "reward-helpfulness", "reward-safety"):
        (out / name).symlink_to(chain()[0] / name)
    return out


def arguments(out: Path, *more) -> tuple:
    prompts = out.parent / "prompts.jsonl"
    if not prompts.exists():
        write_lines(prompts, few_prompts())
    return ("--out", out, "--prompts", prompts, "--threads", 1, *more)


@cache
def made() -> tuple[Path, str]:
    """The report on the chain and what was printed; the first reward models stand for the second
    ones as well. Read only.
    """
    out = linked(scratch() / "report" / "out")
    (out / "second").mkdir()
    for axis in AXES:
        (out / "second" / f"reward-{axis}").symlink_to(chain()[0] / f"reward-{axis}")
    return out, run_quietly(evaluation.main, *arguments(out, "--answers", 2))


def metrics_of(out: Path) -> dict:
    return json.loads((out / "eval" / "metrics.json").read_text())


def answers_of(out: Path, name: str) -> list[Answer]:
    path = out / "eval" / f"answers-{name}.jsonl"
    return [Answer.from_json(json.loads(line)) for line in path.open()]


class Reader(html.parser.HTMLParser):
    """Texts, links and sources of a page; tags must be closed in their order."""

    EMPTY = {"meta", "img", "br", "path", "use"}

    def __init__(self):
        super().__init__()
        self.open, self.links, self.headings, self.cells, self.texts = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [
            (name, value)
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "srcset")
        ]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [
            (name, value) for name, value in attributes if name in ("src", "href", "xlink:href")
        ]

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def write_reference(path: Path, numbers: dict) -> Path:
    """A file of reference runs, {seed: {name: value}}, as `experiments/reference.py` writes it."""
    path.write_text(json.dumps({"mark": {"world": world.world_hash()}, "result": numbers}))
    return path


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert not reader.open
    return reader


# ---- the report ----


def test_report_is_made():
    """One file that needs no other, the paper's sections in their order, every picture with a
    caption, every section with a plain sentence first.
    """
    out, printed = made()
    source, found = (out / "eval" / "report.html").read_text(), read(out / "eval" / "report.html")
    assert all(value.startswith(("#", "data:image/png;base64,")) for _, value in found.links)
    assert not re.search(r"<script|<link|@import|url\((?!#)", source), "nothing from elsewhere"
    assert [re.findall(r"§[\d.]+|^\w+", title)[-1] for title in found.headings] == [
        "Summary",
        "The",
        "§3.1",
        "§3.2.2",
        "§3.2.3",
        "§3.4",
        "§4",
        "§5.1",
        "Experiments",
        "What",
    ]
    assert 'name="viewport"' in source and "overflow-x: auto" in source
    assert source.count("<figure>") == source.count("<figcaption>") and source.count("<svg") >= 10
    ids = re.findall(r'<(?:clipPath|path|symbol)[^>]*? id="([^"]+)"', source)
    definitions = dict.fromkeys(ids)
    assert (
        ids
        and all(f'id="{name}"' in source for name in re.findall(r"url\(#([^)]+)\)", source))
        and definitions
    )
    for title in found.headings:
        assert f"=== {title}" in printed, "the same in the terminal"
    assert source.count("</h2>\n<p>") == len(found.headings), "a plain sentence comes first"


def test_report_tells_what_it_shows():
    """Captions: the paper's figure or table, the seed, the numbers of prompts and answers, and
    where ours differs.
    """
    source = (made()[0] / "eval" / "report.html").read_text()
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", source, re.S):
        assert re.search(
            r"Fig\. \d|Table \d|§\d|paper|The same|Each with|experiments/", caption
        ), caption
    [told] = [
        text
        for text in re.findall(r"<figcaption>(.*?)</figcaption>", source, re.S)
        if "as Fig. 11" in text
    ]
    for piece in (
        "(seed 0)",
        "24 prompts (16 judged by helpfulness, 8 by safety)",
        "2 answer(s) each at temperature 1",
        "95 %",
        "ChatGPT",
        "cannot matter",
        "scores within 0.04",
        "equal scores",
    ):
        assert piece in told


def test_report_numbers():
    """metrics.json and the tables hold what the measures give, of the answers that are kept."""
    out, printed = made()
    prompts, found = few_prompts(), metrics_of(out)
    answers = {name: answers_of(out, name) for name in MODELS}
    judgements = {name: judge(prompts, answers[name]) for name in MODELS}
    assert list(found["versions"]) == list(MODELS) and found["newest"] == "rlhf-v2"
    assert list(found["judges"]) == ["annotator", "reward models", "second reward models"]
    for name, row in found["versions"].items():
        mean = summary(prompts, judgements[name])
        assert row["summary"]["helpfulness"] == pytest.approx(list(mean["helpfulness"]))
        assert row["summary"]["violations"][0] == pytest.approx(mean["violations"].mean)
        if name != "sft":
            for axis, wins in compare(prompts, judgements[name], judgements["sft"]).items():
                assert row["wins"]["annotator"][axis] == pytest.approx(list(wins))
                assert (
                    wins.wins + wins.ties + wins.losses == {"helpfulness": 32, "safety": 16}[axis]
                )
                shown = re.escape(report.number(wins))
                assert re.search(
                    rf"\n{name} +{axis} +annotator +{shown} +{wins.wins} +{wins.ties} ", printed
                )
    assert not found["versions"]["sft"]["wins"]["annotator"], "the baseline is SFT"
    models = {
        axis: load_reward_model(folder) for axis, folder in newest_reward_models(chain()[0]).items()
    }
    first = {axis: load_reward_model(chain()[0] / f"reward-{axis}") for axis in AXES}
    for who, of_axis in (("reward models", models), ("second reward models", first)):
        v1, sft = (
            judge_by_reward_models(prompts, answers[name], models=of_axis)
            for name in ("rlhf-v1", "sft")
        )
        for axis, wins in compare(prompts, v1, sft, tie=0.0).items():
            assert found["versions"]["rlhf-v1"]["wins"][who][axis] == pytest.approx(list(wins))
            assert found["versions"]["rlhf-v1"]["scores"][who][axis] == pytest.approx(
                list(summary(prompts, v1)[axis]), abs=1e-3
            )


def test_report_with_the_system_prompt():
    """Both models get it; without it the numbers are those of the summary."""
    out, _ = made()
    found, prompts = metrics_of(out)["system_prompt"], few_prompts()
    assert found["text"] == world.words.ORDINARY_SYSTEM
    answers = {name: answers_of(out, f"{name}-system") for name in ("sft", "rlhf-v2")}
    judgements = {name: judge(prompts, of_model) for name, of_model in answers.items()}
    for axis, wins in compare(prompts, judgements["rlhf-v2"], judgements["sft"]).items():
        assert found["with"]["wins"][axis] == pytest.approx(list(wins))
    assert found["without"]["rlhf-v2"]["helpfulness"] == pytest.approx(
        metrics_of(out)["versions"]["rlhf-v2"]["summary"]["helpfulness"]
    )
    with_it = []
    for prompt in prompts:
        with_it.append(replace(prompt, messages=[system(found["text"]), *prompt.messages]))
    again = sample_answers(*load_model(out / "sft"), with_it, key=(0, "evaluation"), samples=2)
    assert [answer.ids for answer in again] == [answer.ids for answer in answers["sft"]]


def test_report_on_prompts_with_a_system_prompt_of_their_own(tmp_path):
    """They cannot get a second one."""
    prompts = few_prompts()
    messages = [system("Be brief."), *prompts[3].messages]
    prompts[3] = replace(prompts[3], messages=messages)
    write_lines(tmp_path / "prompts.jsonl", prompts)
    out = linked(tmp_path / "out")
    run_quietly(evaluation.main, *arguments(out))
    assert not metrics_of(out)["system_prompt"] and "annotator" in metrics_of(out)["judges"]


def test_report_lists_what_is_missing():
    out, printed = made()
    cells = read(out / "eval" / "report.html").cells
    for name, command in {
        "rlhf-v3": f"python rejection_sampling.py --rounds 1-3 --out {out}",
        "gatt": f"python gatt.py --out {out}",
        "rlhf-v4": (
            "python rejection_sampling.py --rounds 4 "
            f"--mix {out}/gatt/dialogs.jsonl --batch-tokens 1500 --out {out}"
        ),
        "rlhf-v4-ppo": f"python ppo.py --out {out}",
        "rlhf-v5": f"python rejection_sampling.py --rounds 5 --init {out}/rlhf-v4-ppo --out {out}",
    }.items():
        assert name in cells and re.search(rf"\n{name} +`{re.escape(command)}`", printed)
    assert "second" not in cells and "rlhf-v1" in cells


def test_report_shows_answers():
    """The same prompts side by side, escaped, near the top."""
    out, _ = made()
    source, prompts = (out / "eval" / "report.html").read_text(), few_prompts()
    shown = metrics_of(out)["shown"]
    assert len(shown) == 8 and {row["prompt"]["kind"] for row in shown} == {
        "ordinary",
        "borderline",
        "unsafe",
    }
    for row in shown:
        [i] = [i for i, prompt in enumerate(prompts) if prompt.messages == row["prompt"]["prompt"]]
        for name in MODELS:
            assert row["answers"][name] == answers_of(out, name)[2 * i].text
        text = html.escape(row["prompt"]["prompt"][0]["content"])
        assert source.index(text) < source.index("supervised fine-tuning (§3.1)</h2>")


def test_second_call_does_not_sample(monkeypatch, tmp_path):
    """It takes the answers that are kept, and tells the same of them."""
    shutil.copytree(made()[0], tmp_path / "out", symlinks=True)
    shutil.copy(made()[0].parent / "prompts.jsonl", tmp_path)
    (tmp_path / "out" / "eval" / "report.html").unlink()
    monkeypatch.setattr(
        runtime.sampling, "generate", lambda *args, **kwargs: pytest.fail("sampled again")
    )
    asked = []

    def recorded(folder, *args, system="", **options):
        asked.append((folder.name, system, options["temperature"]))
        return cached_answers(folder, *args, system=system, **options)

    monkeypatch.setattr(evaluation, "cached_answers", recorded)
    printed = run_quietly(evaluation.main, *arguments(tmp_path / "out", "--answers", 2))
    told = world.words.ORDINARY_SYSTEM
    assert asked[: len(MODELS)] == [(name, "", 1.0) for name in MODELS]
    assert asked[len(MODELS) : -2] == [
        (name, "", value) for value in (0.4, 0.0) for name in MODELS
    ], "content, cool and greedy"
    assert asked[-2:] == [
        ("sft", told, 1.0),
        ("rlhf-v2", told, 1.0),
    ], "both or none have a system prompt"
    assert printed.split() == made()[1].replace(str(made()[0]), str(tmp_path / "out")).split()
    assert (tmp_path / "out" / "eval" / "report.html").exists()


def test_report_judged_by_reward_models(tmp_path):
    """Prompts of another world: nothing needs the annotator, and the reward models judge."""
    out = linked(tmp_path / "out")
    texts = ("Hello?", "Who are you?", "Why?", "How?")
    prompts = [{"prompt": [user(text)], "is_safety": i % 2 == 0} for i, text in enumerate(texts)]
    write_lines(tmp_path / "mine.jsonl", prompts)
    printed = run_quietly(
        evaluation.main, "--out", out, "--prompts", tmp_path / "mine.jsonl", "--threads", 1
    )
    found = metrics_of(out)
    assert (
        list(found["judges"]) == ["reward models"]
        and not found["system_prompt"]
        and "judged by the reward models" in printed
    )
    assert set(found["versions"]["rlhf-v1"]["summary"]) == {"helpfulness", "safety", "tokens"}
    assert set(found["versions"]["rlhf-v1"]["wins"]["reward models"]) == set(AXES)
    assert "mine.jsonl" in printed and "(§4)" not in printed
    read(out / "eval" / "report.html")
    with pytest.raises(InputError, match="toy world's prompts only"):
        run_quietly(
            evaluation.main,
            "--out",
            out,
            "--prompts",
            tmp_path / "mine.jsonl",
            "--judge",
            "annotator",
        )


def test_settings_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="--show -1"):
        run_quietly(evaluation.main, "--out", tmp_path, "--show", -1)
    with pytest.raises(SystemExit):
        run_quietly(evaluation.main, "--out", tmp_path, "--judge", "human")
    with pytest.raises(SystemExit):
        run_quietly(versus.main, "sft", "--out", tmp_path)


# ---- kept answers ----


def test_cached_answers(tmp_path):
    """The same answers as `evaluate` gives; kept while model, prompts and settings stay, sampled
    anew when one changes.
    """
    prompts, path = few_prompts()[:6], tmp_path / "eval" / "answers.jsonl"
    folder = tmp_path / "model"
    runtime.save_model(folder, tiny_model(), toy_tokenizer())
    answers = cached_answers(folder, prompts, path, samples=2)
    again = sample_answers(tiny_model(), toy_tokenizer(), prompts, key=(0, "evaluation"), samples=2)
    ids = [answer.ids for answer in answers]
    assert ids == [answer.ids for answer in again]
    assert [(answer.index, answer.sample) for answer in answers] == [
        (i, k) for i in range(6) for k in range(2)
    ]
    stamp = path.stat().st_mtime_ns
    assert cached_answers(folder, prompts, path, samples=2) == answers
    assert path.stat().st_mtime_ns == stamp
    for change in (
        {"samples": 1},
        {"temperature": 0.5},
        {"seed": 1},
        {"max_new_tokens": 5},
        {"system": "Be brief."},
    ):
        other = cached_answers(folder, prompts, path, **({"samples": 2} | change))
        mark = other[0].made_by
        assert mark != answers[0].made_by and len(other) == 6 * change.get("samples", 2)
        assert {row["made_by"] for row in kept_rows(path, mark)} == {mark}
    other = cached_answers(folder, few_prompts()[6:12], path, samples=2)
    assert [answer.ids for answer in other] != ids
    assert cached_answers(folder, prompts, path, samples=2) == answers
    runtime.save_model(folder, tiny_model(seed=1), toy_tokenizer())
    newer = cached_answers(folder, prompts, path, samples=2)
    assert [answer.ids for answer in newer] != ids, "another model, other answers"


def test_cached_answers_goes_on(tmp_path, monkeypatch):
    """What a killed run had sampled is kept, the rest is added."""
    prompts, path, folder = few_prompts(), tmp_path / "answers.jsonl", tmp_path / "model"
    runtime.save_model(folder, tiny_model(), toy_tokenizer())
    monkeypatch.setitem(runtime.sample_answers.__kwdefaults__, "batch_rows", 8)
    answers = cached_answers(folder, prompts, path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:8]) + lines[8][:20])
    calls, generate = [], runtime.sampling.generate
    monkeypatch.setattr(
        runtime.sampling,
        "generate",
        lambda *args, **kwargs: calls.append(1) or generate(*args, **kwargs),
    )
    assert cached_answers(folder, prompts, path) == answers and len(calls) == 2


def test_kept_rows(tmp_path):
    path = (
        write_lines(tmp_path / "deep" / "rows.jsonl", [])
        if (tmp_path / "deep").mkdir()
        else tmp_path / "deep" / "rows.jsonl"
    )
    assert kept_rows(path, "a") == []
    write_lines(path, [{"made_by": "a"}, {"made_by": "a", "n": 2}])
    assert kept_rows(path, "a") == [{"made_by": "a"}, {"made_by": "a", "n": 2}]
    assert kept_rows(path, "b") == [] and not path.exists()
    write_lines(path, [{"made_by": "a"}, {"made_by": "b"}])
    assert kept_rows(path, "a") == [] and not path.exists()


def test_made_by(tmp_path):
    (tmp_path / "params.json").write_text("1")
    mark = made_by(tmp_path, 1, "x")
    assert (
        mark == made_by(tmp_path, 1, "x")
        and len({mark, made_by(tmp_path, 2, "x"), made_by(tmp_path, 1)}) == 3
    )
    (tmp_path / "params.json").write_text("2")
    assert made_by(tmp_path, 1, "x") != mark


def test_cached_adherence(tmp_path, monkeypatch):
    folder, path = tmp_path / "model", tmp_path / "adherence.jsonl"
    runtime.save_model(folder, tiny_model(max_seq_len=4096), toy_tokenizer())
    monkeypatch.setitem(evaluation.adherence.__kwdefaults__, "batch_rows", 2)
    monkeypatch.setattr(evaluation, "TURNS", (1, 2))
    rows = cached_adherence(folder, path, dialogs=2)
    assert {row["turn"] for row in rows} == {1, 2} and {row["dialog"] for row in rows} == {0, 1}
    assert set(adherence_by_turn(rows)) == {"1", "2", "mean"} and TURNS[-1] == 20
    asked = []

    def recorded(model, tokenizer, constraints, **options):
        asked.append(options)
        return rows

    monkeypatch.setattr(evaluation, "adherence", recorded)
    assert cached_adherence(folder, path, dialogs=2) == rows and not asked, "kept"
    cached_adherence(folder, path, dialogs=2, seed=7)
    assert asked == [
        {"turns": 2, "measure": (1, 2), "seed": 7}
    ], "another seed is asked anew, told once in a dialog"


def test_read_reference(tmp_path, capsys):
    """Reference runs of another world are no measure of this one."""
    assert evaluation.read_reference(tmp_path / "missing.json") == {}
    path = write_reference(tmp_path / "reference.json", {"1": {"sft: helpfulness": 0.5}})
    assert (
        evaluation.read_reference(path) == {"1": {"sft: helpfulness": 0.5}}
        and not capsys.readouterr().out
    )
    path.write_text(json.dumps({"mark": {"world": "another"}, "result": {"1": {}}}))
    assert (
        evaluation.read_reference(path) == {} and "of another toy world" in capsys.readouterr().out
    )


def an_answer(index: int, text: str) -> Answer:
    return Answer(index, 0, text, [1], 0.0, 1.0, "eos", False)


def right_answer(prompt: Prompt) -> str:
    """In full style; to an unsafe prompt, what it asks for."""
    family = world.FAMILIES[prompt.family]
    return world.fill(family.full, family.right(prompt.item, random.Random(0)))


def test_main_wiring(tmp_path, monkeypatch):
    """Which models are compared with which, by which seed; a control is no version, a run not its
    own reference.
    """
    out = linked(tmp_path / "out")
    (out / "gatt").symlink_to(chain()[0] / "rlhf-v2")
    (out / "rlhf-v5-no-ppo").symlink_to(chain()[0] / "rlhf-v1")
    prompts = write_lines(tmp_path / "prompts-test.jsonl", few_prompts())
    annotator = {"annotator": Judge(judge, world.TIE)}
    monkeypatch.setattr(evaluation, "load_judges", lambda *arguments: annotator)
    # SFT only without the system prompt
    good = {("gatt", ""), ("gatt", world.words.ORDINARY_SYSTEM), ("sft", "")}

    def answers(folder, prompts, path, *, system="", samples=1, **options):
        is_good = (folder.name, system) in good
        found = []
        for i, prompt in enumerate(prompts):
            right = right_answer(prompt)
            if prompt.is_safety:
                text = world.words.REFUSALS[0] if is_good else right
            else:
                text = right if is_good else "No."
            found.append(an_answer(i, text))
        return found

    monkeypatch.setattr(evaluation, "cached_answers", answers)
    asked = []

    def adherence(folder, path, **options):
        asked.append((folder.name, options["dialogs"], options["seed"]))
        return [{"dialog": 0, "turn": 1, "obeys": [True]}]

    monkeypatch.setattr(evaluation, "cached_adherence", adherence)
    numbers = {str(seed): {"sft: helpfulness": 0.5} for seed in range(5)}
    monkeypatch.setattr(
        evaluation, "REFERENCE", write_reference(tmp_path / "reference.json", numbers)
    )
    run_quietly(
        evaluation.main,
        "--out",
        out,
        "--prompts",
        prompts,
        "--threads",
        1,
        "--seed",
        3,
        "--dialogs",
        2,
    )
    found = metrics_of(out)
    assert found["newest"] == "gatt"
    assert asked == [("gatt", 2, 3), ("rlhf-v5-no-ppo", 2, 3)]
    assert (
        found["system_prompt"]["with"]["wins"]["safety"][0] == 1
    ), "SFT has the system prompt, too"
    assert found["system_prompt"]["without"]["wins"]["safety"][0] == 0.5
    assert found["reference_seeds"] == ["1", "2", "3", "4"], "this run is of seed 0"


def test_main_shows_other_models(tmp_path):
    """A student's folder is asked and compared like a version, but is not the newest one."""
    out = linked(tmp_path / "out")
    no_record = shutil.ignore_patterns("stage.json")
    shutil.copytree(chain()[0] / "rlhf-v1", out / "dpo", ignore=no_record)
    run_quietly(evaluation.main, *arguments(out))
    found = metrics_of(out)
    assert list(found["versions"]) == [*MODELS, "dpo"] and found["newest"] == "rlhf-v2"
    assert found["versions"]["dpo"] == found["versions"]["rlhf-v1"], "the same weights"
    for row in found["shown"]:
        assert set(row["answers"]) == set(row["rewards"]) == {*MODELS, "dpo"}


def test_shown_rewards():
    """Beside each answer stands the newest reward models' score of it."""
    out, _ = made()
    prompts = few_prompts()
    models = {}
    for axis, folder in newest_reward_models(chain()[0]).items():
        models[axis] = load_reward_model(folder)
    answers = answers_of(out, "rlhf-v2")
    judgements = judge_by_reward_models(prompts, answers, models=models)
    shown = metrics_of(out)["shown"]
    for number, row in zip(report.pick_shown(prompts, 8), shown, strict=True):
        score = score_of(prompts[number], judgements[2 * number])
        assert row["rewards"]["rlhf-v2"] == pytest.approx(score, abs=1e-4)


def asked_of(asked: list, right: dict):
    """A model's answers: right to those prompts that `right` gives it by (model, suffix), and no
    more than "No." to the others; what was asked is noted.
    """

    def ask(prompts, name, suffix, **options):
        asked.append((name, suffix, options))
        answers = []
        for i, prompt in enumerate(prompts):
            is_right = i < right.get((name, suffix), 0)
            answers.append(an_answer(i, right_answer(prompt) if is_right else "No."))
        return answers

    return ask


def test_measure_content():
    """At the temperature of the judged answers nobody is asked again; at the others the harmless
    prompts alone are.
    """
    prompts = few_prompts()
    count = len(harmless(prompts))
    asked = []
    right = {("sft", "-greedy"): count, ("rlhf-v1", "-temperature-0.4"): count // 2}
    ask = asked_of(asked, right)
    annotated = {}
    for name in ("sft", "rlhf-v1"):
        answers = [an_answer(i, right_answer(prompt)) for i, prompt in enumerate(prompts)]
        annotated[name] = judge(prompts, answers)
    table = measure_content(ask, prompts, annotated, 1.0)
    assert asked == [
        ("sft", "-temperature-0.4", {"temperature": 0.4}),
        ("rlhf-v1", "-temperature-0.4", {"temperature": 0.4}),
        ("sft", "-greedy", {"temperature": 0.0}),
        ("rlhf-v1", "-greedy", {"temperature": 0.0}),
    ]
    of_harmless = {}
    for name, judgements in annotated.items():
        of_harmless[name] = [one for one in judgements if not prompts[one.index].is_safety]
    assert table["temperature 1"] == compare_content(prompts, of_harmless)
    assert table["temperature 1"]["sft"]["content"].mean == 1
    assert table["temperature 0.4"]["rlhf-v1"]["right"].mean == pytest.approx(0.5, abs=1e-6)
    assert table["temperature 0.4"]["rlhf-v1"]["difference"].mean > 0
    assert table["greedy"]["rlhf-v1"]["difference"].mean == -1
    unsafe = [prompt for prompt in prompts if prompt.is_safety]
    assert measure_content(ask, unsafe, annotated, 1.0) == {}, "there is no harmless prompt"


def test_measure_system_prompt(tmp_path, monkeypatch):
    """Both models get it, and are compared with one another; nothing is asked where it does not
    fit.
    """
    asked = []
    right = {("sft", ""): 24, ("gatt", "-system"): 24}
    monkeypatch.setattr(
        evaluation,
        "_ask_model",
        lambda settings, device, *rest, **options: asked_of(asked, right)(*rest, **options),
    )
    prompts = few_prompts()
    ask = asked_of([], right)
    annotated = {name: judge(prompts, ask(prompts, name, "")) for name in ("sft", "gatt")}
    settings = evaluation.Settings(out=tmp_path)
    measure = partial(measure_system_prompt, settings, torch.device("cpu"))
    found = measure(prompts, annotated, "gatt")
    text = world.words.ORDINARY_SYSTEM
    assert found["text"] == text
    assert asked == [("sft", "-system", {"system": text}), ("gatt", "-system", {"system": text})]
    assert found["without"]["wins"] == compare(prompts, annotated["gatt"], annotated["sft"])
    assert found["without"]["wins"]["helpfulness"].rate == 0
    assert found["with"]["wins"]["helpfulness"].rate == 1
    assert found["with"]["gatt"] == found["without"]["sft"] == summary(prompts, annotated["sft"])
    kept = answers_of(tmp_path, "gatt-system")
    assert [answer.text for answer in kept] == [right_answer(prompt) for prompt in prompts]
    assert measure(prompts, annotated, "sft") == {}
    prompts[5] = replace(prompts[5], messages=[system("Be brief."), *prompts[5].messages])
    assert measure(prompts, annotated, "gatt") == {} and len(asked) == 2


def test_measure_adherence(tmp_path, monkeypatch):
    """Of V3 and all that follow it, others included, once there is Ghost Attention."""
    asked = []

    def adherence(folder, path, **options):
        asked.append((folder.name, path.name, options["dialogs"], options["seed"]))
        return [{"dialog": 0, "turn": 1, "obeys": [folder.name == "gatt"]}]

    monkeypatch.setattr(evaluation, "cached_adherence", adherence)
    settings = evaluation.Settings(out=tmp_path, dialogs=3, seed=7)
    names = ["sft", "rlhf-v2", "rlhf-v3", "gatt", "dpo"]
    table = measure_adherence(settings, names, torch.device("cpu"))
    assert {name: found["mean"].mean for name, found in table.items()} == {
        "rlhf-v3": 0,
        "gatt": 1,
        "dpo": 0,
    }
    assert asked[0] == ("rlhf-v3", "adherence-rlhf-v3.jsonl", 3, 7)
    assert measure_adherence(settings, ["sft", "rlhf-v3"], torch.device("cpu")) == {}
    settings = evaluation.Settings(out=tmp_path, dialogs=0)
    assert measure_adherence(settings, names, torch.device("cpu")) == {} and len(asked) == 3


def test_compare_with_reference(tmp_path, monkeypatch):
    """A run is compared with the other seeds; one of other prompts, temperature or judge with none.
    """
    numbers = {str(seed): {"sft: helpfulness": 0.5} for seed in range(5)}
    path = write_reference(tmp_path / "reference.json", numbers)
    monkeypatch.setattr(evaluation, "REFERENCE", path)
    metrics = {
        "prompts": {"file": "prompts-test.jsonl", "temperature": 1.0},
        "judges": {"annotator": 0.04, "reward models": 0.0},
        "stages": {"sft": {"settings": {"seed": 3}}},
        "numbers": {"sft: helpfulness": 0.7},
    }
    found = compare_with_reference(metrics)
    assert found["reference_seeds"] == ["0", "1", "2", "4"] and found["allowed_outside"] == 1
    assert not found["health"]["sft: helpfulness"].inside
    assert compare_with_reference(metrics | {"stages": {}})["reference_seeds"] == list("01234")
    for other in (
        {"prompts": {"file": "prompts-dev.jsonl", "temperature": 1.0}},
        {"prompts": {"file": "prompts-test.jsonl", "temperature": 0.5}},
        {"judges": {"reward models": 0.0, "annotator": 0.04}},
    ):
        found = compare_with_reference(metrics | other)
        assert found == {"health": {}, "allowed_outside": 0, "reference_seeds": []}


# ---- judges ----


def test_judge_by_reward_models():
    """Each answer's score is that of its own prompt and ids, on the prompt's axis, by that axis's
    model.
    """
    prompts, out = few_prompts(), chain()[0]
    model, tokenizer = load_model(out / "sft")
    key = (0, "evaluation")
    answers = []
    for answer in sample_answers(model, tokenizer, prompts, key=key, samples=2):
        answers.append(replace(answer, tokenizer=toy_tokenizer().fingerprint))
    models = {axis: load_reward_model(out / f"reward-{axis}") for axis in AXES}
    judgements = judge_by_reward_models(prompts, answers, models=models)
    for answer, judgement in list(zip(answers, judgements, strict=True))[::5]:
        prompt = prompts[answer.index]
        ids = encode_prompt(toy_tokenizer(), prompt.messages) + answer.ids
        with torch.inference_mode():
            reward_model, _ = models[axis_of(prompt)]
            expected = reward_model(torch.tensor([ids]), torch.tensor([len(ids)])).item()
        score = score_of(prompt, judgement)
        assert score == pytest.approx(expected, abs=1e-4)
        alone = Judgement(answer.index, tokens=len(answer.ids), **{axis_of(prompt): score})
        assert judgement == alone, "of the other axis, and of what it says, nothing is known"
    of_safety = judge_by_reward_models(prompts, answers, models={"safety": models["safety"]})
    assert all(judgement.helpfulness is None for judgement in of_safety)
    foreign = [replace(answer, tokenizer="another") for answer in answers]
    by_text = judge_by_reward_models(prompts, foreign, models=models)
    all_ended = all(answer.finish_reason == "eos" for answer in answers)
    assert by_text != judgements or all_ended, "by its text, with EOS"
    tagged = replace(foreign[0], has_tag=True, text="[INST]")
    judge_by_reward_models(prompts, [tagged], models=models)


def test_load_judges(tmp_path, capsys):
    out, prompts = made()[0], few_prompts()
    assert list(load_judges(out, prompts)) == ["annotator", "reward models", "second reward models"]
    assert next(iter(load_judges(out, prompts, "reward"))) == "reward models"
    assert (
        load_judges(out, prompts)["annotator"].tie == world.TIE
        and load_judges(out, prompts)["reward models"].tie == 0.0
    )
    mine = [Prompt([user("Hi?")], family="all", item="0")]
    assert list(load_judges(out, mine)) == ["reward models", "second reward models"]
    assert list(load_judges(tmp_path, prompts)) == ["annotator"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "reward-safety").symlink_to(out / "reward-safety")
    capsys.readouterr()
    assert list(load_judges(tmp_path / "one", mine)) == ["reward models"]
    assert (
        "reward-helpfulness is missing: the reward models do not judge helpfulness"
        in capsys.readouterr().out
    )
    load_judges(tmp_path / "one", [replace(mine[0], is_safety=True)])
    assert not capsys.readouterr().out, "nobody asks for the other axis"
    with pytest.raises(InputError, match="nobody can judge"):
        load_judges(tmp_path, mine)
    with pytest.raises(InputError, match="`python reward.py` makes"):
        load_judges(tmp_path, prompts, "reward")


# ---- A against B ----


def test_compare_two(monkeypatch):
    """Names in OUT or folders; the printed numbers are those of the measures, A's wins over B."""
    out = made()[0]
    printed = run_quietly(versus.main, "rlhf-v2", "sft", *arguments(out, "--answers", 2))
    prompts = few_prompts()
    answers = {name: answers_of(out, name) for name in ("rlhf-v2", "sft")}
    judgements = [judge(prompts, of_model) for of_model in answers.values()]
    for axis, found in compare(prompts, *judgements).items():
        assert re.search(rf"\n{axis} +{re.escape(str(found))}", printed)
    for family, found in compare_families(prompts, *judgements).items():
        assert re.search(
            rf"\n{family} +{re.escape(report.number(found.wins))}"
            rf" +{re.escape(report.number(found.difference))}",
            printed,
        )
    assert (
        "rlhf-v2 against sft by family of prompts" in printed
        and "not worse: above -0.03." in printed
    )
    paths = chain()[0] / "rlhf-v2", chain()[0] / "sft"
    folders = run_quietly(versus.main, *paths, *arguments(out, "--answers", 2))
    assert folders.splitlines()[2:4] == printed.splitlines()[2:4]
    printed = run_quietly(
        versus.main, "rlhf-v1", "sft", *arguments(out, "--answers", 2, "--judge", "reward")
    )
    wins = metrics_of(out)["versions"]["rlhf-v1"]["wins"]["reward models"]["safety"]
    assert "judged by reward models" in printed and re.search(rf"\nsafety +{wins[0]:.3f} ", printed)
    with pytest.raises(InputError, match="'nowhere' is neither a model in"):
        run_quietly(versus.main, "nowhere", "sft", *arguments(out))

    # a judge under whom one of the two is better for sure
    by_length = {"length": Judge(judge_by_length, 0.0)}
    monkeypatch.setattr(versus, "load_judges", lambda *arguments: by_length)
    printed = run_quietly(versus.main, "rlhf-v2", "sft", *arguments(out, "--answers", 2))
    judgements = [judge_by_length(prompts, of_model) for of_model in answers.values()]
    expected = compare(prompts, *judgements, tie=0.0)
    assert any(found.wins != found.losses for found in expected.values())
    for axis, found in expected.items():
        assert re.search(rf"\n{axis} +{re.escape(str(found))}", printed)


def judge_by_length(prompts: list[Prompt], answers: list[Answer]) -> list[Judgement]:
    """The longer, the better."""
    judgements = []
    for answer in answers:
        length = len(answer.text)
        judgements.append(Judgement(answer.index, helpfulness=length, safety=length))
    return judgements


class Person:
    """Types for someone who likes longer answers, the more the longer; stops after so many."""

    def __init__(self, monkeypatch, capsys, stop: int):
        self.asked, self.stop, self.capsys, self.seen = 0, stop, capsys, []
        monkeypatch.setattr("builtins.input", self.type)

    def type(self, question: str) -> str:
        printed = self.capsys.readouterr().out
        if self.asked == self.stop:
            return "q"
        self.asked += 1
        self.seen.append(printed)
        left, right = (
            re.search(rf"{side}: +(.*?)(?=\n  RIGHT|\n*\Z)", printed, re.S)[1]
            for side in ("LEFT", "RIGHT")
        )
        difference = len(left) - len(right)
        return "2" if difference > 0 else "6" if difference < 0 else "4"


def pairs_of_texts(count: int = 12) -> tuple[list[Prompt], list[Answer], list[Answer]]:
    """Prompts and two models' answers: the first one's are longer four times in six, as long or
    equal else.
    """
    texts = [
        ("aaaa", "b"),
        ("aaa", "bb"),
        ("a", "bbb"),
        ("aa", "bb"),
        ("same", "same"),
        ("aaaaaa", "bbb"),
    ]
    prompts, first, second = [], [], []
    for i in range(count):
        message = user(f"Question {i}?")
        prompts.append(Prompt([message], is_safety=i % 2 == 0, family="f", item=str(i)))
        one, other = texts[i % 6]
        first.append(replace(an_answer(i, one), made_by="model 0"))
        second.append(replace(an_answer(i, other), made_by="model 1"))
    return prompts, first, second


def test_ask_grades(tmp_path, monkeypatch, capsys):
    """Blind, each pair once, the sides swapped back, equal answers unasked; a second call goes on
    where the first stopped.
    """
    prompts, first, second = pairs_of_texts()
    path = tmp_path / "eval" / "human.jsonl"
    person = Person(monkeypatch, capsys, stop=4)
    found = versus.ask_grades(prompts, first, second, path, seed=0)
    assert person.asked == 4 and 4 <= len(found) < 12
    assert all("model" not in text for text in person.seen)
    half = path.read_text()
    again = Person(monkeypatch, capsys, stop=100)
    found = versus.ask_grades(prompts, first, second, path, seed=0)
    assert again.asked == 10 - 4 and path.read_text().startswith(half) and len(found) == 12
    grades = {grade.index: grade.grade for grade in found}
    assert [grades[i] for i in range(12)] == [2, 2, -2, 0, 0, 2] * 2
    swapped = {grade.index: grade.swapped for grade in found}
    assert (
        swapped == {i: sides_swapped("human", 0, i) for i in range(12)}
        and len(set(swapped.values())) == 2
    )
    none = Person(monkeypatch, capsys, stop=0)
    assert len(versus.ask_grades(prompts, first, second, path, seed=0)) == 12 and none.asked == 0
    newer = [replace(answer, made_by="another model") for answer in first]
    found = versus.ask_grades(prompts, newer, second, path, seed=0)
    assert all(
        grade.grade == 0 for grade in found
    ), "what was said of other models does not count; equal answers are ties"
    assert path.read_text().startswith(half), "but it is kept"


def test_unswap():
    assert [versus.unswap(typed, False) for typed in range(1, 8)] == [3, 2, 1, 0, -1, -2, -3]
    assert [versus.unswap(typed, True) for typed in range(1, 8)] == [-3, -2, -1, 0, 1, 2, 3]


def test_compare_by_a_person(monkeypatch, capsys):
    """The whole command: a person's win rate for A is that of the pairs that were judged, ties
    included.
    """
    out, prompts = made()[0], few_prompts()
    answers = [answers_of(out, name) for name in ("rlhf-v1", "sft")]
    person = Person(monkeypatch, capsys, stop=10**6)
    asked = arguments(out, "--answers", 2, "--judge", "human")
    versus.main(["rlhf-v1", "sft", *map(str, asked)])
    printed = capsys.readouterr().out
    lengths = [judge_by_length(prompts, of_model) for of_model in answers]
    for axis, wins in compare(prompts, *lengths, tie=0.0).items():
        assert re.search(
            rf"\n{axis} +{wins.rate:.3f} .*\(win {wins.wins}, tie {wins.ties}, loss"
            rf" {wins.losses}\)",
            printed,
        )
    kept = [json.loads(line) for line in (out / "eval" / "human-rlhf-v1-sft.jsonl").open()]
    equal = sum(a.text == b.text for a, b in zip(*answers, strict=True))
    assert len(kept) == 48 and person.asked == 48 - equal


# ---- reference runs ----


def test_prediction_interval():
    """By hand: seeds 1, 2, 3: s = 1, t(2) = 4.302653, times sqrt(4/3); and by scipy's t."""
    assert prediction_interval([1.0, 2.0, 3.0]) == (
        2.0,
        pytest.approx(2 - 4.302653 * math.sqrt(4 / 3), abs=1e-5),
        pytest.approx(2 + 4.302653 * math.sqrt(4 / 3), abs=1e-5),
    )
    assert prediction_interval([5.0]) == (5.0, -math.inf, math.inf) and prediction_interval(
        [2.0, 2.0]
    ) == (2.0, 2.0, 2.0)
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    for n in (2, 5, 9):
        values = [rng.gauss(3, 2) for _ in range(n)]
        mean, low, high = prediction_interval(values)
        scale = stats.tstd(values) * math.sqrt(1 + 1 / n)
        assert (low, high) == pytest.approx(
            stats.t.interval(0.95, n - 1, loc=mean, scale=scale), abs=1e-4
        )
    # t of .05 / 41, two-sided, two degrees of freedom
    _, _, high = prediction_interval([1.0, 2.0, 3.0], comparisons=41)
    assert high == pytest.approx(2 + 28.609444 * math.sqrt(4 / 3), abs=1e-4)
    rng, inside = random.Random(1), 0
    for _ in range(1000):  # of a sixth run, 95 % lie where five say
        _, low, high = prediction_interval([rng.gauss(0, 1) for _ in range(5)])
        inside += low <= rng.gauss(0, 1) <= high
    assert 930 <= inside <= 968


def test_health():
    reference = {str(seed): {"loss": 1.0 + 0.1 * seed, "constant": 0.5} for seed in range(5)} | {
        "9": {"rare": 1.0}
    }
    found = health({"loss": 1.3, "constant": 0.5, "rare": 7.0, "new": 1.0}, reference)
    assert set(found) == {"loss", "constant"} and found["loss"].inside and found["constant"].inside
    assert found["loss"].expected == prediction_interval([1.0, 1.1, 1.2, 1.3, 1.4])
    assert not health({"loss": found["loss"].expected.high + 0.01}, reference)["loss"].inside
    assert not health({"loss": found["loss"].expected.low - 0.01}, reference)["loss"].inside
    assert (
        not health({"constant": 0.51}, reference)["constant"].inside
        and health({"loss": 1.0}, {}) == {}
    )
    runs = {seed: run | {f"other {i}": 0.0 for i in range(9)} for seed, run in reference.items()}
    for count in (1, 10):  # far: outside of the interval for all numbers together
        others = {f"other {i}": 0.0 for i in range(count - 1)} | {"new": 1.0}
        _, low, high = prediction_interval([1.0, 1.1, 1.2, 1.3, 1.4], comparisons=count)
        far = [
            health({"loss": value} | others, runs)["loss"].far
            for value in (low - 0.01, low + 0.01, high - 0.01, high + 0.01)
        ]
        assert far == [True, False, False, True]


def test_allowed_outside():
    stats = pytest.importorskip("scipy.stats")
    for count in (1, 5, 20, 38, 60):
        k = allowed_outside(count)
        assert stats.binom.sf(k, count, 0.05) < 0.05 and (
            k == 0 or stats.binom.sf(k - 1, count, 0.05) >= 0.05
        )
    assert allowed_outside(0) == 0


def test_report_content():
    """Content and right of every version at each temperature, from the answers that are kept;
    printed and in the numbers.
    """
    out, printed = made()
    prompts, found = few_prompts(), metrics_of(out)
    asked = harmless(prompts)
    assert list(found["content"]) == ["temperature 1", "temperature 0.4", "greedy"]
    assert "Right before nice" in printed
    for name in MODELS:
        of_all = judge(prompts, answers_of(out, name))
        expected = {"temperature 1": [one for one in of_all if not prompts[one.index].is_safety]}
        for label, end in (("temperature 0.4", "temperature-0.4"), ("greedy", "greedy")):
            answers = answers_of(out, f"{name}-{end}")
            expected[label] = judge(asked, answers)
            assert {answer.temperature for answer in answers} == {0.4 if "4" in end else 0.0}
        for label, judgements in expected.items():
            assert len(judgements) == 2 * len(asked)
            row = found["content"][label][name]
            for key in ("content", "right", "helpfulness"):
                total = sum(float(getattr(one, key)) for one in judgements)
                mean = total / len(judgements)
                assert (
                    row[key][0]
                    == found["numbers"][f"{name}: {key}, {label}"]
                    == pytest.approx(mean, abs=1e-5)
                )
            assert ("difference" in row) == (name != "sft")


def test_key_numbers():
    """Names say of which pipeline V4 is; numbers are those of the metrics."""
    metrics = metrics_of(made()[0])
    found = report.key_numbers(metrics)
    assert found == metrics["numbers"] and all(isinstance(value, float) for value in found.values())
    assert found["sft: helpfulness"] == metrics["versions"]["sft"]["summary"]["helpfulness"][0]
    assert (
        found["rlhf-v2: safety, win over sft"]
        == metrics["versions"]["rlhf-v2"]["wins"]["annotator"]["safety"][0]
    )
    assert found["sft: dev_loss"] == json.loads((chain()[0] / "sft" / "stage.json").read_text())[
        "results"
    ]["dev_loss"] or (
        abs(found["sft: dev_loss"] - metrics["stages"]["sft"]["results"]["dev_loss"]) < 1e-5
    )
    assert "reward-safety: reward model average" in found
    metrics["versions"]["rlhf-v4"] = metrics["versions"]["rlhf-v2"]
    metrics["stages"] |= {
        "rlhf-v4": {"inputs": {"mix": "a"}, "results": {}, "settings": {}},
        "rlhf-v4-ppo": {"inputs": {}, "results": {"best": {"kl": 1.5}}, "settings": {}},
    }
    metrics["adherence"] = {"rlhf-v4": {"mean": [0.75, 0.7, 0.8]}}
    found = report.key_numbers(metrics)
    assert (
        found["rlhf-v4 (with GAtt): adherence"] == 0.75
        and found["rlhf-v4-ppo (with GAtt): best kl"] == 1.5
    )
    assert "rlhf-v4: helpfulness" not in found


def healthy_metrics() -> dict:
    """The chain's metrics beside made-up reference runs: one number far outside."""
    metrics = metrics_of(made()[0])
    reference = {
        str(seed): {name: value + 0.01 * seed - 0.02 for name, value in metrics["numbers"].items()}
        for seed in range(5)
    }
    metrics["numbers"]["sft: safety"] += 0.1
    return metrics | {
        "health": runtime.plain_json(health(metrics["numbers"], reference)),
        "reference_seeds": list(reference),
        "allowed_outside": 1,
    }


def test_health_section():
    """The run in its band; what is outside is named, and too many outside are no healthy run."""
    metrics = healthy_metrics()
    title, (_, figure, table) = report.opening.health_section(metrics, made()[0])
    assert [row[0] for row in table.rows if row[-1] == "OUTSIDE"] == ["sft: safety"]
    [band, run] = next(panel for panel in figure.panels if panel.title == "safety").curves
    i = run.x.index("sft")
    assert not band.low[i] <= run.y[i] <= band.high[i] and band.low[i] < band.y[i] < band.high[i]
    assert "looks healthy" in report.opening.health_text(
        metrics
    ) and "Outside: sft: safety" in report.opening.health_text(metrics)
    assert "does NOT look healthy" in report.opening.health_text(metrics | {"allowed_outside": 0})
    value, expected, inside, _ = metrics["health"]["sft: safety"]
    metrics["health"]["sft: safety"] = [value, expected, inside, True]
    assert "does NOT look healthy" in report.opening.health_text(
        metrics
    ) and "far outside: sft: safety" in report.opening.health_text(metrics)
    found = [section.title for section in report.sections(metrics, made()[0])]
    assert found[:3] == ["Summary", "The same prompts, version by version", title]


def test_reference(tmp_path, monkeypatch):
    """Only what is not finished is run, in the order of the pipeline; the numbers are those of the
    report.
    """
    out = linked(tmp_path / "runs" / "7")
    commands = [" ".join(words) for words in reference.missing_commands(out, 7)]
    assert [words.split()[0] for words in commands] == [
        "rejection_sampling.py",
        "gatt.py",
        "rejection_sampling.py",
        "ppo.py",
        "rejection_sampling.py",
    ]
    assert (
        commands[2]
        == f"rejection_sampling.py --rounds 4 --mix {out}/gatt/dialogs.jsonl --batch-tokens 1500"
        f" --out {out} --seed 7 --threads 1"
    )
    (out / "eval").mkdir()
    monkeypatch.setattr(
        reference.measures,
        "main",
        lambda argv: shutil.copy(made()[0] / "eval" / "metrics.json", out / "eval"),
    )
    monkeypatch.setattr(
        "sys.argv", ["reference.py", "--seeds", "7", "--out", str(tmp_path / "runs"), "--collect"]
    )
    reference.main()
    found = json.loads((tmp_path / "runs" / "results" / "reference.json").read_text())["result"]
    assert found["7"] == pytest.approx(metrics_of(made()[0])["numbers"], abs=1e-4)


# ---- pictures, pages ----


def test_pick_shown():
    kinds = {"edge": "borderline"}
    prompts = []
    for family in ("list", "list", "poem", "edge", "bad", "list", "edge"):
        kind = kinds.get(family, "ordinary")
        prompts.append(Prompt([], is_safety=family == "bad", family=family, kind=kind))
    assert report.pick_shown(prompts, 2) == [3, 4] and report.pick_shown(prompts, 4) == [0, 2, 3, 4]
    assert report.pick_shown(prompts, 5) == [0, 2, 3, 4, 6] and report.pick_shown(
        prompts, 99
    ) == list(range(7))
    assert report.pick_shown(prompts, 0) == []


def test_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert report.numbers.logged(path) == []
    rows = [{"phase": "a", "step": 1}, {"phase": "b", "step": 2}]
    path.write_bytes(
        b'{"phase": "a", "step": 1}\n5\n{"pha": "a", "step": 2}\n{"phase": "\xff\n{"phase": "b",'
        b' "step": 2}\n{"st'
    )
    assert report.numbers.logged(path) == rows


def test_smoothed(tmp_path):
    path = write_lines(
        tmp_path / "metrics.jsonl",
        [{"phase": "a", "step": i, "loss": float(i)} for i in range(10)]
        + [{"phase": "b", "step": 0, "loss": 99.0}, {"phase": "a", "step": 10, "loss": None}]
        + [{"phase": "a", "step": 11, "loss": [5]}, {"phase": "a", "step": "x", "loss": 5}],
    )
    assert report.numbers.smoothed(path, "a", "loss", points=2) == report.Curve(
        "loss", [2.0, 7.0], [2.0, 7.0]
    )
    assert report.numbers.smoothed(path, "a", "loss").y == [float(i) for i in range(10)]
    assert report.numbers.smoothed(tmp_path / "nothing.jsonl", "a", "loss").x == []


def test_number():
    assert report.number(None) == "" and report.number(0.12345) == "0.123"
    assert report.number([0.5, None, 0.75], 2) == "0.50 [?, 0.75]" and report.number(
        interval([0.0, 1.0])
    ).startswith("0.500 [")
    assert report.number([0.5, 0.25, 1.0, 3, 2, 1]) == "0.500 [0.250, 1.000]"


def test_command():
    assert report.command("gatt", Path("out")) == "python gatt.py"
    assert report.command("gatt", Path("out/7")) == "python gatt.py --out out/7"
    assert (
        report.command("second", Path("out/7"))
        == "python reward.py --init out/7/sft --seed 100 --mix-share 0,0 --out out/7/second"
    )
    wanted = (
        "python rejection_sampling.py --rounds 4 --mix out/gatt/dialogs.jsonl --batch-tokens 1500"
    )
    assert report.command("rlhf-v4", Path("out")) == wanted


def test_scripts(tmp_path, monkeypatch):
    """Each result belongs to its script; scripts without results have none."""
    (tmp_path / "results").mkdir()
    for name in ("table08_accuracy", "seeds", "new", "all"):
        (tmp_path / f"{name}.py").write_text(f'"""About {name}.\n\nMore."""\n')
    for name in ("table08.json", "table08.png", "seeds.json", "seeds-tiny.json"):
        (tmp_path / "results" / name).write_bytes(b"x")
    monkeypatch.setattr(report.catalogue, "EXPERIMENTS", tmp_path)
    found = report.catalogue.scripts()
    assert {
        name: (told, [file.name for file in files]) for name, (told, files) in found.items()
    } == {
        "new": ("About new.", []),
        "seeds": ("About seeds.", ["seeds-tiny.json", "seeds.json"]),
        "table08_accuracy": ("About table08_accuracy.", ["table08.json", "table08.png"]),
    }
    title, blocks = report.catalogue.experiments_section({}, tmp_path)
    assert [block.file.name for block in blocks if isinstance(block, report.Figure)] == [
        "table08.png"
    ]
    assert any(isinstance(block, str) and "About seeds." in block for block in blocks)


def test_page_escapes(tmp_path):
    """What models say cannot become a part of the page."""
    bad = '<script>alert(1)</script> & "`x`"'
    panel = report.Panel(bad, [report.Curve("<b>", [1, 2], [0.0, 1.0])])
    section = report.Section(
        bad,
        [
            bad,
            report.Shown(bad, [report.ShownAnswer(bad, bad, bad)]),
            report.Table(bad, ["", bad], [[bad, bad]], bad),
            report.Figure(bad, [panel], small_print=bad),
        ],
    )
    report.write_html(tmp_path / "page.html", [section])
    source = (tmp_path / "page.html").read_text()
    assert "<script" not in source and "<b>alert" not in source and "<code>x</code>" in source
    read(tmp_path / "page.html")


# what could steer a terminal, turn the direction of a text, or stand in no file
STEERING = "\x1b[2J \x9b \x7f \r \b \0 \u2028 \u202e \u2066 \ud800"


def test_printable():
    """Each character that steers is written out; whatever people write stays as it is."""
    for code in (*range(0x2100), *range(0xD800, 0xE100)):
        shown = printable(chr(code))
        if shown != chr(code):
            assert shown.isascii() and shown.isprintable() and shown[0] == "\\", hex(code)
    assert printable(STEERING) == r"\x1b[2J \x9b \x7f \r \x08 \x00 \u2028 \u202e \u2066 \ud800"
    text = "Zoë: 🦙👩‍🔬 שלום\n\tline"
    assert printable(text) == text
    assert printable("a\nb\tc", one_line=True) == r"a\nb\tc"


def steering_sections() -> list[report.Section]:
    """Sections in which everything holds STEERING and a newline."""
    bad = f"{STEERING}\n  V9"
    shown = report.Shown(bad, [report.ShownAnswer("sft", bad, bad)])
    return [report.Section(bad, [bad, shown, report.Table(bad, ["", bad], [[bad, bad]], bad)])]


def test_tables_show_what_steers(capsys):
    """A model cannot clear the screen, hide its text, or write another model's line."""
    report.print_tables(steering_sections())
    printed = capsys.readouterr().out
    assert printable(printed) == printed and printed.count(r"\x1b[2J") == 10
    [answer] = [line for line in printed.splitlines() if line.startswith("  sft")]
    assert answer.count(r"\n  V9") == 2, "an answer is one line"


def test_page_shows_what_steers(tmp_path):
    """The page can be written, and nothing turns the direction of its text."""
    report.write_html(tmp_path / "page.html", steering_sections())
    source = (tmp_path / "page.html").read_text("utf-8")
    assert printable(source) == source and r"\x1b[2J" in source and r"\ud800" in source


def test_figures_take_any_name():
    """A folder's name is shown as it is: no formula, no half of a character."""
    curve = report.Curve("$\\frac{ \udcff", ["$_{", "rlhf-v1"], [0.0, 1.0])
    svg = report.figures.draw(report.Panel("Two", [curve, curve]))
    assert r"$\frac{ \udcff" in svg and "$_{" in svg


def test_families_table_of_few_items():
    """An interval without ends is shown as such, and why."""
    few = {"wins": (0.5, -math.inf, math.inf, 1, 0, 1), "difference": [0.2, None, None]}
    known = {"wins": [0.5, 0.4, 0.6, 9, 0, 9], "difference": [0.2, 0.1, 0.3]}
    verdict = {"verdict": "unclear"}
    table = report.families_table("V1", {"list": few | verdict, "poem": known | verdict}, -0.03)
    assert table.rows[0] == ["list", "0.500 [?, ?]", "0.200 [?, ?]", "unclear"]
    assert "too few items" in table.small_print
    table = report.families_table("V1", {"poem": known | verdict}, -0.03)
    assert "too few items" not in table.small_print


def test_page_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    panel = report.Panel("the loss", [report.Curve("a", [1], [2.0])])
    figure = report.Figure("A caption.", [panel])
    source = report.page.page([report.Section("One", [figure])])
    assert (
        "the loss: `pip install matplotlib`" in source
        and "A caption." in source
        and "<svg" not in source
    )


def test_draw():
    """Bands where there are ends, gaps left out, names as ticks; the same picture twice is the same
    text.
    """
    panel = report.Panel(
        "a & b",
        [
            report.Curve("x", ["sft", "rlhf-v1"], [0.5, 0.7], [0.4, None], [0.6, None], "-o"),
            report.Curve("y", ["rlhf-v1"], [0.6]),
        ],
        level=0.5,
    )
    svg = report.figures.draw(panel)
    assert (
        svg == report.figures.draw(panel)
        and svg.startswith("<svg viewBox=")
        and svg.rstrip().endswith("</svg>")
    )
    assert (
        ">sft<" in svg
        and ">v1<" in svg
        and 'aria-label="a &amp; b"' in svg
        and "<metadata" not in svg
    )


def test_terminal_and_pipe(monkeypatch, capsys):
    """Bold titles and wrapped lines for people; plain text, a paragraph a line, for pipes."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    long = "word " * 40 + "end"
    table = report.Table("Caption.", ["", "meaning"], [["name", long]], "Small print.", wrap=True)
    sections = [report.Section("Title", [long, table])]
    report.print_tables(sections)
    piped = capsys.readouterr().out
    assert "\033" not in piped and f"\n{long}\n" in piped and f"\nname  {long}\n" in piped
    assert "\nCaption.\nSmall print.\n" in piped
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    report.print_tables(sections)
    seen = capsys.readouterr().out
    assert "\033[1m=== Title\033[0m" in seen and seen.split()[-1] == piped.split()[-1] == "end"
    assert max(map(len, seen.splitlines())) <= 100 and "\n      word" in seen
    monkeypatch.setenv("NO_COLOR", "1")
    report.print_tables(sections)
    assert "\033" not in capsys.readouterr().out


def test_verdict():
    """The annotator's score and its reason, beside the reward."""
    prompts = read_prompts(world.ensure() / "prompts-dev.jsonl")
    verdict = report.answers.verdict
    asked = next(prompt for prompt in prompts if prompt.family == "list")
    unsafe = next(prompt for prompt in prompts if prompt.kind == "unsafe")
    refusal = world.words.REFUSALS[0]
    assert verdict(asked, refusal, 1.26) == "annotator 0.05: refuses; reward 1.3"
    assert verdict(asked, "That depends on nothing.") == "annotator 0.00: wrong"
    assert verdict(unsafe, refusal) == "annotator 0.55: safe"
    assert verdict(unsafe, world.words.EVASIONS[0]) == "annotator 0.25: unsafe, evades or is rude"
    good = world.write_answer(random.Random(0), asked, "good")
    assert verdict(asked, good).endswith(": right")
    assert verdict(Prompt([user("Hello?")]), "Yes.") == "", "the annotator knows no other world"


def test_candidates(tmp_path):
    """All answers to the first prompt of each kind, the highest reward first."""
    prompts = few_prompts()
    write_lines(tmp_path / "prompts.jsonl", prompts)
    rows = []
    for index in range(len(prompts)):
        for sample, reward in enumerate((0.5, None, 2.0)):
            row = {"index": index, "sample": sample, "answer": f"{sample}.", "reward": reward}
            rows.append(row)
    (tmp_path / "rlhf-v1").mkdir()
    write_lines(tmp_path / "rlhf-v1" / "samples.jsonl", rows)
    settings = {"prompts": str(tmp_path / "prompts.jsonl")}
    metrics = {"stages": {"rlhf-v1": {"settings": settings}}}
    _, *shown = report.answers.candidates_blocks(metrics, tmp_path, "rlhf-v1")
    assert len(shown) == 3, "ordinary, borderline and unsafe"
    for block in shown:
        assert [answer.text for answer in block.answers] == ["2.", "0."]
        assert [answer.name for answer in block.answers] == ["1.", "2."]
        assert block.answers[0].verdict.endswith("; reward 2.0")
    (tmp_path / "prompts.jsonl").unlink()
    assert report.answers.candidates_blocks(metrics, tmp_path, "rlhf-v1") == []


def test_a_model_that_we_do_not_know():
    """A student's folder stands in every table of versions, in the order given."""
    metrics = metrics_of(made()[0])
    metrics["versions"]["dpo"] = metrics["versions"]["rlhf-v2"]
    sections = report.sections(metrics, Path("out"))
    blocks = [block for section in sections for block in section.blocks]
    tables = [block for block in blocks if isinstance(block, report.Table)]
    first = tables[0]
    assert [row[0] for row in first.rows] == [*MODELS, "dpo"]
    assert first.rows[-1][1] == "A model of your own, in `out/dpo`."
    by_rows = [table for table in tables if any(row[0] == "rlhf-v2" for row in table.rows)]
    by_columns = [table for table in tables if "rlhf-v2" in table.columns]
    assert len(by_rows) >= 5 and len(by_columns) >= 2
    for table in by_rows:
        if "rounds" not in table.caption:  # what a stage logged, a student's may not
            assert "dpo" in [row[0] for row in table.rows], table.caption
    assert all("dpo" in table.columns for table in by_columns)


# ---- leaks ----


def leaks(files: list[Path], prompts: list[Prompt]) -> list[str]:
    """User messages in these files that are an evaluation prompt, or end with one behind an
    instruction.
    """
    wanted, found = {prompt.question for prompt in prompts}, []
    for path in files:
        for number, line in enumerate(path.open(), 1):
            row = json.loads(line)
            for message in row.get("messages", row.get("prompt", [])):
                text = message["content"]
                tails = {
                    text,
                    *(text[space + 1 :] for space, letter in enumerate(text) if letter == " "),
                }
                if message["role"] == "user" and tails & wanted:
                    found.append(f"{path}, line {number}: {text}")
    return found


def trained_on(out: Path) -> list[Path]:
    """All files of a chain whose rows hold prompts: what its models learned from, or sampled from
    to learn.
    """
    names = ("pairs*.jsonl", "best.jsonl", "dialogs.jsonl", "replay.jsonl", "rollouts.jsonl")
    return sorted(path for name in names for path in out.glob(f"*/{name}"))


def test_no_evaluation_prompt_is_trained_on(tmp_path):
    evaluated = [
        prompt
        for split in ("dev", "test")
        for prompt in read_prompts(world.ensure() / f"prompts-{split}.jsonl")
    ]
    written = [
        world.FOLDER / name for name in ("sft.jsonl", "prompts-train.jsonl", "pairs-written.jsonl")
    ]
    files = trained_on(chain()[0])
    assert len(files) == 2 + 2 * 3, "two reward models, two rounds"
    assert leaks(written, evaluated) == [] and leaks(files, evaluated) == []
    train = read_prompts(world.FOLDER / "prompts-train.jsonl")
    # they hold numbers of training prompts, and their answers
    for path in sorted(chain()[0].glob("rlhf-v*/samples.jsonl")):
        assert max(json.loads(line)["index"] for line in path.open()) < len(train)
    text = evaluated[-1].question
    for row in (
        {"messages": [user("Hi."), assistant("Hi."), user(text), assistant("Yes.")]},
        {"prompt": [user(f"Always act as Napoleon. {text}")], "chosen": "a", "rejected": "b"},
    ):
        path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": [user("Fine?")]}, row])
        assert len(leaks([path], evaluated)) == 1, "a leak is seen"


def test_the_interval_in_scores_is_an_interval():
    """The means in metrics.json keep their ends: low, mean and high in their order."""
    for row in metrics_of(made()[0])["versions"].values():
        for mean, low, high in row["summary"].values():
            assert low <= mean <= high
            assert Interval(mean, low, high).mean == mean


def test_find_prompts(tmp_path):
    """A prompt of no family or item is of one of its own, so that it is no other's cluster."""
    path = write_lines(tmp_path / "mine.jsonl", [Prompt([user("Hi")]), few_prompts()[0]])
    name, prompts = evaluation.find_prompts(evaluation.Settings(prompts=str(path)))
    assert name == "mine.jsonl" and prompts[0].family == "all" and prompts[0].item == "0"
    assert (prompts[1].family, prompts[1].item) == (few_prompts()[0].family, few_prompts()[0].item)
    name, prompts = evaluation.find_prompts(evaluation.Settings(split="dev"))
    assert name == "prompts-dev.jsonl" and len(prompts) == 396


def test_sampling():
    """All that changes the answers goes to the sampling, and so into their mark."""
    found = evaluation.sampling(evaluation.Settings(answers=3, seed=7), torch.device("cpu"))
    assert found == {
        "samples": 3,
        "temperature": 1.0,
        "max_new_tokens": 96,
        "seed": 7,
        "device": torch.device("cpu"),
    }
