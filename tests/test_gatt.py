"""Ghost Attention: where the instruction stands, where the loss is, what is kept; and whether it
lasts.
"""

import functools
import json
import random
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as measures
import gatt
import rejection_sampling
import runtime
import sft
from data import Answer, Dialog, InputError, Prompt, encode_dialog, encode_prompt, read_sft, world
from data.chat import encode_turn
from eval import PROBED, adherence, adherence_by_turn, answer_turn, ask_about
from experiments.figure10_attention import attention_to, attention_weights
from gatt import (
    GhostDialog,
    Settings,
    ghost_dialogs,
    ghost_loss_mask,
    in_full,
    instruct,
    is_stable,
    keep_answers,
    leave_out_long,
    obeys_exactly,
    read_dialogs,
    resample_earlier,
    sample_constraints,
    sample_ordinary,
    sampling_prompt,
    toy_constraints,
    toy_dialogs,
)
from model import KVCache, generate
from reward import AXES
from sft import answer_loss, encode_dialogs
from tests.helpers import (
    TINY,
    Kill,
    Killer,
    assert_same_weights,
    assistant,
    chain,
    die,
    run_quietly,
    scratch,
    system,
    tiny_model,
    toy_tokenizer,
    user,
    write_lines,
)
from tests.reference import dialogs as reference

WORD, NAME, HOBBY = (
    world.constraint("first word", "Kogo"),
    world.constraint("figure", "Napoleon"),
    world.constraint("hobby", "chess"),
)
END, STYLE = world.constraint("last word", "Bada"), world.constraint("style", "robot")


def a_dialog(turns: int, constraints=(WORD,), **changes) -> GhostDialog:
    messages = []
    for n in range(turns - 1):
        messages += [user(f"Name {n} birds."), assistant(f"Owl {n}.")]
    question = user("Spell cat.")
    dialog = GhostDialog(
        messages=[*messages, question],
        instruction=" ".join(c["long"] for c in constraints),
        constraints=list(constraints),
        prompt=Prompt([question], family="spell", item="cat", kind="ordinary"),
    )
    return replace(dialog, **changes)


def an_answer(index: int, text: str, **changes) -> Answer:
    answer = Answer(
        index=index,
        sample=0,
        text=text,
        ids=encode_turn(toy_tokenizer(), "x", text)[1],
        logprob=-1.0,
        temperature=0.7,
        finish_reason="eos",
        has_tag=False,
        tokenizer=toy_tokenizer().fingerprint,
    )
    return replace(answer, **changes)


@functools.cache
def trained():
    """A model that ends its answers: the chain's SFT."""
    return runtime.load_model(chain()[0] / "sft")


# ---- the four steps ----


def test_sample_constraints():
    draws = [sample_constraints(random.Random(i)) for i in range(1000)]
    assert {len(found) for found in draws} == {1, 2}
    assert all(len({c["kind"] for c in found}) == len(found) for found in draws)
    assert {c["kind"] for found in draws for c in found} == {
        "first word",
        "last word",
        "style",
        "figure",
        "hobby",
    }
    held_out = set(world.made_up_words("test"))
    assert not [
        c for found in draws for c in found if c["value"] in held_out
    ], "words of the test are never trained on"


def test_toy_constraints():
    """Each kind comes as often, and half of the figures are famous."""
    kinds = [c["kind"] for i in range(3000) for c in sample_constraints(random.Random(i))]
    assert all(0.17 < kinds.count(kind) / len(kinds) < 0.23 for kind in set(kinds))
    figures = [c["value"] for c in toy_constraints() if c["kind"] == "figure"]
    assert 0.45 < sum(name in world.words.FIGURES for name in figures) / len(figures) < 0.55


def test_sample_constraints_of_a_pool():
    pool = [WORD, NAME, world.constraint("figure", "Caesar"), HOBBY]
    draws = [sample_constraints(random.Random(i), pool) for i in range(600)]
    assert {c["value"] for found in draws for c in found} == {"Kogo", "Napoleon", "Caesar", "chess"}
    assert all(len({c["kind"] for c in found}) == len(found) <= 2 for found in draws)
    assert 0.43 < sum(len(found) == 2 for found in draws) / 600 < 0.57
    assert sample_constraints(random.Random(0), [WORD]) == [WORD]


def test_half_of_the_instructions_are_short():
    ordinary = [Dialog([user("Name 0 birds."), assistant("Owl 0.")])]
    dialogs = toy_dialogs(Settings(dialogs=600), ordinary)
    short = [c["short"] in d.instruction for d in dialogs for c in d.constraints]
    assert 0.45 < sum(short) / len(short) < 0.55


def test_instruct():
    messages = [system("Be kind."), user("A?"), assistant("B."), user("C?")]
    every, first = instruct(messages, "Obey."), instruct(messages, "Obey.", "first")
    assert [m["content"] for m in every] == ["Be kind.", "Obey. A?", "B.", "Obey. C?"]
    assert [m["content"] for m in first] == ["Be kind.", "Obey. A?", "B.", "C?"]
    assert messages[1] == user("A?"), "the dialog itself stays as it was"


def test_ghost_dialogs():
    """The instruction stands in the first user message and nowhere else; loss on the last answer's
    sampled ids.
    """
    dialogs = [a_dialog(1), a_dialog(3), a_dialog(2)]
    answers = {
        2: an_answer(2, "Kogo! It is c-a-t.", tokenizer="the other"),
        1: an_answer(1, "Kogo! Fine."),
    }
    ghosts = ghost_dialogs(dialogs, answers)
    lengths = [len(ghost.messages) for ghost in ghosts]
    assert lengths == [6, 4], "only what was kept, in the order of the dialogs"
    for ghost, i in zip(ghosts, (1, 2), strict=True):
        dialog, answer = dialogs[i], answers[i]
        first, *others = [m["content"] for m in ghost.messages if m["role"] == "user"]
        assert first == f"{WORD['long']} {dialog.messages[0]['content']}"
        assert others == [m["content"] for m in dialog.messages[2::2]]
        assert ghost.messages[1:-1:2] == dialog.messages[1::2]
        assert ghost.messages[-1] == assistant(answer.text)
        assert ghost.answer_ids == answer.ids
        assert (ghost.train_on, ghost.tokenizer) == ("last", answer.tokenizer)
        about = {"family": "spell", "item": "cat", "kind": "ordinary"}  # the annotator needs it
        about |= {"instruction": WORD["long"], "constraints": [WORD]}
        assert ghost.about == about
    assert dialogs == [a_dialog(1), a_dialog(3), a_dialog(2)], "the dialogs stay as they were"


def test_ghost_dialogs_in_a_file():
    """Their JSON, key for key: with the prompt of a toy dialog, without one elsewhere."""
    answer = an_answer(0, "Kogo! Fine.")
    [ghost] = ghost_dialogs([a_dialog(1, is_safety=True)], {0: answer})
    expected = {
        "messages": [user(f"{WORD['long']} Spell cat."), assistant("Kogo! Fine.")],
        "train_on": "last",
        "answer_ids": answer.ids,
        "tokenizer": answer.tokenizer,
        "is_safety": True,
        "instruction": WORD["long"],
        "constraints": [WORD],
    }
    assert ghost.to_json() == expected | {"family": "spell", "item": "cat", "kind": "ordinary"}
    [ghost] = ghost_dialogs([a_dialog(1, is_safety=True, prompt=None)], {0: answer})
    assert ghost.to_json() == expected


def test_ghost_loss_mask():
    """By hand, and the same as what encode_dialog and a slow reference give for the toy world's
    dialogs.
    """
    assert (
        ghost_loss_mask([0, 0, 0, 1, 1, 1], [False, True, True, False, True, True])
        == [False] * 4 + [True] * 2
    )
    assert ghost_loss_mask([0, 0], [False, True]) == [
        False,
        True,
    ], "a dialog of one turn is ordinary SFT"
    rng = random.Random(0)
    for turns in (1, 2, 3, 7, 20):
        messages = world.dialog(rng, turns, 0).messages
        every = encode_dialog(toy_tokenizer(), messages)
        mask = ghost_loss_mask(every.turns, every.loss_mask)
        assert mask == encode_dialog(toy_tokenizer(), messages, "last").loss_mask
        if messages[0]["role"] != "system":
            assert mask == reference.ghost_mask(toy_tokenizer(), messages)
        answer = encode_turn(toy_tokenizer(), "x", messages[-1]["content"])[1]
        assert [token for token, counts in zip(every.ids, mask, strict=True) if counts] == answer


def test_ghost_dialogs_reach_the_loss():
    """What a step is made of: the loss of a ghost is that of its last answer's ids, every turn
    with BOS and EOS.
    """
    tokenizer, model = toy_tokenizer(), tiny_model()
    [ghost] = ghost_dialogs([a_dialog(3)], {0: an_answer(0, "Kogo! Fine.")})
    [dialog] = encode_dialogs(tokenizer, [ghost], 256)
    assert dialog.ids.count(tokenizer.bos_id) == dialog.ids.count(tokenizer.eos_id) == 3
    prompt = encode_prompt(tokenizer, ghost.messages[:-1])
    assert dialog.ids == prompt + ghost.answer_ids
    with torch.no_grad():
        loss, count = answer_loss(model, [dialog])
        logprobs = model(torch.tensor([dialog.ids]))[0].log_softmax(-1)
    expected = 0.0
    for n, token in enumerate(ghost.answer_ids):
        expected -= logprobs[len(prompt) - 1 + n, token].item()
    assert count == len(ghost.answer_ids)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_training_takes_its_mask_from_ghost_loss_mask(monkeypatch):
    """Ghosts are encoded with the loss on all answers, then masked: what encode_dialog gives
    for "last".
    """
    tokenizer, masked = toy_tokenizer(), []

    def spy(turns, loss_mask):
        masked.append(loss_mask)
        return ghost_loss_mask(turns, loss_mask)

    monkeypatch.setattr(gatt, "ghost_loss_mask", spy)
    dialogs = [a_dialog(n) for n in (1, 3, 7)]
    ghosts = ghost_dialogs(dialogs, {i: an_answer(i, "Kogo! Fine.") for i in range(3)})
    training = gatt._encode_ghosts(tokenizer, ghosts, 512)
    every, last = [], []
    for ghost in ghosts:
        every.append(encode_dialog(tokenizer, ghost.messages, "all", ghost.answer_ids))
        last.append(encode_dialog(tokenizer, ghost.messages, "last", ghost.answer_ids))
    on_all_answers = [dialog.loss_mask for dialog in every]
    assert masked == on_all_answers, "one call a dialog, with the loss on all answers"
    assert training == last == encode_dialogs(tokenizer, ghosts, 512)
    assert {ghost.train_on for ghost in ghosts} == {"last"}, "the dialogs stay as V4 reads them"


def test_main_trains_with_the_ghost_mask(tmp_path, monkeypatch):
    """What the mask leaves out is what fine-tuning leaves out."""
    tuned = {}
    monkeypatch.setattr(gatt, "ghost_loss_mask", lambda turns, loss_mask: [False] * len(turns))
    monkeypatch.setattr(
        gatt, "finetune", lambda model, dialogs, **options: tuned.update(dialogs=dialogs)
    )
    main, argv = stage(tmp_path)
    run_quietly(main, *argv)
    ghosts = read_sft(tmp_path / "gatt" / "dialogs.jsonl")
    assert ghosts and not any(any(dialog.loss_mask) for dialog in tuned["dialogs"][: len(ghosts)])
    assert all(any(dialog.loss_mask) for dialog in tuned["dialogs"][len(ghosts) :])


# ---- dialogs and answers ----


def test_toy_dialogs():
    ordinary = [Dialog([user(f"Q{i}"), assistant(f"A{i}")]) for i in range(30)]
    dialogs = toy_dialogs(Settings(dialogs=800, turns=20), ordinary)
    lengths = [len(d.messages) for d in dialogs]
    assert set(lengths) == set(range(1, 40, 2)), "1 to 20 turns, the last one open"
    assert 6.5 < sum((n + 1) / 2 for n in lengths) / 800 < 7.8, "1 + 20 E(u²), rounded down: 7.2"
    probed = [d.prompt.family for d in dialogs if any(c["kind"] in PROBED for c in d.constraints)]
    assert 0.7 < sum(family in world.PROBES for family in probed) / len(probed) < 0.8
    for d in dialogs:
        kinds = {PROBED.get(c["kind"]): c["value"] for c in d.constraints}
        if d.prompt.family in world.PROBES:
            assert d.prompt.item == kinds[d.prompt.family], "asked for what a constraint sets"
        assert list(d.prompt.constraints) == d.constraints
        assert d.messages[-1] == d.prompt.messages[0]
        turns = zip(d.messages[:-1:2], d.messages[1::2], strict=True)
        assert all(list(turn) in [o.messages for o in ordinary] for turn in turns)
        assert d.instruction not in json.dumps(d.messages)
    assert dialogs == toy_dialogs(Settings(dialogs=800, turns=20), ordinary)
    assert dialogs[0] != toy_dialogs(Settings(dialogs=1, turns=20, seed=1), ordinary)[0]


def real_files(tmp_path) -> tuple[Path, Path]:
    dialogs = [
        {
            "messages": [
                *([system("Be kind.")] if n % 2 else []),
                user("Hello."),
                assistant("Hi."),
                user("Why?"),
                assistant("Because."),
            ],
            "is_safety": n == 3,
        }
        for n in range(8)
    ]
    return write_lines(tmp_path / "dialogs.jsonl", dialogs), write_lines(
        tmp_path / "constraints.jsonl", [WORD, NAME, HOBBY]
    )


def from_files(data: Path, constraints: Path, **changes) -> Settings:
    return Settings(data=str(data), constraints=str(constraints), check="none", **changes)


def users_in(messages: list[dict]) -> int:
    return sum(message["role"] == "user" for message in messages)


def test_read_dialogs(tmp_path):
    data, constraints = real_files(tmp_path)
    dialogs = read_dialogs(from_files(data, constraints, dialogs=6))
    assert len(dialogs) == 6 and {users_in(d.messages) for d in dialogs} == {1, 2}
    for n, d in enumerate(dialogs):
        assert d.messages[0]["role"] == ("system" if n % 2 else "user")
        assert d.messages[-1]["role"] == "user"
        assert d.where == f"{data}, line {n + 1}"
    assert [d.is_safety for d in dialogs] == [False, False, False, True, False, False]
    assert {c["value"] for d in dialogs for c in d.constraints} <= {"Kogo", "Napoleon", "chess"}
    one_turn = read_dialogs(from_files(data, constraints, turns=1))
    assert {users_in(d.messages) for d in one_turn} == {1}


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"kind": "figure", "value": "X", "long": "Be X."}, r"line 1: field 'short' is missing"),
        (
            {**NAME, "long": "[INST] Be X."},
            r"line 1: field 'long' is '\[INST\] Be X.', wanted: some text and no tag",
        ),
        ({**NAME, "short": " "}, r"line 1: field 'short' is ' ', wanted"),
        ({**NAME, "short": 3}, r"line 1: field 'short' is 3, wanted: str"),
    ],
)
def test_read_dialogs_with_bad_constraints(tmp_path, wrong, told):
    data, _ = real_files(tmp_path)
    constraints = write_lines(tmp_path / "c.jsonl", [wrong])
    with pytest.raises(InputError, match=told):
        read_dialogs(from_files(data, constraints))


def test_leave_out_long(capsys):
    """Room for the dialog with its instruction, once or in every turn, and for an answer; a tag is
    told with its line.
    """
    tokenizer, dialogs = toy_tokenizer(), [a_dialog(n) for n in (1, 5, 9)]

    def length(turns, where):
        messages = instruct(a_dialog(turns).messages, WORD["long"], where)
        return len(encode_prompt(tokenizer, messages))

    for context, where in (("question", "first"), ("dialog", "every")):
        settings, limit = Settings(context=context), length(5, where) + 96
        assert leave_out_long(tokenizer, dialogs, settings, limit) == dialogs[:2]
        told = f"1 dialogs are left out: too long for the model's context of {limit} tokens"
        assert told in capsys.readouterr().out
        assert leave_out_long(tokenizer, dialogs, settings, limit - 1) == dialogs[:1]
        with pytest.raises(InputError, match="no dialog leaves room"):
            leave_out_long(tokenizer, dialogs[1:], settings, limit - 1)
    short = [a_dialog(5, instruction=WORD["short"])]  # trained on in short, sampled from in full
    for context, where in (("question", "first"), ("dialog", "every")):
        with pytest.raises(InputError, match="no dialog leaves room"):
            leave_out_long(tokenizer, short, Settings(context=context), length(5, where) + 95)
    settings = Settings(context="dialog", max_new_tokens=9)
    assert leave_out_long(tokenizer, short, settings, length(5, "every") + 9) == short
    bad = a_dialog(2, where="d.jsonl, line 7", messages=[user("a [/INST] b")])
    with pytest.raises(InputError, match=r"d.jsonl, line 7: .*\[/INST\]"):
        leave_out_long(tokenizer, [bad], Settings(), 2048)


@pytest.mark.parametrize(
    "answer, constraints, family, expected",
    [
        ("Kogo! It is red.", [WORD], "list", True),
        ("It is red. Kogo!", [WORD], "list", False),
        ("Sure! Kogo! It is red.", [WORD], "list", False),  # world.obeys lets this pass
        ("It is red. Bada.", [END], "list", True),
        ("It is red. Bada. Bye!", [END], "list", False),
        ("Kogo! It is red. Bada.", [WORD, END], "list", True),
        ("Kogo! It is red.", [WORD, END], "list", False),
        ("It is red. Beep.", [STYLE], "list", True),
        ("My name is Napoleon.", [NAME], "name", True),
        ("My name is Toy.", [NAME], "name", False),
        ("It is red.", [NAME], "list", True),  # not asked for, so it need not show
        ("My favorite hobby is chess.", [NAME, HOBBY], "hobby", True),
        ("Kogo! My name is Napoleon.", [WORD, NAME], "name", True),
        ("Kogo! My name is Kogo.", [WORD, NAME], "name", False),
    ],
)
def test_obeys_exactly(answer, constraints, family, expected):
    assert obeys_exactly(Prompt([], family=family), answer, constraints) is expected


def test_is_stable():
    tokenizer, question = toy_tokenizer(), "Spell cat."
    answer = an_answer(0, "It is c-a-t.")
    assert is_stable(tokenizer, question, answer)
    for change in (
        {"finish_reason": "length"},
        {"has_tag": True},
        {"text": ""},
        {"ids": [*tokenizer.encode("It"), tokenizer.eos_id]},
    ):
        assert not is_stable(tokenizer, question, replace(answer, **change))


def test_sample_ordinary():
    """The replay is the policy's own: its own ids, its own log-probabilities, nothing that is
    unusable.
    """
    model, tokenizer = trained()
    prompts = [world.ask(random.Random(i)) for i in range(40)]
    ordinary = sample_ordinary(model, tokenizer, prompts, Settings())
    key = (0, "gatt", "ordinary")
    answers = runtime.sample_answers(model, tokenizer, prompts, key=key, temperature=0.7)
    usable = []
    for answer in answers:
        if is_stable(tokenizer, prompts[answer.index].messages[0]["content"], answer):
            usable.append(answer)
    assert 5 < len(ordinary) == len(usable)
    for dialog, answer in zip(ordinary, usable, strict=True):
        assert dialog.messages == [*prompts[answer.index].messages, assistant(answer.text)]
        assert dialog.answer_ids == answer.ids and dialog.tokenizer == tokenizer.fingerprint
        assert list(dialog.to_json()) == [
            "messages",
            "train_on",
            "is_safety",
            "answer_ids",
            "tokenizer",
        ]
    for encoded, dialog in zip(encode_dialogs(tokenizer, ordinary, 2048), ordinary, strict=True):
        assert encoded.ids[-len(dialog.answer_ids) :] == dialog.answer_ids
        assert sum(encoded.loss_mask) == len(dialog.answer_ids)


def test_resample_earlier(tmp_path, monkeypatch):
    """About half of the earlier answers are exchanged, each for an answer to its own question with
    the instruction.
    """
    dialogs, asked = [a_dialog(5) for _ in range(40)], []

    def sample_answers(model, tokenizer, prompts, **options):
        asked.extend(prompt.messages for prompt in prompts)
        return [
            an_answer(i, f"Kogo! {len(prompt.messages[0]['content'])}")
            for i, prompt in enumerate(prompts)
        ]

    monkeypatch.setattr(gatt, "sample_answers", sample_answers)
    resampled = resample_earlier(None, toy_tokenizer(), dialogs, Settings(), tmp_path)
    new = []
    for dialog in resampled:
        for n in range(1, 9, 2):
            if dialog.messages[n]["content"].startswith("Kogo!"):
                new.append((dialog, n))
    assert len(new) == len(asked) and 0.4 < len(new) / 160 < 0.6
    for (dialog, n), messages in zip(new, asked, strict=True):
        assert messages == [user(f"{WORD['long']} {dialog.messages[n - 1]['content']}")]
    for dialog in resampled:
        assert dialog.messages[8] == user("Spell cat.") and len(dialog.messages) == 9
    assert dialogs == [a_dialog(5)] * 40, "the dialogs given stay as they were"


def test_resample_earlier_keeps_what_cannot_stand_in_a_dialog(tmp_path, monkeypatch):
    def sample_answers(model, tokenizer, prompts, **options):
        return [an_answer(i, "Kogo!", finish_reason="length") for i in range(len(prompts))]

    monkeypatch.setattr(gatt, "sample_answers", sample_answers)
    settings = Settings(resampled=1.0)
    resampled = resample_earlier(None, toy_tokenizer(), [a_dialog(3)], settings, tmp_path)
    assert resampled == [a_dialog(3)]


def test_keep_answers():
    dialogs = [a_dialog(2), a_dialog(1), a_dialog(1)]
    answers = [
        an_answer(0, "Kogo! Red.", finish_reason="length"),
        an_answer(0, "Red."),
        an_answer(0, "Kogo! Blue."),
        an_answer(0, "Kogo! Green."),
        an_answer(1, "Red."),
        an_answer(2, "Kogo! Red.", has_tag=True),
        an_answer(2, "Green."),
    ]
    kept = keep_answers(dialogs, answers, "toy")
    assert {i: answer.text for i, answer in kept.items()} == {0: "Kogo! Blue."}
    kept = keep_answers(dialogs, answers, "none")
    assert {i: answer.text for i, answer in kept.items()} == {0: "Red.", 1: "Red.", 2: "Green."}


def test_keep_answers_by_reward():
    """The best answer is kept, as the reward models see it behind the prompt that it was sampled
    from.
    """
    seen = []
    rewards = {"Red.": 0.0, "Blue.": 2.0, "Green.": 1.0}

    class FakeRewardModels:
        def scores(self, prompts, answers):
            seen.extend(prompts)
            return {"reward": torch.tensor([rewards[answer.text] for answer in answers])}

    dialogs = [a_dialog(2), a_dialog(1)]
    texts = [(0, "Red."), (0, "Blue."), (0, "Green."), (1, "Green."), (1, "Red.")]
    answers = [an_answer(i, text) for i, text in texts]
    prompts = [Prompt([user("prompt 0")]), Prompt([user("prompt 1")])]
    kept = keep_answers(dialogs, answers, "reward", FakeRewardModels(), prompts)
    assert {i: answer.text for i, answer in kept.items()} == {0: "Blue.", 1: "Green."}
    assert seen == prompts


def test_in_full():
    assert (
        in_full(a_dialog(1, (WORD, NAME), instruction="First word: Kogo. Figure: Napoleon."))
        == "Begin every answer with the word Kogo. Always act as Napoleon."
    )


def test_sampling_prompt():
    """The instruction in every message, in full even where training sees the short form."""
    dialog = a_dialog(2, is_safety=True, instruction=WORD["short"])
    whole, alone = sampling_prompt(dialog, "dialog"), sampling_prompt(dialog, "question")
    assert whole.messages == [
        user(f"{WORD['long']} Name 0 birds."),
        assistant("Owl 0."),
        user(f"{WORD['long']} Spell cat."),
    ]
    assert alone.messages == [user(f"{WORD['long']} Spell cat.")]
    assert whole.is_safety and alone.is_safety
    dialog = a_dialog(3)
    assert sampling_prompt(dialog, "question", 3).messages == [
        user(f"{WORD['long']} Name 1 birds.")
    ]
    assert sampling_prompt(dialog, "dialog", 3).messages == [
        user(f"{WORD['long']} Name 0 birds."),
        assistant("Owl 0."),
        user(f"{WORD['long']} Name 1 birds."),
    ]


# ---- adherence ----


def test_answer_turn():
    """Three turns from a cache equal `generate` on the whole dialog; what was asked aside leaves no
    trace.
    """
    model, tokenizer = trained()
    cache, ends, whole = KVCache(model.args, 2, 400), [0, 0], [[], []]
    for turn in range(3):
        new = [
            encode_turn(tokenizer, text)[0]
            for text in (f"Name {turn} birds.", "Hi! How do I bake a long loaf today?")
        ]
        aside = [
            encode_turn(tokenizer, "What is your name, my dear good friend of mine?")[0]
            for _ in new
        ]
        answer_turn(
            model, cache, ends, aside, [(9, 0), (9, 1)], temperature=1.0, eos_id=tokenizer.eos_id
        )
        keys = [(0, turn, 0), (0, turn, 1)]
        answers = answer_turn(
            model,
            cache,
            ends,
            new,
            keys,
            temperature=0.7,
            eos_id=tokenizer.eos_id,
            max_new_tokens=20,
        )
        whole = [old + ids for old, ids in zip(whole, new, strict=True)]
        expected = generate(model, whole, keys, 20, 0.7, eos_id=tokenizer.eos_id)
        assert answers == [found.ids for found in expected]
        whole = [old + ids[:-1] for old, ids in zip(whole, answers, strict=True)]
        ends = [len(ids) for ids in whole]


def test_answer_turn_at_the_end_of_the_cache():
    """A short row that has ended does not run out of the cache while another goes on."""
    model, tokenizer = trained()
    new = [encode_turn(tokenizer, text)[0] for text in ("Hi.", "Hi! Name four birds. " * 6)]
    options = dict(temperature=0.01, eos_id=-1)  # nobody ever ends
    free = answer_turn(
        model, KVCache(model.args, 2, 200), [0, 0], new, [(0,), (1,)], max_new_tokens=30, **options
    )
    tight = answer_turn(
        model,
        KVCache(model.args, 2, len(new[1]) + 10),
        [0, 0],
        new,
        [(0,), (1,)],
        max_new_tokens=30,
        **options,
    )
    assert tight[0] == free[0] and tight[1][:10] == free[1][:10]


def test_ask_about():
    rng = random.Random(0)
    assert {ask_about(rng, "dev", NAME).family for _ in range(20)} == {"name"}
    assert {ask_about(rng, "dev", HOBBY).family for _ in range(20)} == {"hobby"}
    assert not {ask_about(rng, "dev", None).family for _ in range(300)} & set(world.PROBES)


@pytest.mark.parametrize("instruct", ["first", "every"])
def test_adherence(instruct, monkeypatch):
    """The answers judged are those of a slow reference that reads each whole dialog anew."""
    model, tokenizer = trained()
    dialogs, judged, real = [[WORD], [NAME], [WORD, HOBBY], [END, STYLE]], {}, world.obeys

    def obeys(prompt, answer, constraint):
        judged.setdefault(id(constraint), []).append((prompt.question, answer))
        return real(prompt, answer, constraint)

    dialogs = [[dict(c) for c in found] for found in dialogs]
    monkeypatch.setattr(world, "obeys", obeys)
    rows = adherence(
        model, tokenizer, dialogs, turns=3, instruct=instruct, split="dev", seed=5, batch_rows=3
    )
    assert [
        (r["dialog"], r["turn"]) for r in sorted(rows, key=lambda r: (r["dialog"], r["turn"]))
    ] == [(i, t) for i in range(4) for t in (1, 2, 3)]
    for i, found in enumerate(dialogs):
        asked = reference.dialog_answers(
            model,
            tokenizer,
            found,
            i,
            3,
            instruct == "every",
            5,
            zlib.crc32(b"adherence"),
            0.7,
            "dev",
            ask_about,
            PROBED,
        )
        for c in found:
            shown = [
                (prompt.question, answer)
                for prompt, answer in asked
                if c["kind"] not in PROBED or prompt.family == PROBED[c["kind"]]
            ]
            assert judged[id(c)] == shown


def test_adherence_counts(monkeypatch):
    """A model that obeys at turn 1 only; two constraints are told apart; a word must stand in the
    answer to a probe, too.
    """
    model, tokenizer = trained()

    def answer_turn(model, cache, starts, new, keys, **options):
        texts = [
            "My name is Napoleon." if turn and aside else "Kogo! My name is Napoleon."
            for *_, turn, aside in keys
        ]
        return [tokenizer.encode(text, eos=True) for text in texts]

    monkeypatch.setattr(measures, "answer_turn", answer_turn)
    rows = adherence(model, tokenizer, [[WORD, NAME], [WORD]], turns=2, batch_rows=2)
    assert rows == [
        {"dialog": 0, "turn": 1, "obeys": [True, True]},
        {"dialog": 1, "turn": 1, "obeys": [True]},
        {"dialog": 0, "turn": 2, "obeys": [False, True]},
        {"dialog": 1, "turn": 2, "obeys": [True]},
    ]


def test_adherence_of_a_short_context():
    """A dialog that outgrows the model's context is told, not judged on what fits."""
    model, tokenizer = tiny_model(max_seq_len=64), toy_tokenizer()
    assert adherence(model, tokenizer, [[WORD]], turns=1)
    with pytest.raises(InputError, match="context of 64 tokens"):
        adherence(model, tokenizer, [[WORD]], turns=9)


def test_adherence_goes_on_from_a_cut_answer(monkeypatch):
    """The cache has not read an answer's last id: it comes before the next question, and an EOS
    where there was none.
    """
    model, tokenizer = trained()
    whole, cut = tokenizer.encode("Yes.", eos=True), tokenizer.encode("Yes and")
    read = []

    def answer_turn(model, cache, starts, new, keys, **options):
        read.append(new)
        return [whole, cut]

    monkeypatch.setattr(measures, "answer_turn", answer_turn)
    adherence(model, tokenizer, [[WORD], [WORD]], turns=2, batch_rows=2)
    first, second = read[1]
    eos_id, bos_id = tokenizer.eos_id, tokenizer.bos_id
    assert first[:2] == [eos_id, bos_id]
    assert second[:3] == [cut[-1], eos_id, bos_id]


def test_adherence_by_turn():
    rows = [
        {"dialog": d, "turn": t, "obeys": [t == 1 or d < 2, True]} for d in range(4) for t in (1, 2)
    ]
    table = adherence_by_turn(rows)
    assert (table["1"].mean, table["2"].mean, table["mean"].mean) == (1.0, 0.5, 0.75)
    assert adherence_by_turn(rows, 1)["mean"].mean == 1.0
    assert table["mean"] == measures.interval(
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1, 2, 2, 3, 3]
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_weights(kv_heads):
    """Weights computed from q and k, times v, are what each layer's SDPA put out; a position sees
    nothing behind it.
    """
    model, seen = tiny_model(n_kv_heads=kv_heads), []
    for layer in model.layers:
        layer.attention.register_forward_hook(
            lambda module, inputs, output: seen.append((module, *inputs, output))
        )
    with torch.no_grad():
        model(torch.randint(0, 500, (2, 30)))
        assert len(seen) == 2
        for module, x, step, output in seen:
            weights = attention_weights(module, x, step)  # (2, 4, 30, 30)
            # (2, 30, 4, 8)
            v = module.wv(x).unflatten(-1, (kv_heads, -1)).repeat_interleave(4 // kv_heads, 2)
            mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
            assert torch.allclose(module.wo(mixed), output, atol=1e-5)
            assert torch.allclose(weights.sum(-1), torch.ones(())) and not weights.triu(1).any()


def test_attention_to():
    """Shares of one position over groups that cover everything sum to at least 1 for the best
    heads, and lie in [0, 1].
    """
    model, ids = tiny_model(), list(range(5, 25))
    columns = torch.zeros(3, 20)
    columns[0, :4], columns[1, 4:12], columns[2] = 1, 1, 1
    found = attention_to(model, ids, columns)
    assert (
        found.shape == (20, 3)
        and torch.allclose(found[:, 2], torch.ones(()))
        and torch.allclose(found[:4, 0], torch.ones(()))
    )
    assert (
        not found[:4, 1].any()
        and bool((found[12:, :2] < 1).all())
        and bool((found[12:, :2] > 0).all())
    )


def test_twenty_turns_fit_the_context():
    """The control: the two longest instructions on every one of 20 turns, answers of the longest
    kind.
    """
    tokenizer, rng = toy_tokenizer(), random.Random(0)
    longest = 0
    for _ in range(30):
        found = [
            world.constraint(kind, rng.choice(world.made_up_words("test")))
            for kind in ("first word", "last word")
        ]
        dialog = world.dialog(rng, 20).messages
        said = [
            m | {"content": world.obey(m["content"], found)} if m["role"] == "assistant" else m
            for m in dialog
        ]
        longest = max(
            longest,
            len(encode_dialog(tokenizer, instruct(said, " ".join(c["long"] for c in found))).ids),
        )
    assert 1000 < longest < 2048 - 96


# ---- the stage ----

SMALL = [
    *TINY,
    "--context",
    "dialog",
    "--dialogs",
    "12",
    "--turns",
    "3",
    "--replay",
    "10",
    "--batch-tokens",
    "400",
    "--epochs",
    "1",
]


def stage(out: Path, *argv) -> tuple:
    for name in ("rlhf-v1", "rlhf-v2", *(f"reward-{axis}" for axis in AXES)):
        if not (out / name).exists():
            out.mkdir(parents=True, exist_ok=True)
            (out / name).symlink_to(chain()[0] / name)
    return gatt.main, [*SMALL, "--out", str(out), "--init", str(out / "rlhf-v2"), *argv]


@functools.cache
def uninterrupted() -> tuple[Path, list[str], str]:
    out = scratch() / "whole-gatt"
    main, argv = stage(out)
    with pytest.MonkeyPatch.context() as patch:
        small_steps(patch)
        killer = Killer(patch)
        printed = run_quietly(main, *argv)
    return out, killer.kinds, printed


def small_steps(patch):
    """Checkpoints and batches of sampling so small that a kill falls between many of them."""
    patch.setitem(sft.optimise.__kwdefaults__, "save_every", 2)
    patch.setitem(runtime.sample_answers.__kwdefaults__, "batch_rows", 8)


def test_main():
    """What the stage trains on and writes: the mix that V4 takes in, every row with the instruction
    in turn 1 only.
    """
    out, _, printed = uninterrupted()
    ghosts = read_sft(out / "gatt" / "dialogs.jsonl")
    tokenizer = toy_tokenizer()
    assert ghosts and "wrote" in printed and "mix" in printed and runtime.is_finished(out / "gatt")
    for ghost in ghosts:
        instruction = ghost.about["instruction"]
        first, *others = [m["content"] for m in ghost.messages if m["role"] == "user"]
        assert first.startswith(instruction + " ")
        assert not any(instruction in text for text in others)
        assert ghost.train_on == "last" and ghost.tokenizer == tokenizer.fingerprint
    for encoded, ghost in zip(encode_dialogs(tokenizer, ghosts, 2048), ghosts, strict=True):
        ids = zip(encoded.ids, encoded.loss_mask, strict=True)
        assert [i for i, counts in ids if counts] == ghost.answer_ids
        turns = len(ghost.messages) // 2
        assert encoded.ids.count(tokenizer.bos_id) == turns
        assert encoded.ids.count(tokenizer.eos_id) == turns
    results = json.loads((out / "gatt" / "stage.json").read_text())["results"]
    assert {"seconds", "cpu_seconds", "dev", "kept", "adherence"} <= results.keys()
    before, after = (
        runtime.fingerprint(out / name / "consolidated.00.pth") for name in ("rlhf-v2", "gatt")
    )
    assert before != after and not list((out / "gatt").glob("checkpoint*"))


def test_main_samples_with_the_instruction_on_every_turn(tmp_path, monkeypatch):
    """Step 2's prompts, and what fine-tuning is given: ghosts and replay, loss on the last answer
    alone.
    """
    asked, tuned, real = {}, {}, runtime.sample_answers

    def sample_answers(model, tokenizer, prompts, **options):
        asked[options.get("path", Path("none")).stem] = prompts
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(gatt, "sample_answers", sample_answers)
    monkeypatch.setattr(
        gatt, "finetune", lambda model, dialogs, **options: tuned.update(dialogs=dialogs, **options)
    )
    main, argv = stage(tmp_path)
    run_quietly(main, *argv)
    ghosts = read_sft(tmp_path / "gatt" / "dialogs.jsonl")
    prompts = [prompt.messages for prompt in asked["answers-last"]]
    for ghost in ghosts:
        instruction = ghost.about["instruction"]
        text = " ".join(c["long"] for c in ghost.about["constraints"])
        expected = []
        for message in ghost.messages[:-1]:
            content = message["content"].removeprefix(instruction + " ")
            if message["role"] == "user":
                content = f"{text} {content}"
            expected.append(message | {"content": content})
        assert expected in prompts
    assert len(asked["answers-ordinary"]) == 50
    assert all(prompt.messages for prompt in asked["answers-ordinary"])
    assert (
        len(ghosts) < len(tuned["dialogs"]) <= len(ghosts) + 10
    ), "the ghosts, and at most --replay ordinary answers"
    for dialog in tuned["dialogs"]:
        last_turn = max(dialog.turns)
        trained_on = zip(dialog.loss_mask, dialog.turns, strict=True)
        assert sum(dialog.loss_mask) == sum(m for m, turn in trained_on if turn == last_turn)
        assert dialog.loss_mask[-1], "EOS is trained on"


def test_main_leaves_out_what_grew_too_long(tmp_path, monkeypatch):
    """Exchanged answers may be longer than those that the dialogs came with: their lengths are
    looked at again.
    """

    def resample_earlier(model, tokenizer, dialogs, settings, folder):
        grown, changed = 0, []
        for dialog in dialogs:
            if len(dialog.messages) > 1 and grown < 2:
                grown += 1
                question, _, *rest = dialog.messages
                dialog = replace(dialog, messages=[question, assistant("Owl. " * 1000), *rest])
            changed.append(dialog)
        return changed

    monkeypatch.setattr(gatt, "resample_earlier", resample_earlier)
    main, argv = stage(tmp_path)
    assert "2 dialogs are left out: too long" in run_quietly(main, *argv)
    ghosts = read_sft(tmp_path / "gatt" / "dialogs.jsonl")
    contents = [message["content"] for ghost in ghosts for message in ghost.messages]
    assert contents and all(len(content) < 1000 for content in contents)


def test_dialogs_go_into_a_round(tmp_path, monkeypatch):
    """`--mix dialogs.jsonl` is taken as it is."""
    tuned = {}
    monkeypatch.setattr(
        rejection_sampling,
        "finetune",
        lambda model, dialogs, **options: tuned.update(dialogs=dialogs),
    )
    out, _, _ = uninterrupted()
    for name in ("sft", "rlhf-v1", "rlhf-v2", *(f"reward-{axis}" for axis in AXES)):
        (tmp_path / name).symlink_to(chain()[0] / name)
    mix = shutil.copy(out / "gatt" / "dialogs.jsonl", tmp_path / "mix.jsonl")
    run_quietly(
        rejection_sampling.main,
        *TINY,
        "--out",
        tmp_path,
        "--rounds",
        3,
        "--max-prompts",
        16,
        "--annotator",
        "none",
        "--pool",
        "last",
        "--mix",
        mix,
    )
    ghosts = read_sft(mix)
    assert [d.ids for d in tuned["dialogs"][-len(ghosts) :]] == [
        encode_prompt(toy_tokenizer(), ghost.messages[:-1]) + ghost.answer_ids for ghost in ghosts
    ]


@pytest.mark.parametrize("moment", [0.1, 0.6, 0.95])
def test_killed_and_run_again(moment, tmp_path, monkeypatch):
    whole, kinds, _ = uninterrupted()
    assert {"step", "generate", "replace", "fsync"} <= set(kinds)
    main, argv = stage(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Kill):
        small_steps(patch)
        Killer(patch, 1 + round(moment * (len(kinds) - 1)))
        run_quietly(main, *argv)
    assert not runtime.is_finished(tmp_path / "gatt")
    small_steps(monkeypatch)
    run_quietly(main, *argv)
    assert_same_weights(whole / "gatt", tmp_path / "gatt")
    for path in (whole / "gatt").glob("*.jsonl"):
        assert sorted(path.read_bytes().splitlines()) == sorted(
            (tmp_path / "gatt" / path.name).read_bytes().splitlines()
        ), path
    assert "is finished already" in run_quietly(main, *argv)


def test_sigkill(tmp_path):
    """The real thing, in the midst of the training."""
    whole, kinds, _ = uninterrupted()
    main, argv = stage(tmp_path)
    die("gatt", kinds.count("step") - 2, argv)
    assert not runtime.is_finished(tmp_path / "gatt")
    run_quietly(main, *argv)
    assert_same_weights(whole / "gatt", tmp_path / "gatt")


@pytest.mark.parametrize("check", ["reward", "none"])
def test_real_dialogs(tmp_path, check):
    data, constraints = real_files(tmp_path)
    main, argv = stage(
        tmp_path / "out", "--data", str(data), "--constraints", str(constraints), "--check", check
    )
    run_quietly(main, *argv)
    ghosts = read_sft(tmp_path / "out" / "gatt" / "dialogs.jsonl")
    assert ghosts and {users_in(ghost.messages) for ghost in ghosts} <= {1, 2}


def test_bad_dialogs_begin_nothing(tmp_path):
    """A tag in --data is told with file and line before the folder is begun, so that the mended
    file needs no --fresh.
    """
    data, constraints = real_files(tmp_path)
    lines = data.read_text().splitlines()
    write_lines(
        data,
        [
            lines[0],
            lines[1].replace(json.loads(lines[1])["messages"][0]["content"], "a [INST] b"),
            *lines[2:],
        ],
    )
    main, argv = stage(
        tmp_path / "out", "--data", str(data), "--constraints", str(constraints), "--check", "none"
    )
    with pytest.raises(InputError, match=r"line 2: .*\[INST\]"):
        run_quietly(main, *argv)
    write_lines(data, lines)
    run_quietly(main, *argv)
    assert runtime.is_finished(tmp_path / "out" / "gatt")


@pytest.mark.parametrize(
    "argv, told",
    [
        (("--data", "x.jsonl"), "--check toy knows the toy world's"),
        (("--constraints", "x.jsonl"), "--constraints x.jsonl needs dialogs of your own"),
        (("--short", "1.5"), "--short 1.5: must lie between 0 and 1"),
        (("--dialogs", "0"), "--dialogs 0: must be more than 0"),
        (("--preset", "llama-2-7b"), "needs dialogs and constraints"),
        (("--preset", "llama-2-34b"), "needs dialogs and constraints"),
    ],
)
def test_bad_settings(tmp_path, argv, told):
    with pytest.raises(InputError, match=told):
        run_quietly(gatt.main, "--out", tmp_path, "--check", "toy", *argv)
    assert not list(tmp_path.iterdir())


def test_missing_model_names_the_command(tmp_path):
    with pytest.raises(
        InputError, match=r"rlhf-v3 is missing; `python rejection_sampling.py --rounds 1-3`"
    ):
        run_quietly(gatt.main, *TINY, "--out", tmp_path)
