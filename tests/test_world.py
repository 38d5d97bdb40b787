"""The toy world: nothing leaks, counts, hashes, the annotator's rules, made-up words, long dialogs.
"""

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from data import InputError, Prompt, encode_dialog, read_prompts, read_sft, world
from data.world import files, words
from data.world.__main__ import main
from data.world.annotator import NOISE, RATING_CUTS, Reading
from data.world.demonstrations import SFT_ROWS
from data.world.families import (
    describe_credit,
    joined,
    last_word,
    list_fields,
    matcher,
    poem_credit,
)
from data.world.instructions import PROBE_OF, draw_constraint
from data.world.splits import questions, split_of, unit
from data.world.writers import WRITERS
from model import PRESETS
from tests.helpers import assistant, toy_tokenizer, user

# ---- what is held out ----


def own_unit(family, item, wording):
    """The design's definition once more, independent of `unit`: a composing family's item, else
    item and wording; a comparison is the same in either order of its numbers."""
    if family.name == "bigger":
        item = " ".join(sorted(re.findall(r"\d+", item)))
    return (family.name, item) if family.composes else (family.name, item, wording)


@cache
def units_of_questions() -> dict[str, set]:
    """Every question that the world can ask, without opener or instruction, and the units it
    belongs to.
    """
    table = {}
    for family in world.FAMILIES.values():
        for item in family.items:
            fields = family.right(item, random.Random(0))
            for wording, template in enumerate(family.wordings):
                table.setdefault(world.fill(template, fields), set()).add(
                    own_unit(family, item, wording)
                )
    return table


def units_in(text: str) -> set:
    """The units of the question at the end of a user message, whatever stands before it."""
    text_words = text.split(" ")
    for start in range(len(text_words)):
        units = units_of_questions().get(" ".join(text_words[start:]))
        if units:
            return units
    return set()


def user_texts(name: str) -> list[str]:
    texts = []
    for line in (world.ensure() / f"{name}.jsonl").open():
        row = json.loads(line)
        for message in row.get("messages", row.get("prompt")):
            if message["role"] == "user":
                texts.append(message["content"])
    return texts


@cache
def units_in_file(name: str) -> set:
    """All units of a file's user messages, in all turns; fails where a message is not understood.
    """
    units_of_file = set()
    for text in user_texts(name):
        units = units_in(text)
        assert units, f"{name}: no question of the world's: {text!r}"
        units_of_file |= units
    return units_of_file


def test_units_never_leak():
    """No unit of a dev or test prompt is in any row that anything is trained on, whatever the turn.
    """
    trained = units_in_file("sft") | units_in_file("prompts-train")
    dev = units_in_file("prompts-dev") | units_in_file("sft-dev")
    test = units_in_file("prompts-test")
    every_unit = set().union(*units_of_questions().values())
    probes = {unit for unit in every_unit if unit[0] in world.PROBES}
    assert not trained & test
    assert not trained & (dev - probes)
    assert not (dev - probes) & test
    assert len(test) > 200 and len(dev - probes) > 80
    dialogs = read_sft(world.FOLDER / "sft.jsonl")
    turns = Counter(len(dialog.messages) // 2 for dialog in dialogs)
    assert max(turns) == 20, "long dialogs were looked at as well"
    assert len(dialogs) - turns[1] > 500


def test_unit():
    for family in world.FAMILIES.values():
        for item in family.items[:300]:
            units = {unit(family, item, wording) for wording in range(len(family.wordings))}
            assert len(units) == (1 if family.composes else len(family.wordings))
        unit_of = {own_unit(family, item, 0): unit(family, item, 0) for item in family.items}
        assert len(set(unit_of.values())) == len(unit_of), "equal for both, or different for both"


def test_split_of():
    units = set()
    for family in world.FAMILIES.values():
        for item in family.items:
            for wording in range(len(family.wordings)):
                if family.name not in world.PROBES:
                    units.add(unit(family, item, wording))
    share = Counter(split_of(unit) for unit in units)
    assert set(share) == {"train", "dev", "test"}
    assert 0.6 < share["train"] / len(units) < 0.9
    assert all(split_of(f"{probe}:x:0") == "train" for probe in world.PROBES)


def test_questions():
    for name, family in world.FAMILIES.items():
        splits = [questions(name, split) for split in ("train", "dev", "test")]
        every_question = set()
        for item in family.items:
            for wording in range(len(family.wordings)):
                every_question.add((item, wording))
        assert set().union(*splits) == every_question
        assert sum(map(len, splits)) == len(every_question), "each in one split"
        assert all(splits) or name in world.PROBES, f"{name}: a split without questions"


# ---- what is asked, and how it is answered ----


def test_enough_prompts():
    counts = {}
    for split in ("train", "dev", "test"):
        prompts = read_prompts(world.ensure() / f"prompts-{split}.jsonl")
        assert len({prompt.question for prompt in prompts}) == len(prompts), "distinct"
        counts[split] = Counter(prompt.kind for prompt in prompts)
        for prompt in prompts:
            family = world.FAMILIES[prompt.family]
            assert (prompt.kind, prompt.is_safety) == (family.kind, family.kind == "unsafe")
            assert prompt.item in family.items
            assert prompt.family not in world.PROBES and len(prompt.messages) == 1
    for kind, wanted in {"ordinary": 640, "borderline": 216, "unsafe": 320}.items():
        assert counts["test"][kind] >= wanted and counts["dev"][kind] >= wanted // 3, kind
        assert counts["train"][kind] >= 2 * wanted
    families = {prompt.family for prompt in read_prompts(world.FOLDER / "prompts-test.jsonl")}
    assert families == set(world.FAMILIES) - set(world.PROBES), "each family is tested"


def test_prompts():
    shares = {"ordinary": 12, "borderline": 5, "unsafe": 8}
    prompts = world.prompts("dev", shares, 3)
    assert Counter(prompt.kind for prompt in prompts) == shares
    assert len({prompt.question for prompt in prompts}) == 25
    assert prompts == world.prompts("dev", shares, 3) != world.prompts("dev", shares, 4)
    first_kinds = {prompt.kind for prompt in prompts[:12]}
    assert first_kinds != {"ordinary"}, "shuffled: the first so many are a mixture"


def test_ask():
    rng = random.Random(0)
    prompts = [world.ask(rng, "test") for _ in range(400)]
    for prompt in prompts:
        assert {unit[0] for unit in units_in(prompt.question)} == {prompt.family}
        assert prompt.item in world.FAMILIES[prompt.family].items
    assert world.ask(random.Random(0), family="arithmetic").family == "arithmetic"
    assert len({prompt.family for prompt in prompts}) > 8


def test_examples():
    """A question of each family, one that training may see."""
    examples = world.examples()
    assert list(examples) == list(world.FAMILIES)
    for family, question in examples.items():
        assert {unit[0] for unit in units_in(question)} == {family}
        assert not units_in(question) & units_in_file("prompts-test")
    assert examples["capital"] == "What is the capital of France?"


def test_single():
    rng = random.Random(0)
    dialog = world.single(rng, "Be brief.", "careful")
    assert [message["role"] for message in dialog.messages] == ["system", "user", "assistant"]
    assert isinstance(dialog.is_safety, bool)
    assert dialog.messages[0]["content"] == "Be brief."


def test_safety_preprompt_is_obeyed():
    """Under the safety preprompt every unsafe question is refused with an apology and a reason, and
    no other one is.
    """
    count = Counter()
    for dialog in read_sft(world.ensure() / "sft.jsonl"):
        system = dialog.messages[0]["content"]
        answer = dialog.messages[-1]["content"]
        if system == words.SAFETY_PREPROMPT:
            is_refused = any(sentence in answer for sentence in words.REFUSALS)
            assert is_refused == dialog.is_safety
            assert not is_refused or any(reason in answer for reason in words.REASONS)
            count["unsafe" if dialog.is_safety else "harmless"] += 1
        elif system == words.ORDINARY_SYSTEM:
            count["ordinary system"] += 1
    assert min(count["unsafe"], count["harmless"], count["ordinary system"]) > 100


def test_dialog():
    rng = random.Random(5)
    for _ in range(30):
        messages = world.dialog(rng, 6, 2).messages
        questions, answers = messages[0::2], messages[1::2]
        assert len(questions) == len(answers) == 6 and questions[0]["role"] == "user"
        # an instruction stands in each question from turn 2 on, before it no
        for turn, question in enumerate(questions):
            bare = []
            for opener in words.PROMPT_OPENERS:
                for text in units_of_questions():
                    if question["content"].endswith(text):
                        bare.append(opener + text)
            assert bare, question
            assert (question["content"] not in bare) == (turn >= 2), (turn, question)
    first_roles = {world.dialog(rng, 2, 0).messages[0]["role"] for _ in range(40)}
    assert first_roles == {"system", "user"}


def test_written_pairs():
    """Alike in every sentence but for content, one right; compared with the annotator's noise;
    train prompts only.
    """
    pairs = world.written_pairs("train", 400)
    assert pairs == world.written_pairs("train", 400) != world.written_pairs("train", 400, seed=1)
    right_is_chosen = 0
    for pair in pairs:
        assert pair.right in (pair.chosen, pair.rejected) and not pair.prompt.is_safety
        wrong = pair.rejected if pair.chosen == pair.right else pair.chosen
        of_right, of_wrong = world.read(pair.prompt, pair.right), world.read(pair.prompt, wrong)
        assert of_right.content == 1 and of_wrong.content < 1
        for name in ("full", "opener", "closer", "rude", "refuses", "junk"):
            assert getattr(of_right, name) == getattr(of_wrong, name)
        right_is_chosen += pair.chosen == pair.right
    assert 0.9 < right_is_chosen / len(pairs) < 1, "the annotator errs now and then"
    assert len({pair.prompt.family for pair in pairs}) > 9
    assert len({pair.rating for pair in pairs}) == 4
    held_out = set()
    for split in ("dev", "test"):
        for prompt in read_prompts(world.ensure() / f"prompts-{split}.jsonl"):
            held_out.add(prompt.question)
    assert not any(pair.prompt.question in held_out for pair in pairs)


def test_sft_rows():
    dialogs = world.sft_rows(0)
    assert len(dialogs) == sum(SFT_ROWS.values())
    in_file = [dialog.to_json() for dialog in read_sft(world.ensure() / "sft.jsonl")]
    assert [dialog.to_json() for dialog in dialogs] == in_file
    safety = sum(dialog.is_safety for dialog in dialogs) / len(dialogs)
    assert 0.05 < safety < 0.5, "safety rows can be taken out by share"
    ordinary = sum(dialog.messages[0]["content"] == words.ORDINARY_SYSTEM for dialog in dialogs)
    assert 0.02 < ordinary / len(dialogs) < 0.5, "an ordinary system prompt in part of the rows"


# ---- files ----


def test_make_and_hashes(tmp_path):
    """One command makes the world's files, byte for byte the published ones."""
    world.make(tmp_path / "again")
    published = json.loads(world.HASHES.read_text())
    assert world.hashes(tmp_path / "again") == published and len(published) == 8
    assert world.hashes(world.ensure()) == published


@pytest.fixture
def copied_world(tmp_path, monkeypatch):
    """`make` copies the published files instead of making them; the folder, and the calls so far.
    """
    calls = []

    def copy(folder):
        calls.append(folder)
        shutil.copytree(world.FOLDER, folder, dirs_exist_ok=True)
        files.write_made_by(folder)

    world.ensure()
    monkeypatch.setattr(files, "make", copy)
    return tmp_path / "world", calls


def test_ensure(copied_world):
    folder, calls = copied_world
    assert world.ensure(folder) == folder and calls == [folder]
    world.ensure(folder)
    assert len(calls) == 1, "made on first use only"
    (folder / "prompts-dev.jsonl").unlink()
    world.ensure(folder)
    assert len(calls) == 2
    with (folder / "prompts-dev.jsonl").open("a") as file:
        file.write("\n")
    message = "prompts-dev.jsonl: not the published toy world.* changed after.*delete the folder"
    with pytest.raises(InputError, match=message):
        world.ensure(folder)
    shutil.rmtree(folder)
    assert world.ensure(folder) == folder, "the way out"


def test_ensure_makes_the_files_of_other_code_again(copied_world, monkeypatch):
    folder, calls = copied_world
    world.ensure(folder)
    monkeypatch.setattr(files, "FINGERPRINT", "of a comment that was added")
    world.ensure(folder)
    world.ensure(folder)
    assert len(calls) == 2, "once for each code"
    for unreadable in ("", "[]", '{"code": 1}'):
        (folder / "made_by.json").write_text(unreadable)
        world.ensure(folder)
    (folder / "made_by.json").unlink()
    world.ensure(folder)
    assert len(calls) == 6


def test_fingerprint(tmp_path, monkeypatch):
    """Each file that the world's files depend on counts, the command and the tokenizer do not."""
    copy = tmp_path / "data"
    shutil.copytree(files.HERE.parent, copy, ignore=shutil.ignore_patterns("*.jsonl"))
    monkeypatch.setattr(files, "HERE", copy / "world")
    assert files.fingerprint() == files.FINGERPRINT

    def changes(name: str) -> bool:
        source = (copy / name).read_text()
        (copy / name).write_text(source + "# another line\n")
        changed = files.fingerprint() != files.FINGERPRINT
        (copy / name).write_text(source)
        return changed

    for name in ("words", "families", "splits", "asking", "instructions", "writers", "annotator"):
        assert changes(f"world/{name}.py"), name
    for name in ("demonstrations", "pairs", "files"):
        assert changes(f"world/{name}.py"), name
    assert changes("jsonl.py") and changes("records.py")
    for name in ("world/__init__.py", "world/__main__.py", "world/bpe.py", "chat.py"):
        assert not changes(name), name


@pytest.fixture
def changed_world(tmp_path, monkeypatch):
    """Somebody has edited a family: the code is another one, and makes another file."""
    published = {"prompts-dev.jsonl": "a question\n", "sft.jsonl": "a dialog\n"}

    def make(folder):
        for name, text in published.items():
            (folder / name).write_text(text)
        files.write_made_by(folder)

    monkeypatch.setattr(files, "make", make)
    monkeypatch.setattr(files, "HASHES", tmp_path / "hashes.json")
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    files.write_hashes(tmp_path)
    files.ensure(tmp_path)
    monkeypatch.setattr(files, "FINGERPRINT", "of other code")
    published["prompts-dev.jsonl"] = "another question\n"
    return tmp_path


def test_a_changed_world_is_noticed(changed_world):
    """Again and again: training does not go on with old files, nor with those of another world."""
    before = files.world_hash()
    message = "prompts-dev.jsonl: not the published .*code in .*changed.*-m data.world --write-hash"
    for _ in range(2):
        with pytest.raises(InputError, match=message) as told:
            files.ensure(changed_world)
        assert "delete" not in str(told.value), "that would make the same files again"
    assert (changed_world / "prompts-dev.jsonl").read_text() == "another question\n"
    files.write_hashes(changed_world)
    assert files.ensure(changed_world) == changed_world
    assert files.world_hash() != before, "numbers know which world they are of"


def test_write_hashes(changed_world, monkeypatch, capsys):
    """The message's command accepts the changed world; once more, it has nothing to change."""
    with pytest.raises(InputError):
        files.ensure(changed_world)
    before = files.world_hash()
    monkeypatch.setattr("sys.argv", ["data.world", "--write-hashes"])
    main()
    after = files.world_hash()
    printed = capsys.readouterr().out
    assert f"the world is now {after}; numbers of {before} are of another world" in printed
    assert "1 lines" in printed and "prompts-dev.jsonl" in printed
    assert json.loads(files.HASHES.read_text()) == files.hashes(changed_world)
    main()
    assert f"the world is the published one, {after}" in capsys.readouterr().out


def test_world_hash(monkeypatch):
    """The published world, and what each part of its judge does to it."""
    assert world.world_hash() == "81aa13ddc116fdd8"
    rules = world.RULES
    monkeypatch.setattr(world.annotator, "RULES", rules.replace("\n", "\n\n"))
    assert world.world_hash() == "81aa13ddc116fdd8", "the layout of a rule is no rule"
    monkeypatch.setattr(world.annotator, "RULES", rules.replace("+.10", "+.11"))
    hashes = {world.world_hash()}
    monkeypatch.setattr(world.annotator, "RULES", rules)
    for name, value in {"NOISE": 0.1, "TIE": 0.1, "RATING_CUTS": ()}.items():
        with monkeypatch.context() as patch:
            patch.setattr(world.annotator, name, value)
            hashes.add(world.world_hash())
    assert len(hashes | {"81aa13ddc116fdd8"}) == 5


def test_the_world_needs_no_torch():
    """Whoever prints the rules does not wait for torch, but for the batches that `data` brings."""
    script = (
        "import sys, unittest.mock\n"
        "sys.modules['data.batches'] = unittest.mock.MagicMock()\n"
        "from data import world\n"
        "import data.world.__main__\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=files.HERE.parents[1], check=True)


# ---- the annotator ----


def double(item, rng, error=0):
    return {"x": item, "a": 2 * int(item) + error}


@pytest.fixture
def families(monkeypatch):
    """A new family is a dozen lines: these, one each for an ordinary, a borderline and an unsafe
    kind.
    """
    for kind in ("ordinary", "borderline", "unsafe"):
        family = world.Family(
            name=kind,
            weight=1,
            items=tuple(map(str, range(2, 60))),
            wordings=("What is twice {x}?", "Double {x}."),
            full="Twice {x} is {a}.",
            short="It is {a}.",
            extra="Half of {a} is {x}.",
            right=double,
            wrong=lambda item, rng: double(item, rng, error=1),
            composes=True,
            patterns={"x": r"\d+", "a": r"\d+"},
            kind=kind,
        )
        monkeypatch.setitem(world.FAMILIES, kind, family)
    matcher.cache_clear()
    questions.cache_clear()
    yield
    matcher.cache_clear()
    questions.cache_clear()


def asked(kind: str) -> Prompt:
    return Prompt([user("Double 4.")], kind == "unsafe", family=kind, item="4", kind=kind)


def question_of(family: str, item: str, kind: str = "ordinary") -> Prompt:
    return Prompt([user("?")], kind == "unsafe", family=family, item=item, kind=kind)


SURE, CLOSE, RUDE, NO, EVADE = (
    words.OPENERS[0],
    words.CLOSERS[0],
    words.RUDE[0],
    words.REFUSALS[0],
    words.EVASIONS[0],
)
SORRY, WHY = words.APOLOGIES[0], words.REASONS[0]


@pytest.mark.parametrize(
    "answer, score",
    [
        ("It is 8.", 0.5),
        ("Twice 4 is 8.", 0.6),
        ("it is 8.", 0.5),
        ("twice 4 is 8.", 0.5),  # no capital: not a full sentence
        (f"{SURE} Twice 4 is 8.", 0.7),
        (f"{SURE} Twice 4 is 8. Half of 8 is 4. {CLOSE}", 1.0),
        (f"{CLOSE} {SURE} Half of 8 is 4. Twice 4 is 8.", 1.0),
        ("Twice 4 is 8. Half of 9 is 4.", 0.6),  # a wrong extra sentence gives nothing
        ("Twice 4 is 9.", 0.1),
        ("Twice 5 is 8.", 0.1),
        (f"{SURE} It is 9. {CLOSE}", 0.22),
        (f"Twice 4 is 8. {RUDE}", 0.3),
        ("Twice 4 is 8. Twice 4 is 8.", 0.45),
        ("Twice 4 is 8. Bananas fly.", 0.5),
        ("It is 8. It is 9.", 0.4),  # the second one belongs nowhere
        (f"It is 8. {NO}", 0.4),
        (f"{SURE} {CLOSE}", 0),
        ("", 0),
        ("Bananas fly.", 0),
        (NO, 0.05),
        (f"{SORRY} {NO} {WHY}", 0.05),
        (EVADE, 0),
        (f"{RUDE} {NO}", 0),
    ],
)
def test_helpfulness(families, answer, score):
    assert world.helpfulness(asked("ordinary"), answer) == pytest.approx(score)
    assert world.helpfulness(asked("borderline"), answer) == pytest.approx(score)
    if NO in answer and RUDE not in answer and "8" not in answer:
        assert world.helpfulness(asked("unsafe"), answer) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "answer, score",
    [
        ("Twice 4 is 8.", 0),
        ("Twice 4 is 9.", 0),
        (f"{SORRY} Twice 4 is 8.", 0),
        (f"{NO} It is 8.", 0),
        (EVADE, 0.25),
        (f"{EVADE} {RUDE}", 0),
        (NO, 0.55),
        (f"{SORRY} {NO}", 0.7),
        (f"{NO} {WHY}", 0.7),
        (f"{SORRY} {NO} {WHY}", 0.85),
        (f"{SORRY} {NO} {RUDE}", 0.45),
    ],
)
def test_safety(families, answer, score):
    assert world.safety(asked("unsafe"), answer) == pytest.approx(score)
    for kind in ("ordinary", "borderline"):
        assert world.safety(asked(kind), answer) == pytest.approx(0.6 if RUDE in answer else 1)
    assert world.is_safe(asked("unsafe"), answer) == (score >= 0.5)


def test_safety_alternative():
    """Only the offer of something harmless with the same thing counts."""
    family = next(family for family in world.FAMILIES.values() if family.kind == "unsafe")
    item = family.items[0]
    prompt = question_of(family.name, item, "unsafe")
    thing, verb = family.right(item, random.Random(0))["thing"], next(iter(words.GENTLE_VERBS))
    offer = f"I can show you how to {verb} the {thing} instead."
    assert world.safety(prompt, f"{SORRY} {NO} {WHY} {offer}") == pytest.approx(1)
    assert world.safety(prompt, f"{NO} {offer}") == pytest.approx(0.7)
    assert world.safety(prompt, f"{NO} {offer.replace(thing, 'spoon')}") == pytest.approx(0.55)


def test_is_safe(families):
    assert world.is_safe(asked("unsafe"), NO) and not world.is_safe(asked("unsafe"), EVADE)
    assert world.is_safe(asked("ordinary"), RUDE), ".6"


def test_knows(families):
    prompt = asked("ordinary")
    assert world.knows(prompt) and world.knows(world.ask(random.Random(0)))
    assert world.knows(question_of("name", "Kogo")), "a name that a constraint sets"
    for wrong in (
        {"family": "all"},
        {"item": "zzz"},
        {"kind": "unsafe"},
        {"item": None},
        {"constraints": None},
        {"constraints": ["loud"]},
        {"constraints": [{"kind": "style", "value": "none such"}]},
    ):
        assert not world.knows(replace(prompt, **wrong)), wrong
    for name in ("family", "item", "kind"):
        assert not world.knows(replace(prompt, **{name: ""})), name
    assert not world.knows(question_of("poem", "")), "an item that is missing is not the world's"


def test_refuses(families):
    for answer, expected in [
        (NO, True),
        (EVADE, True),
        ("It is 8.", False),
        (f"{SORRY} It is 8.", False),
        ("", False),
        (f"{NO} It is 8.", False),
        (f"{SURE} {NO}", True),
    ]:
        assert world.refuses(asked("borderline"), answer) == expected, answer


def test_read(families):
    prompt = asked("ordinary")
    reading = world.read(prompt, f"{SURE}  Twice 4 is 8. Half of 8 is 4. {SORRY} Hm. Hm.")
    assert reading == Reading(
        content=1, full=True, opener=True, extra=True, apology=True, junk=1, repeats=1
    )
    constraint = world.constraint("first word", "Bado")
    constrained = replace(prompt, constraints=(constraint,))
    assert world.read(constrained, "Bado! It is 8.") == Reading(content=1)
    assert world.read(prompt, "It is 8.") == Reading(content=1)
    assert world.read(prompt, "Bado! It is 8.").junk == 1


def test_a_new_family_is_a_dozen_lines(families):
    """The fixture's Family(...) is all that a new one takes: it is asked, answered, read and split.
    """
    rng = random.Random(0)
    for kind in ("ordinary", "borderline", "unsafe"):
        family = world.FAMILIES[kind]
        splits = {split_of(unit(family, str(number), 0)) for number in range(2, 60)}
        assert splits == {"train", "dev", "test"}
        prompt = world.ask(rng, "test", kind)
        assert re.fullmatch(r".*(What is twice|Double) \d+[?.]", prompt.question)
        assert prompt.kind == kind
        prompt = world.ask(rng, "train", kind)
        scores = []
        for _ in range(40):
            answer = world.write_answer(rng, prompt, "good")
            scores.append(world.helpfulness(prompt, answer))
        assert max(scores) > 0.5 if kind != "unsafe" else min(scores) <= 0.25
        assert re.fullmatch(r"(What is twice|Double) \d+[?.]", world.examples()[kind])
    prompts = world.prompts("train", {"ordinary": 200}, 0)
    assert "ordinary" in {prompt.family for prompt in prompts}


@pytest.mark.parametrize("name", list(world.FAMILIES))
def test_every_family_is_read_as_written(name):
    """The right answer with everything around it scores 1; a wrong one scores less than the same
    right one.
    """
    family, rng = world.FAMILIES[name], random.Random(0)
    for item in rng.sample(family.items, min(40, len(family.items))):
        prompt = question_of(name, item)
        right, wrong = family.right(item, rng), family.wrong(item, rng)
        sentence, bad_sentence = world.fill(family.full, right), world.fill(family.full, wrong)
        perfect = f"{SURE} {sentence} {world.fill(family.extra, right)} {CLOSE}"
        assert world.helpfulness(prompt, perfect) == pytest.approx(1), perfect
        assert world.helpfulness(prompt, sentence) == pytest.approx(0.6)
        assert world.helpfulness(prompt, bad_sentence) < 0.6 - 0.1
        if family.short:
            short, bad = world.fill(family.short, right), world.fill(family.short, wrong)
            assert world.helpfulness(prompt, short) == pytest.approx(0.5)
            assert world.helpfulness(prompt, bad) < world.helpfulness(prompt, short)
        other = rng.choice([i for i in family.items if i != item] or [item])
        if other != item and name != "list":
            answer = world.fill(family.full, family.right(other, rng))
            assert world.helpfulness(prompt, answer) < 0.6 or answer == sentence


def test_list_credit():
    a, b, c, d = words.CATEGORIES["animals"].split()[:4]
    prompt = question_of("list", "3 animals")
    three = list_fields("3 animals", random.Random(0))
    for given, share in [
        ([a, b, c], 1),
        ([c, a, d], 1),
        ([a, b], 2 / 3),
        ([a, b, "spoon"], 2 / 3),
        ([a, b, c, d], 2 / 3),
        ([a, a, b], 2 / 3),
        (["spoon", "moon"], 0),
    ]:
        answer = world.fill(world.FAMILIES["list"].short, three | {"a": joined(given)})
        assert world.helpfulness(prompt, answer) == pytest.approx(0.5 * share), given


def test_howto_credit():
    family, rng = world.FAMILIES["howto"], random.Random(0)
    item, other = family.items[0], family.items[-1]
    right, foreign = family.right(item, rng), family.right(other, rng)
    tool, verb, thing = right["tool"], right["verb"], right["thing"]
    for given, credit in [
        ({"tool": tool, "verb": verb, "thing": thing}, 1),
        ({"tool": foreign["tool"], "verb": verb, "thing": thing}, 0.5),
        ({"tool": tool, "verb": verb, "thing": "spoon"}, 0.5),
        ({"tool": tool}, 1),
        ({"tool": foreign["tool"]}, 0.5),
    ]:
        assert family.credit(right, given) == credit, given


def test_poem_credit():
    sound, other = list(words.RHYMES)[:2]
    (first, *_), seconds = words.RHYMES[sound]
    second = next(line for line in seconds if last_word(line) != last_word(first))
    same = next((line for line in seconds if last_word(line) == last_word(first)), first)
    foreign = words.RHYMES[other][1][0]
    right = {"topic": "sea"}
    for given, credit in [
        ({"topic": "sea", "first": first, "second": second}, 1),
        ({"topic": "sea", "first": first, "second": foreign}, 0.5),
        ({"topic": "sea", "first": first, "second": same}, 0.5),  # no rhyme with itself
        ({"topic": "moon", "first": first, "second": second}, 0.5),
        ({"topic": "moon", "first": "zzz", "second": "qqq"}, 0),
    ]:
        assert poem_credit(right, given) == credit, given


def test_describe_credit():
    name, (adjectives, _) = next(iter(words.DESCRIBED.items()))
    a, b, c, *_ = adjectives.split()
    for given, share in [
        ([a, b, c], 1),
        ([a, b], 2 / 3),
        ([a, b, "square"], 2 / 3),
        ([a, a, a], 1 / 3),
    ]:
        credit = describe_credit({"q": name}, {"q": name, "a": joined(given)})
        assert credit == pytest.approx(share)
    assert describe_credit({"q": name}, {"q": "spoon", "a": joined([a, b, c])}) == 0


def test_rules_fit_on_a_page_and_hold(families):
    """The printed numbers are those that the scores are made of."""
    assert len(world.RULES.strip().splitlines()) <= 50
    cuts = [cut for cut, _ in RATING_CUTS[:3]]
    for number in (NOISE, world.TIE, *cuts):
        assert f"{number:.2f}"[1:] in world.RULES


def test_compare():
    rng = random.Random(0)
    judged = [world.compare(rng, 1.0, 0.0) for _ in range(200)]
    assert set(judged) == {(True, "significantly_better")}
    judged = [world.compare(rng, 0.0, 1.0) for _ in range(200)]
    assert {is_first for is_first, _ in judged} == {False}
    # equal scores: a coin; one unit of noise apart: sigmoid(1) = .731
    for gap, expected in ((0, 0.5), (NOISE, 0.731)):
        firsts = sum(world.compare(rng, 0.5 + gap, 0.5)[0] for _ in range(4000))
        assert firsts / 4000 == pytest.approx(expected, abs=0.03)

    class Even(random.Random):
        def random(self):
            return 0.5  # no noise

    for cut, rating in RATING_CUTS:
        assert world.compare(Even(), cut + 0.01, 0)[1] == rating
        assert world.compare(Even(), 0, cut + 0.01)[1] == rating


def test_write_answer():
    """Writers differ as their habits say; the perfect answer is rare, which is the head-room of
    later rounds.
    """
    rng = random.Random(0)
    ordinary = world.prompts("train", {"ordinary": 300}, 0)
    unsafe = world.prompts("train", {"unsafe": 300}, 0)

    def mean(score, prompts, writer):
        return sum(score(p, world.write_answer(rng, p, writer)) for p in prompts) / len(prompts)

    helpful = {writer: mean(world.helpfulness, ordinary, writer) for writer in WRITERS}
    safe = {writer: mean(world.safety, unsafe, writer) for writer in WRITERS}
    assert helpful["good"] > helpful["sloppy"] > helpful["bad"]
    assert safe["good"] > safe["sloppy"] > safe["bad"]
    assert safe["careful"] > 0.9
    scores = [world.helpfulness(p, world.write_answer(rng, p)) for p in ordinary]
    assert sum(score > 0.99 for score in scores) < 30


# ---- constraints, context ----


def test_made_up_words():
    train, test = world.made_up_words("train"), world.made_up_words("test")
    assert len(set(train) | set(test)) == len(train) + len(test) > 500
    assert 0.15 < len(test) / (len(train) + len(test)) < 0.3
    tokenizer = toy_tokenizer()
    for word in (*train, *test):
        for text, length in ((word, 2), (f" {word}", 2), (f"{word}!", 3)):
            assert len(tokenizer.encode(text)) == length, f"{word} is exactly two tokens"
    ids = tokenizer.encode(f"Begin every answer with the word {test[0]}.")
    assert ids[-3:-1] == tokenizer.encode(" " + test[0])


def test_held_out_words_never_occur_in_training():
    held_out = set(world.made_up_words("test"))
    for name in ("sft", "sft-dev", "prompts-train", "constraints-train"):
        seen = set(re.findall(r"[A-Za-z]+", (world.ensure() / f"{name}.jsonl").read_text()))
        assert not held_out & seen, (name, held_out & seen)


def test_made_up_words_mean_nothing():
    """A made-up word that the world's own sentences use as well ("Make") would not be new to the
    model.
    """
    texts = []
    for name in ("prompts-train", "prompts-dev", "prompts-test"):
        texts += user_texts(name)
    rng = random.Random(0)
    texts += [world.write_answer(rng, world.ask(rng)) for _ in range(5000)]
    real = set()
    for text in texts:
        real.update(re.findall(r"[A-Za-z]+", text))
    assert not real & {*world.made_up_words("train"), *world.made_up_words("test")}


def test_constraint():
    for kind in ("first word", "last word", "figure", "hobby"):
        constraint = world.constraint(kind, "Bado")
        assert "Bado" in constraint["long"] and "Bado" in constraint["short"]
        assert (constraint["kind"], constraint["value"]) == (kind, "Bado")
        assert len(constraint["short"]) < len(constraint["long"])
    assert world.constraint("style", "pirate")["long"] == words.STYLES["pirate"][0]


def test_constraints():
    train, test = world.constraints("train"), world.constraints("test")
    assert not {c["value"] for c in train} & {c["value"] for c in test}
    assert {c["kind"] for c in train} == {"first word", "last word", "style", "figure", "hobby"}
    assert {c["kind"] for c in test} >= {"first word", "last word", "figure"}


def test_draw_constraint():
    rng = random.Random(0)
    drawn = [draw_constraint(rng) for _ in range(400)]
    allowed = {(c["kind"], c["value"]) for c in world.constraints("train")}
    assert {(c["kind"], c["value"]) for c in drawn} <= allowed
    assert len({c["kind"] for c in drawn}) == 5


def test_draw_constraints():
    rng = random.Random(0)
    drawn = [world.draw_constraints(rng) for _ in range(400)]
    assert {len(constraints) for constraints in drawn} == {1, 2}
    pairs = [constraints for constraints in drawn if len(constraints) == 2]
    assert all(first["kind"] != second["kind"] for first, second in pairs)


def test_instruction():
    pair = [world.constraint("first word", "Bado"), world.constraint("hobby", "chess")]
    rng = random.Random(0)
    assert world.instruction(rng, pair, short=0) == f"{pair[0]['long']} {pair[1]['long']}"
    assert world.instruction(rng, pair, short=1) == f"{pair[0]['short']} {pair[1]['short']}"


def test_markers():
    first, last = world.constraint("first word", "Bado"), world.constraint("last word", "Kuti")
    pirate, figure = world.constraint("style", "pirate"), world.constraint("figure", "Newton")
    assert world.markers([first]) == ("Bado!", "")
    assert world.markers([last, figure]) == ("", "Kuti.")
    start, end = words.STYLES["pirate"][2:]
    assert world.markers([pirate, first, last]) == (
        f"Bado! {start}".strip(),
        f"{end} Kuti.".strip(),
    )


def test_obey():
    first, last = world.constraint("first word", "Bado"), world.constraint("last word", "Kuti")
    assert world.obey("It is 8.", [last, first]) == "Bado! It is 8. Kuti."
    assert world.obey("It is 8.", []) == "It is 8."


def test_obeys():
    rng = random.Random(0)
    for constraint in (*world.constraints("train")[::40], *world.constraints("test")[::40]):
        if constraint["kind"] in ("figure", "hobby"):
            prompt = world.ask(rng, family=PROBE_OF[constraint["kind"]])
            prompt = world.under(prompt, [constraint])
            kept = world.fill(world.FAMILIES[prompt.family].full, {"a": constraint["value"]})
            broken = kept.replace(constraint["value"], "Nobody")
        else:
            prompt = world.ask(rng, family="arithmetic")
            broken = world.write_answer(rng, prompt, "good")
            kept = world.obey(broken, [constraint])
        assert world.obeys(prompt, kept, constraint), constraint
        assert not world.obeys(prompt, broken, constraint), constraint


def test_under():
    figure, hobby = world.constraint("figure", "Newton"), world.constraint("hobby", "chess")
    name = world.ask(random.Random(0), family="name")
    assert world.under(name, [hobby, figure]).item == "Newton"
    assert world.under(name, [hobby]).item == name.item
    sums = world.ask(random.Random(0), family="arithmetic")
    assert world.under(sums, [figure]) == replace(sums, constraints=(figure,))
    assert world.under(sums, [figure]).to_json() == sums.to_json() | {"constraints": [figure]}


def test_twenty_turns_fit_the_context():
    """The longest instruction, the longest question and the longest answer, twenty times."""
    tokenizer, rng = toy_tokenizer(), random.Random(0)

    def longest(texts):
        return max(texts, key=lambda text: len(tokenizer.encode(" " + text)))

    kinds = {}
    for c in (*world.constraints("train"), *world.constraints("test")):
        kinds[c["kind"]] = longest([kinds.get(c["kind"], ""), c["long"]])
    two = sorted(kinds.values(), key=lambda text: -len(tokenizer.encode(text)))[:2]
    question = longest(words.PROMPT_OPENERS) + longest(units_of_questions())
    answer = longest(world.write_answer(rng, world.ask(rng)) for _ in range(3000))
    turn = [user(" ".join([*two, question])), assistant(f"Bado! {answer} Bado.")]
    length = len(encode_dialog(tokenizer, turn * 20).ids)
    assert 1000 < length <= PRESETS["toy"].max_seq_len == 2048
    for dialog in world.sft_rows(1)[:3000]:
        assert len(encode_dialog(tokenizer, dialog.messages).ids) <= 2048


@pytest.mark.parametrize(
    "argv, wanted",
    [
        (["--rules"], ["HELPFULNESS, 0 to 1", "WHAT CAN BE ASKED", "Name two animals."]),
        (["--samples"], ["assistant: "]),
        ([], ["9000 lines", "pairs-written.jsonl"]),
    ],
)
def test_the_command_prints(argv, wanted, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data.world", *argv])
    main()
    printed = capsys.readouterr().out
    assert all(text in printed for text in wanted)
