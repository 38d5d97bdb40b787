"""What the experiments share does what the stages do."""

import ast
import json
import math
import random
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch

import experiments
import play
import report
import runtime
from data import Answer, InputError, Pair, Prompt, read_prompts, read_sft, world
from data.annotators import check_annotator
from eval import PROBED, Interval, interval
from experiments import __main__ as index_page
from experiments import all as everything
from experiments import (
    constrained_prompts,
    figure07_best_of_n,
    figure10_attention,
    figure11_ppo,
    figure29_calibration,
    forgetting,
    longer_sft,
    overoptimisation,
    ppo_microscope,
    publish,
    reward_heads,
    reward_sees_content,
    rivals,
    seeds,
    table29_safety_loss,
    table30_gatt,
)
from experiments.constrained_prompts import constrained_dialog, ghost_prompts, write_prompts
from experiments.forgetting import families_over_seeds
from experiments.longer_sft import asked, is_blend
from experiments.shared import over_seeds, processes, results, reward_models
from experiments.shared import settings as settings_of_all
from experiments.shared.index import EXPERIMENTS, Experiment
from experiments.table29_safety_loss import safety_bin
from gatt import instruct, obeys_exactly
from reward import AXES, load_reward_model
from tests.helpers import chain, write_lines

WITH_SETTINGS = {experiment.module: experiment.load() for experiment in EXPERIMENTS}
WITH_SETTINGS["all"] = everything


@pytest.mark.parametrize("module", WITH_SETTINGS)
def test_settings_out_of_range(module):
    """Every number of every experiment has a range; lists that are needed are not empty."""
    Settings = WITH_SETTINGS[module].Settings
    for field in fields(Settings()):
        default = getattr(Settings(), field.name)
        several = isinstance(default, tuple)
        first = default[0] if several else default
        wrong = []
        if type(first) in (int, float) and field.name != "threads":  # `set_threads` looks at these
            wrong = [-1, 10**20]
        if field.name in settings_of_all.TEMPERATURES:
            wrong.append(1e-9)
        if several:
            wrong = [(first, value) for value in wrong]
            if field.name != "controls":
                wrong.append(())
        for value in wrong:
            with pytest.raises(InputError, match=f"--{field.name.replace('_', '-')} "):
                Settings(**{field.name: value})


WORDS = {  # module: values of settings that are words
    "figure06_scaling": {"sizes": [("32",), ("x",), ("0x2",), ("32x2x2",)]},
    "figure10_attention": {"models": ["", "gatt", "gatt,", "gatt,gatt", "a,b,c"]},
    "ppo_microscope": {"name": [""], "prompt": ["", " "]},
    "reward_sees_content": {"arms": [(5,)]},
}


def test_settings_that_are_no_words(tmp_path):
    for module, wrong in WORDS.items():
        for name, values in wrong.items():
            for value in values:
                with pytest.raises(InputError, match=name):
                    WITH_SETTINGS[module].Settings(**{name: value})
    for module, experiment in WITH_SETTINGS.items():
        if hasattr(experiment.Settings(), "split"):
            with pytest.raises(SystemExit) as end:
                runtime.parse_settings(experiment.Settings, "", argv=["--split", "al"])
            assert end.value.code == 2, module


ROOT = Path(__file__).parent.parent
FOLDERS = ("play", "report", "experiments")


def sources() -> dict[Path, ast.Module]:
    """The files of these folders that belong to commands; those of `experiments/speed` do not."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return {
        file: ast.parse(file.read_text("utf-8")) for file in files if file.parent.name != "speed"
    }


def test_all_commands_are_run_alike():
    """`runtime.run` is the net: a closed pipe, Ctrl-C, and letters that the terminal lacks."""
    count = 0
    for file, tree in sources().items():
        if file.name == "__main__.py" or file.parent.name == "experiments":
            blocks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.If)]
            if file.name != "__init__.py":
                assert "if __name__ == '__main__':\n    run(main)" in blocks, file
                count += 1
    assert count > 25


@pytest.mark.parametrize("package", [play, experiments])
def test_quiet_interrupt(package, capsys):
    """Ctrl-C while torch is imported; what is no Ctrl-C has its traceback."""
    package.quiet_interrupt(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == ""
    package.quiet_interrupt(ValueError, ValueError("odd"), None)
    assert "ValueError: odd" in capsys.readouterr().err


def test_files_are_utf_8():
    """On Windows a file without a named encoding is read and written in another one."""
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in ("read_text", "write_text", "open"):
                    assert "utf-8" in ast.unparse(node), f"{file}, line {node.lineno}"


@dataclass
class Marked:
    seeds: tuple[int, ...] = (1, 2, 3)
    out: Path = Path("out")
    samples: int = 4


def test_load_refuses_to_mix(tmp_path, monkeypatch):
    """Numbers of another world, of other settings, of another results version, or of none are not
    mixed with new ones.
    """

    def load(settings: Marked) -> dict:
        return results.load(tmp_path / "x.json", results.mark_of(settings))

    results.save(tmp_path / "x.json", {"1": 0.5}, results.mark_of(Marked()))
    assert load(Marked(out=Path("elsewhere"), seeds=(9,))) == {"1": 0.5}
    with pytest.raises(
        InputError,
        match=r"x.json: its settings is .*'samples': 4.*, now it is .*'samples': 8.*delete x.json",
    ):
        load(Marked(samples=8))
    with monkeypatch.context() as patch:
        patch.setattr(results, "RESULTS_VERSION", 2)
        with pytest.raises(InputError, match="its version is 1, now it is 2"):
            load(Marked())
    with monkeypatch.context() as patch:
        patch.setattr(world.annotator, "NOISE", 0.1)
        with pytest.raises(InputError, match="its world is"):
            load(Marked())
    (tmp_path / "old.json").write_text('{"mark": {}, "res')
    with pytest.raises(InputError, match="old.json: not JSON; delete old.json"):
        results.load(tmp_path / "old.json", {})
    for old in ('{"1": 0.5}', "[0.5]"):
        (tmp_path / "old.json").write_text(old)
        message = "old.json: a result without its mark; delete old.json"
        with pytest.raises(InputError, match=message):
            results.load(tmp_path / "old.json", results.mark_of(Marked()))


def test_published_results_are_marked():
    """Every JSON of the experiments has the mark that its experiment's defaults would give now, and
    the seeds of these defaults.
    """
    files = {path.stem: path for path in results.RESULTS.glob("*.json")}
    files.pop("speed", None)  # of one machine, not of seeds
    assert set(files) == {experiment.result for experiment in EXPERIMENTS}
    for experiment in EXPERIMENTS:
        content = json.loads(files[experiment.result].read_text())
        settings = experiment.load().Settings()
        assert set(content) == {"mark", "result"}, experiment
        assert content["mark"] == results.mark_of(settings), experiment
        if hasattr(settings, "seeds"):
            text = json.dumps(content["result"])
            assert all(f'"{seed}": ' in text for seed in settings.seeds), experiment


def test_over_seeds_corrected():
    """Means of seeds, Student's t over seeds; several looks at once widen the intervals;
    differences are paired.
    """
    first = [{"a": (0.5, 0.4, 0.6)}, {"a": (0.7, 0.6, 0.8)}, {"a": (0.9, 0.8, 1.0)}]
    second = [{"a": (0.4, 0.3, 0.5)}, {"a": (0.6, 0.5, 0.7)}, {"a": (0.7, 0.6, 0.8)}]
    assert over_seeds.over_seeds(first)["a"] == interval([0.5, 0.7, 0.9])
    assert over_seeds.over_seeds(first, 10)["a"] == interval([0.5, 0.7, 0.9], comparisons=10)
    found = over_seeds.differences_over_seeds(first, second, 4)["a"]
    assert found == interval([0.5 - 0.4, 0.7 - 0.6, 0.9 - 0.7], comparisons=4)


def test_families_over_seeds():
    """Never pooled by item: the interval is over the seeds' means, corrected for the number of
    families.
    """

    def seed(list_gap: float, poem_gap: float) -> dict:
        narrow = {"list": list_gap, "poem": poem_gap}
        return {
            name: [[0.5 + gap, 0, 1, 9, 9, 9], [gap, gap - 0.001, gap + 0.001], "better"]
            for name, gap in narrow.items()
        }

    table = families_over_seeds([seed(0.3, 0.1), seed(0.1, 0.1), seed(-0.1, 0.1)])
    assert table["list"]["difference"] == interval([0.3, 0.1, -0.1], comparisons=2)
    assert table["list"]["wins"] == interval([0.8, 0.6, 0.4], comparisons=2)
    assert table["list"]["verdict"] == "unclear" and table["poem"]["verdict"] == "better"


def published(name: str) -> dict:
    return results.published(name)


def test_claims_table():
    """One number per seed; all rows that are read side by side are corrected for their number."""
    rows = {"a": [0.5, 0.6, 0.7], "b": [0.1, 0.1, 0.2]}
    found = over_seeds.claimed(rows)
    assert found == {name: interval(values, comparisons=2) for name, values in rows.items()}
    table = over_seeds.claims_table("title", rows)
    assert table.rows[0] == ["a", str(found["a"]), "0.500 0.600 0.700"]
    assert "all 2 rows hold together" in table.small_print


def test_published_forgetting_over_seeds():
    """The published summary follows from the published seeds."""
    result = published("forgetting")
    for title, table in result["over seeds"].items():
        expected = families_over_seeds([result[seed]["families"][title] for seed in "123"])
        for family, row in table.items():
            for key in ("wins", "difference"):
                assert row[key] == pytest.approx(list(expected[family][key]), abs=2e-3)
            assert row["verdict"] == expected[family]["verdict"]


CLAIMS = {  # file: (what it claims, how many rows, one row, that row of one seed's entry)
    "figure11_ppo": (
        figure11_ppo.claims,
        18,
        "V4-PPO against V4, helpfulness",
        lambda one: one["wins"]["V4-PPO against V4"]["helpfulness"][0],
    ),
    "rivals": (
        rivals.claims,
        8,
        "SFT on favourites, safety",
        lambda one: one["rivals"]["SFT on favourites"]["V4 wins"]["safety"][0],
    ),
    "reward_heads": (
        reward_heads.claims,
        10,
        "rlhf-v4, logprobs against the default, helpfulness",
        lambda one: one["rlhf-v4"]["win"]["helpfulness"][0],
    ),
    "constrained_prompts": (
        constrained_prompts.claims,
        12,
        "V5 constrained over V5 last, helpfulness",
        lambda one: one["V5 constrained"]["against default"]["helpfulness"][0],
    ),
    "longer_sft": (
        longer_sft.claims,
        24,
        "V3, cool, helpfulness",
        lambda one: one["two passes"]["cool"]["V3"]["against default"]["helpfulness"][0],
    ),
    "seeds": (
        lambda result, names: seeds.claims(result, names)["Win rates over SFT"],
        8,
        "rlhf-v4, safety",
        lambda one: one["versions"]["rlhf-v4"]["wins"]["safety"][0],
    ),
    "reward_sees_content": (
        lambda result, names: reward_sees_content.claims([result[name] for name in names]),
        6,
        "reads log-probabilities (not the paper's), best of 16",
        lambda one: (
            one["reads log-probabilities (not the paper's)"]["best of 16"][0]
            - one["the default"]["best of 16"][0]
        ),
    ),
    "table30": (
        table30_gatt.claims,
        12,
        "rlhf-v5 - rlhf-v4-ppo, styles",
        lambda one: (one["rlhf-v5"]["styles"]["mean"][0] - one["rlhf-v4-ppo"]["styles"]["mean"][0]),
    ),
}


@pytest.mark.parametrize("file", CLAIMS)
def test_claims(file):
    """One number for each published seed, never one for each item; all that are read together."""
    claims, count, name, of_seed = CLAIMS[file]
    result = published(file)
    found = claims(result, list(result))
    assert len(found) == count
    assert found[name] == [of_seed(one) for one in result.values()]


def test_claims_of_curves():
    """Differences are paired by seed: by hand, two seeds."""

    def one(value: float) -> list[float]:
        return [value, -9, 9]

    first, second = [[one(v) for v in curve] for curve in ((0.5, 0.6, 0.9), (0.4, 0.7, 0.7))]
    both = {"1": {"first": {"annotator": first}}, "2": {"first": {"annotator": second}}}
    found = overoptimisation.claims(both, [1, 2, 4])
    assert found == {"picked by first, N = 1 to 4": pytest.approx([0.4, 0.3])}
    tables = {
        "1": {"sft": {"pick": first}, "newest": {"pick": second}},
        "2": {"sft": {"pick": second}, "newest": {"pick": second}},
    }
    found = figure07_best_of_n.claims(tables, [1, 2, 4])
    assert list(found) == ["sft, N = 2", "sft, N = 4", "newest, N = 2", "newest, N = 4"]
    assert found["sft, N = 4"] == pytest.approx([0.4, 0.3])
    found = figure10_attention.claims({"1": first, "2": second}, {"1": second, "2": second}, 3)
    assert found == {"turn 1": pytest.approx([-0.1, 0]), "turn 2": pytest.approx([0.1, 0])}


def test_bins_over_seeds():
    """Each seed counts alike, however many answers it has; a bin that a seed lacks is left out."""
    one = [[0.1, 0.0, 0.2, 1], [0.6, 0.4, 0.1, 5]]
    other = [[0.3, 1.0, 0.4, 3]]
    [(quality, scores, spread, count)] = figure29_calibration.bins_over_seeds([one, other], 2)
    assert scores == [0.0, 1.0] and count == 4
    assert [quality, spread] == pytest.approx([0.2, 0.3])


def test_safety_loss_over_seeds():
    """Both tables are read side by side; a picture's shares are means of the seeds' own."""

    def seed(value: float) -> dict:
        table = {"accuracy": {"average": [value, 0, 1]}, "shares": {"recall": [2 * value, 0, 1]}}
        zero = {kind: {name: [0.1, 0, 1] for name in row} for kind, row in table.items()}
        return dict(zip(table29_safety_loss.WEIGHTS, (zero, table), strict=True))

    found = table29_safety_loss.changes([seed(0.2), seed(0.3), seed(0.5)])
    gains = [0.2 - 0.1, 0.3 - 0.1, 0.5 - 0.1]
    assert found["accuracy"]["average"] == interval(gains, comparisons=2)
    assert table29_safety_loss.mean_shares([[1, 0], [1, 3]]) == [62.5, 37.5]


def test_save(tmp_path):
    """Floats of four digits, infinity as null; the mark does not say where models lie."""
    file = tmp_path / "results" / "x.json"
    mark = results.mark_of(Marked(seeds=(7,)))
    assert results.load(file, mark) is None
    results.save(file, {1: Interval(0.123456, -math.inf, math.inf), "n": 3}, mark)
    content = json.loads(file.read_text())
    assert content["result"] == {"1": [0.1235, None, None], "n": 3}
    assert content["mark"]["settings"] == {
        "samples": 4
    }, "where models lie and which seeds are run changes no number"
    assert results.load(file, results.mark_of(Marked()))["1"][0] == 0.1235


@dataclass
class Parted(Marked):
    arms: tuple[int, ...] = (0, 1)


def test_measure_seeds(tmp_path):
    """A seed is measured once and kept; what a kill left out is measured by the next run. Other
    arms are another measurement.
    """
    settings = Parted(seeds=(1, 2), out=tmp_path)
    measured = []

    def measure(seed: int) -> dict:
        if seed == 2 and measured == [1]:
            raise KeyboardInterrupt
        measured.append(seed)
        return {"value": seed / 3}

    with pytest.raises(KeyboardInterrupt):
        results.measure_seeds("x", settings, measure)
    assert results.missing_seeds("x", settings) == [2]
    measured.append("again")
    found = results.measure_seeds("x", settings, measure)
    assert found == {"1": {"value": 0.3333}, "2": {"value": 0.6667}}
    assert measured == [1, "again", 2]
    assert results.missing_seeds("x", replace(settings, seeds=(1, 2, 3))) == [3]
    with pytest.raises(InputError, match="its settings is"):
        results.missing_seeds("x", replace(settings, arms=(0,)))


def test_finish(tmp_path, monkeypatch, capsys):
    """The defaults refresh what is published; other seeds or settings stay with their models."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "published")
    drawn = []

    def section(result: dict) -> report.Section:
        return report.Section("Why?", [f"Because of {result['value']}."])

    def finish(settings: Parted) -> None:
        results.finish("x", {"value": 1 / 3}, settings, section, lambda _, file: drawn.append(file))

    for changes in ({"seeds": (1,)}, {"samples": 5}, {"arms": (0,)}):
        finish(Parted(out=tmp_path / "out", **changes))
        assert drawn.pop() == tmp_path / "out" / "results" / "x.png"
    assert not results.RESULTS.exists()
    finish(Parted(out=tmp_path / "out"))
    assert drawn == [results.RESULTS / "x.png"] and (results.RESULTS / "x.json").exists()
    assert "Because of 0.3333." in capsys.readouterr().out


def test_side_by_side(tmp_path):
    """Each list goes on after its own commands only; what failed is named once all others are done.
    """

    def write(name: str) -> list[str]:
        return ["-c", f"open({str(tmp_path / name)!r}, 'a').write('done')"]

    fails = ["-c", "import sys; print('why it failed'); sys.exit(1)"]
    jobs = {"good": [write("a"), write("b")], "bad": [fails, write("c")], "nothing": []}
    with pytest.raises(SystemExit, match="failed: bad: -c .*see .*bad.log"):
        processes.side_by_side(jobs, tmp_path / "logs", 2)
    assert (tmp_path / "b").exists() and not (tmp_path / "c").exists()
    assert "why it failed" in (tmp_path / "logs" / "bad.log").read_text()
    processes.side_by_side({"nothing": []}, tmp_path / "logs", 2)


# ---- what is published ----


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.module)
def test_sections(experiment):
    """The answer comes first, in a sentence; its numbers are those of the result."""
    module = experiment.load()
    section = module.section(published(experiment.result))
    answer = section.blocks[0]
    assert isinstance(answer, str) and answer.endswith(".") and any(map(str.isdigit, answer))
    for block in section.blocks:
        if isinstance(block, report.Figure):
            assert block.file.exists()
        if isinstance(block, report.Table):
            assert {len(row) for row in block.rows} == {len(block.columns)}, block.caption
    # a result that is another one gives other sentences
    other = json.loads(
        json.dumps(published(experiment.result)), parse_float=lambda number: 0.9 * float(number)
    )
    changed = module.section(other)
    assert repr(changed.blocks) != repr(section.blocks)
    if experiment.module != "forgetting":  # its answer counts verdicts
        assert changed.blocks[0] != answer


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.module)
def test_sections_of_one_seed(experiment):
    """Seeds are run one by one: a section of a single seed can be made."""
    result = published(experiment.result)
    if experiment.module == "forgetting":
        result = json.loads(json.dumps(forgetting.assemble({"1": result["1"]})))
    elif experiment.module == "figure10_attention":
        result |= {name: {"1": result[name]["1"]} for name in result["models"]}
    elif "seeds" in result:
        result = result | {"seeds": {"1": result["seeds"]["1"]}}
    elif "1" in result:
        result = {"1": result["1"]}
    assert experiment.load().section(result).blocks


def test_results_page():
    """docs/results.md is what `python -m experiments.publish` would write."""
    told = "run `python -m experiments.publish`"
    assert publish.DOCS.read_text("utf-8") == publish.page(), told


def test_page_order():
    """What RLHF does comes first, then the paper's order; each section opens with its answer."""
    page = publish.page()
    assert page.index("## In short") < page.index("## Supervised fine-tuning")
    places = []
    for experiment in EXPERIMENTS:
        section = experiment.load().section(published(experiment.result))
        opening = f"### {publish._text(section.title)}\n\n{publish._text(section.blocks[0])}\n"
        places.append(page.index(opening))
    assert places == sorted(places) and len(set(places)) == len(EXPERIMENTS)


def test_as_markdown():
    """Cells cannot break their table, nor text become HTML; code stays as it is."""
    table = report.Table("A < b", ["", "x|y"], [["`a|<b>`", "</s>"]], "small")
    figure = report.Figure("What to see", file=Path("any/where.png"))
    text = publish.as_markdown(report.Section("Why?", ["Because.", table, figure]), level=3)
    assert text.split("\n") == [
        "### Why?",
        "",
        "Because.",
        "",
        "A &lt; b",
        "",
        r"|  | x\|y |",
        "|---|---|",
        r"| `a\|<b>` | &lt;/s&gt; |",
        "",
        "small",
        "",
        "![What to see](../experiments/results/where.png)",
        "",
    ]
    with pytest.raises(TypeError):
        publish.as_markdown(report.Section("", [report.Shown("", [])]), level=3)


def test_index(capsys):
    """Each experiment with its question, its command and its answer."""
    index_page.main()
    printed = capsys.readouterr().out
    for experiment in EXPERIMENTS:
        answer = experiment.load().section(published(experiment.result)).blocks[0]
        assert f"{experiment.question}\n    {experiment.command}" in printed
        assert f"\n    {answer}\n" in printed
    assert "15 minutes a seed" in printed


def test_all_modules_are_in_the_index():
    """An experiment that is not in the index would not be published."""
    modules = set()
    for path in Path(publish.__file__).parent.glob("*.py"):
        if "\ndef section(" in path.read_text("utf-8"):
            modules.add(path.stem)
    assert modules == {experiment.module for experiment in EXPERIMENTS}
    needed = {experiment.needs for experiment in EXPERIMENTS} - {""}
    assert needed <= {experiment.module for experiment in EXPERIMENTS if not experiment.needs}


def test_commands_without_path_tricks():
    """`python -m experiments.NAME`: no module touches sys.path, no text says otherwise."""
    for path in Path(publish.__file__).parent.rglob("*.py"):
        text = path.read_text("utf-8")
        assert "sys.path" not in text and "python experiments/" not in text, path


# ---- everything ----


class Fake:
    """An experiment that measures nothing."""

    @dataclass
    class Settings:
        seeds: tuple[int, ...] = (1, 2)
        out: Path = Path("out")


def fake_experiments(tmp_path, monkeypatch) -> list[Experiment]:
    """Three, listed in the paper's order: two measure the models of the third."""
    monkeypatch.setattr(Fake.Settings.__init__, "__defaults__", ((1, 2), tmp_path))
    monkeypatch.setattr(Experiment, "load", lambda self: Fake)
    fakes = [
        Experiment("early", "early", needs="base"),
        Experiment("base", "base"),
        Experiment("late", "late", needs="base"),
    ]
    monkeypatch.setattr(everything, "EXPERIMENTS", fakes)
    return fakes


def test_all(tmp_path, monkeypatch, capsys):
    """Pieces side by side, first what the others need; what is there is not made again; then each
    experiment is put together, and the page is written.
    """
    fake_experiments(tmp_path, monkeypatch)
    phases = []

    def side_by_side(jobs: dict, logs: Path, at_once: int) -> None:
        phases.append([" ".join(command) for [command] in jobs.values()])
        assert at_once == 3
        for name in jobs:
            result, _, seed = name.partition("-")
            if seed:
                results.save_seed(result, int(seed), {}, Fake.Settings())

    monkeypatch.setattr(everything, "side_by_side", side_by_side)
    monkeypatch.setattr(publish, "main", lambda: phases.append("page"))
    results.save_seed("early", 2, {}, Fake.Settings())
    everything.main(["--list"])
    printed = capsys.readouterr().out
    assert not phases and "5 of 6 are missing" in printed
    assert "python -m experiments.early --seeds 1" in printed

    everything.main(["--at-once", "3"])
    assert phases[0] == [f"-m experiments.base --seeds {seed}" for seed in (1, 2)]
    assert phases[1] == [
        "-m experiments.early --seeds 1",
        "-m experiments.late --seeds 1",
        "-m experiments.late --seeds 2",
    ]
    assert phases[2] == [f"-m experiments.{name}" for name in ("early", "base", "late")]
    assert phases[3] == "page"
    phases.clear()
    everything.main(["--at-once", "3"])
    assert phases[:2] == [[], []]


def test_all_refuses_to_mix(tmp_path, monkeypatch):
    """A seed that was made with another version is not passed off as this one's."""
    fake_experiments(tmp_path, monkeypatch)
    results.save_seed("base", 1, {}, Fake.Settings())
    monkeypatch.setattr(results, "RESULTS_VERSION", 2)
    with pytest.raises(InputError, match="base-1.json: its version is 1, now it is 2"):
        everything.main(["--list"])


def test_microscope_writes_only_when_told(tmp_path, monkeypatch, capsys):
    """Looking at an answer changes nothing that is published."""
    result = published("ppo_microscope")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "published")
    monkeypatch.setattr(ppo_microscope, "load_players", lambda *args: None)
    monkeypatch.setattr(ppo_microscope, "measure", lambda *args: result)
    monkeypatch.setattr(ppo_microscope, "draw", lambda result, file: None)
    out = ["--out", str(tmp_path / "out")]
    ppo_microscope.main(out)
    assert not list(tmp_path.iterdir()) and "advantage" in capsys.readouterr().out
    ppo_microscope.main([*out, "--publish"])
    assert (tmp_path / "published" / "ppo_microscope.json").exists()


# ---- statistics, models, prompts ----


def test_over_seeds():
    """The interval is over seeds: those of the single tables do not matter."""
    tables = [
        {"better": (0.7, 0.1, 0.9)},
        {"better": [0.8, None, None]},
        {"better": interval([0.9])},
    ]
    assert over_seeds.over_seeds(tables)["better"] == interval([0.7, 0.8, 0.9])


def test_percent_table():
    table = over_seeds.percent_table(
        "title",
        {"a": {"better": Interval(0.804, 0.79, 0.818)}, "b": {"average": Interval(0.5, 0.4, 0.6)}},
    )
    assert table.caption == "title" and table.columns == ["", "better", "average"]
    assert table.rows == [["a", "80.4 ± 1.4", ""], ["b", "", "50.0 ± 10.0"]]


def as_answer(index: int, text: str, ids: list[int] | None = None) -> Answer:
    """An answer as if it had been sampled."""
    return Answer(index, 0, text, ids or [], 0.0, 1.0, "eos", False)


def linked_chain(tmp_path):
    """A root whose seed 0 is the tiny chain, copied as links so that nothing is written into it."""
    out, _ = chain()
    (tmp_path / "0").mkdir()
    for name in ("sft", "reward-helpfulness", "reward-safety"):
        (tmp_path / "0" / name).symlink_to(out / name)
    return tmp_path


@pytest.mark.parametrize("axis", AXES)
def test_train_equals_the_stage(axis, tmp_path):
    """Bit for bit the model that `reward.py` made of the same pairs; a setting that is changed
    changes it.
    """
    root = linked_chain(tmp_path)
    rows = reward_models.training_pairs(root, 0, axis)
    model, _ = reward_models.train(root, 0, axis, rows)
    saved, _ = load_reward_model(root / "0" / f"reward-{axis}")
    for (name, one), other in zip(
        model.state_dict().items(), saved.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    other, _ = reward_models.train(root, 0, axis, rows, margin="large")
    assert not torch.equal(model.head.weight, other.head.weight)


def test_fresh_pairs(tmp_path, monkeypatch):
    """Sampled once, from prompts of the split alone; a pass adds pairs and keeps the earlier ones.
    """
    root = linked_chain(tmp_path)
    monkeypatch.setattr(
        reward_models, "pick_prompts", lambda prompts, axis, count, seed: prompts[:12]
    )
    first = reward_models.fresh_pairs(root, 0, "safety", 1, "dev")
    monkeypatch.setattr(reward_models, "load_model", lambda folder: pytest.fail("sampled again"))
    assert reward_models.fresh_pairs(root, 0, "safety", 1, "dev") == first and first
    monkeypatch.undo()
    monkeypatch.setattr(
        reward_models, "pick_prompts", lambda prompts, axis, count, seed: prompts[:12]
    )
    both = reward_models.fresh_pairs(root, 0, "safety", 2, "dev")
    more = both[len(first) :]
    assert both[: len(first)] == first
    assert [pair.chosen for pair in more] != [pair.chosen for pair in first]
    dev = (world.FOLDER / "prompts-dev.jsonl").read_text()
    assert all(json.dumps(pair.prompt.question) in dev for pair in both)


def test_safety_measures():
    """Shares by hand: recall over the unsafe answers of safety pairs, the gate over good answers of
    helpfulness pairs.
    """
    prompt = Prompt(
        [{"role": "user", "content": "What is the capital of France?"}],
        family="capital",
        item="France",
        kind="ordinary",
    )
    safety = [Pair(prompt, "", "", chosen_is_safe=True, rejected_is_safe=False) for _ in range(4)]
    good = world.fill(
        world.FAMILIES["capital"].full, {"q": "France", "a": world.words.CAPITALS["France"]}
    )
    helpful = [Pair(prompt, good, "Nothing.") for _ in range(2)]
    scores = {
        "safety": ([3.0, 3.0, 3.0, -1.0], [-1.0, -2.0, 1.0, -3.0]),
        "helpfulness": ([-3.0, 2.0], [-9.0, -9.0]),
    }
    found = reward_models.safety_measures(scores, {"safety": safety, "helpfulness": helpful})
    assert {name: one.mean for name, one in found.items()} == {
        "recall at .5": 0.75,
        "recall at .15": 0.5,
        "safe under .5": 0.25,
        "good under gate": 0.5,
    }


def test_right_first():
    """The right one of two written answers is the chosen one, even where the annotator erred."""
    prompt = Prompt([{"role": "user", "content": "?"}])
    for chosen, rejected in (("right", "wrong"), ("wrong", "right")):
        pair = reward_sees_content.right_first(Pair(prompt, chosen, rejected, right="right"))
        assert (pair.chosen, pair.rejected) == ("right", "wrong")


def test_constrained_dialog():
    """Markers stand in every earlier answer, names and hobbies in nearly all; the last question is
    open and can be judged.
    """
    held = []
    for i in range(300):
        rng = random.Random(i)
        dialog = constrained_dialog(rng, turns := 1 + i % 6)
        prompt, answers = dialog.prompt, dialog.messages[1::2]
        assert len(answers) == turns - 1
        assert {m["role"] for m in dialog.messages[::2]} == {"user"}
        assert dialog.messages[-1] == prompt.messages[0]
        assert dialog.is_safety == prompt.is_safety
        for found in dialog.constraints:
            assert found["long"] in dialog.instruction or found["short"] in dialog.instruction
            if found["kind"] not in PROBED:
                assert all(world.obeys(prompt, m["content"], found) for m in answers)
            elif prompt.family == PROBED[found["kind"]]:
                assert prompt.item == found["value"]
            if found["kind"] in PROBED:
                wordings = tuple(world.FAMILIES[PROBED[found["kind"]]].wordings)
                held += [
                    world.obeys(prompt, m["content"], found)
                    for question, m in zip(dialog.messages[:-1:2], answers, strict=True)
                    if question["content"].endswith(wordings)
                ]
        right = world.obey(world.write_answer(rng, prompt, "good"), dialog.constraints)
        assert world.read(prompt, right).junk == 0, "the annotator passes over markers"
    assert len(held) > 50 and sum(held) / len(held) > 0.96, "but for a few refusals"


def test_asked(tmp_path, monkeypatch):
    """All constraints must hold; a blend counts wherever it stands; a name is asked for, since else
    it would not show.
    """
    first, last, name = (
        world.constraint(kind, word)
        for kind, word in (("first word", "Kudu"), ("last word", "Denu"), ("figure", "Pomi"))
    )
    drawn = [[first, last]] * 4 + [[first, name]] * 2
    answers = [
        "Kudu! It is red. Denu.",
        "Kudu! It is red. Dedu.",
        "It is red. Denu.",
        "Kunu! It is red. Denu.",
        "Kudu! I am Pomi.",
        "Kudu! I am Kumi, no, Pomi.",
    ]
    seen = []

    def sample_answers(model, tokenizer, prompts, **options):
        seen.extend(prompts)
        return [as_answer(i, text) for i, text in enumerate(answers)]

    monkeypatch.setattr(longer_sft, "load_model", lambda folder: (None, None))
    monkeypatch.setattr(longer_sft, "sample_answers", sample_answers)
    found = asked(tmp_path, drawn, "test", 0)
    assert found == {"all": interval([1, 0, 0, 0, 1, 1]), "blend": interval([0, 1, 0, 1, 0, 1])}
    assert [prompt.family == PROBED["figure"] for prompt in seen] == [False] * 4 + [True] * 2
    assert all(
        c["value"] in prompt.messages[0]["content"]
        for prompt, both in zip(seen, drawn, strict=True)
        for c in both
    )
    assert (
        not is_blend("Kudu", ["Kudu"])
        and is_blend("Denu", ["Kunu", "Dedu"])
        and not is_blend("dedu", ["Kudu", "Denu"])
    )


def test_write_prompts(tmp_path):
    """One prompt of V5 in five and of PPO in twenty is constrained; V5's first 700 are those of the
    default rounds.
    """
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Kogo. {n}?"},
                {"role": "assistant", "content": "Yes."},
            ],
            "is_safety": False,
            "family": "spell",
            "item": "cat",
            "kind": "ordinary",
            "train_on": "last",
            "constraints": [world.constraint("first word", "Kogo")],
        }
        for n in range(1600)
    ]
    (tmp_path / "0" / "gatt").mkdir(parents=True)
    write_lines(tmp_path / "0" / "gatt" / "dialogs.jsonl", rows)
    write_prompts(tmp_path / "0", tmp_path / "made", 0)
    ordinary = [p.messages for p in read_prompts(world.ensure() / "prompts-train.jsonl")]
    ghosts = [p.messages for p in ghost_prompts(tmp_path / "0" / "gatt" / "dialogs.jsonl")]
    assert ghosts[3] == [{"role": "user", "content": "Kogo. 3?"}]
    for name, count in (("v5", 175), ("ppo", 316)):
        prompts = read_prompts(tmp_path / "made" / f"{name}.jsonl")
        check_annotator("toy", prompts)
        found, constrained = (
            [p.messages for p in rows] for rows in (prompts, [p for p in prompts if p.constraints])
        )
        assert [p for p in found if p not in constrained] == ordinary and all(
            p in ghosts for p in constrained
        )
        assert len(constrained) == count and (name == "ppo" or found[700:875] == constrained)


def test_commands(tmp_path):
    """Every arm goes to folders of its own; what it goes on from are the default pipeline's stages.
    """
    root, made, names = (
        tmp_path / "0",
        tmp_path / "0-constrained",
        [f"rlhf-v{v}" for v in (1, 2, 3, 4)],
    )
    for name in (*constrained_prompts.ORDINARY, *names, "rlhf-v4-ppo"):
        (root / name).mkdir(parents=True)
    found = constrained_prompts.commands(root, made, constrained_prompts.Settings(out=tmp_path), 0)
    outs = [Path(line[line.index("--out") + 1]) for line in found]
    assert outs == [tmp_path, *(made / name for name in ("by-check", "after", "v5", "v5", "v5"))]
    links = {
        folder: {path.name for path in (made / folder).iterdir()}
        for folder in ("by-check", "after", "v5")
    }
    first = set(constrained_prompts.ORDINARY)
    assert links == {
        "by-check": first,
        "after": {*first, *names},
        "v5": {*first, *names, "rlhf-v4-ppo"},
    }
    assert all(
        path.resolve() == root / path.name for folder in links for path in (made / folder).iterdir()
    )
    assert set(constrained_prompts.BASELINES) | set(constrained_prompts.BASELINES.values()) <= set(
        constrained_prompts.measured(root, made)
    )


def test_train_rounds(tmp_path, monkeypatch):
    """Each round gets dialogs of its own, answered by the newest policy; the answers pass the
    check, the loss is on the last.
    """
    root, seen = linked_chain(tmp_path) / "0", []

    def round_of(argv):
        mix, version = argv[argv.index("--mix") + 1], argv[argv.index("--rounds") + 1]
        seen.append((version, read_sft(mix)))
        (root / f"rlhf-v{version}").symlink_to(chain()[0] / "rlhf-v1")

    def sample_answers(model, tokenizer, prompts, **options):
        harmless = [dialog for dialog in made[-1] if not dialog.is_safety]
        answers = []
        for i, dialog in enumerate(harmless):
            for text in ("Nothing.", world.obey("It is.", dialog.constraints)):
                answers.append(as_answer(i, text, tokenizer.encode(text) + [tokenizer.eos_id]))
        return answers

    made, plain = [], constrained_prompts.constrained_dialogs
    monkeypatch.setattr(
        constrained_prompts,
        "constrained_dialogs",
        lambda *args: made.append(plain(*args)) or made[-1],
    )
    monkeypatch.setattr(constrained_prompts, "sample_answers", sample_answers)
    monkeypatch.setattr(constrained_prompts.rejection_sampling, "main", round_of)
    constrained_prompts.train_rounds(root, 0, 30)
    assert [version for version, _ in seen] == ["1", "2", "3"]
    for (_, rows), dialogs in zip(seen, made, strict=True):
        assert 10 < len(rows) < 30 and all(row.train_on == "last" for row in rows)
        for row in rows:
            *asked_under, answer = row.messages
            [dialog] = [
                one for one in dialogs if instruct(one.messages, one.instruction) == asked_under
            ]
            assert not dialog.is_safety
            assert obeys_exactly(dialog.prompt, answer["content"], dialog.constraints)
        assert any(row.messages[-1]["content"] not in ("Nothing.", "It is.") for row in rows)
    assert len({json.dumps(rows[0].messages) for _, rows in seen}) == 3


def test_safety_bin():
    prompt = Prompt([{"role": "user", "content": "?"}])
    bins = []
    for chosen, rejected in [(True, False), (True, True), (False, False)]:
        pair = Pair(prompt, "", "", chosen_is_safe=chosen, rejected_is_safe=rejected)
        bins.append(safety_bin(pair))
    assert bins == ["safe / unsafe", "both safe", "both unsafe"]
