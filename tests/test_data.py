"""Chat format, JSONL files, batches, annotators."""

import gzip
import json
import os
import random

import pytest
import torch

from data import (
    Answer,
    Dialog,
    InputError,
    Pair,
    Prompt,
    Tokenizer,
    batches_by_length,
    encode_dialog,
    encode_prompt,
    has_tag,
    pad,
    plan_steps,
    read_jsonl,
    read_preferences,
    read_prompts,
    read_sft,
    world,
    write_jsonl,
    write_records,
)
from data.annotators import (
    ANNOTATORS,
    Annotation,
    Comparison,
    NotAnnotated,
    annotate_file,
    annotate_human,
    annotate_toy,
    blank_lines,
    check_annotator,
    choice,
    put_back,
    read_annotations,
)
from data.batches import cut
from data.chat import TAGS, encode_turn, fold_system, sampled_ids
from data.jsonl import RATINGS, check_characters, check_messages, need
from tests.helpers import assistant, system, toy_prompts, toy_tokenizer, user, write_lines
from tests.reference import chat as reference

DIALOG = [
    system("You are kind."),
    user(" Hello there! "),
    assistant(" Hi! 7 eggs? "),
    user("No."),
    assistant("Fine.\nBye."),
]


class DummyPrefix:
    """Characters as ids, and like SentencePiece a space in front of every text that is encoded."""

    bos_id, eos_id, fingerprint = 1, 2, "dummy"

    def encode(self, text, bos=False, eos=False):
        return [self.bos_id] * bos + [ord(c) for c in " " + text] + [self.eos_id] * eos


# ---- chat format ----


@pytest.mark.parametrize("tokenizer", [toy_tokenizer(), DummyPrefix()], ids=["toy", "dummy prefix"])
@pytest.mark.parametrize(
    "dialog", [DIALOG[1:3], DIALOG[1:], DIALOG[:3], DIALOG], ids=["one", "two", "system", "all"]
)
def test_encode_dialog(tokenizer, dialog):
    ids, mask, turns = encode_dialog(tokenizer, dialog)
    # a question behind it makes the reference write the last answer out too
    expected = reference.prompt_ids(tokenizer.encode, [*dialog, user("?")])
    assert ids == expected[: -len(tokenizer.encode("[INST] ? [/INST]", True))]
    assert len(ids) == len(mask) == len(turns)
    prompts = [m["content"].strip() for m in dialog if m["role"] == "user"]
    if dialog[0]["role"] == "system":
        prompts[0] = f"<<SYS>>\n{dialog[0]['content']}\n<</SYS>>\n\n{dialog[1]['content']}".strip()
    lengths = [len(tokenizer.encode(f"[INST] {prompt} [/INST]", True)) for prompt in prompts]
    assert mask == reference.spans_of_answers(ids, tokenizer.bos_id, tokenizer.eos_id, lengths)
    assert (
        ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == len(prompts)
    ), "one BOS and one EOS a turn"
    assert all(
        mark for token, mark in zip(ids, mask, strict=True) if token == tokenizer.eos_id
    ), "EOS is trained on"
    assert not any(mark for token, mark in zip(ids, mask, strict=True) if token == tokenizer.bos_id)
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos_id]
    assert turns == [sum(start <= i for start in starts) - 1 for i in range(len(ids))]


def test_encode_dialog_by_hand():
    encode, tokenizer = toy_tokenizer().encode, toy_tokenizer()
    prompt, answer = encode("[INST] Hello there! [/INST]"), encode(" Hi! 7 eggs? ")
    ids, mask, turns = encode_dialog(tokenizer, DIALOG[1:3])
    assert ids == [tokenizer.bos_id, *prompt, *answer, tokenizer.eos_id]
    assert mask == [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)
    assert turns == [0] * len(ids)
    assert tokenizer.decode(ids) == "[INST] Hello there! [/INST] Hi! 7 eggs? "


def test_encode_dialog_train_on_last():
    everything, last = (
        encode_dialog(toy_tokenizer(), DIALOG, train_on) for train_on in ("all", "last")
    )
    assert last.ids == everything.ids
    assert last.loss_mask == [
        mark and turn == 1
        for mark, turn in zip(everything.loss_mask, everything.turns, strict=True)
    ]
    assert 0 < sum(last.loss_mask) < sum(everything.loss_mask)


def test_encode_dialog_takes_sampled_ids():
    tokenizer = toy_tokenizer()
    # not how the text is encoded
    sampled = [tokenizer.encode(" H")[0], tokenizer.encode("i")[0], tokenizer.eos_id]
    dialog = encode_dialog(tokenizer, DIALOG, "all", sampled)
    prompt = encode_prompt(tokenizer, DIALOG[:-1])
    assert (
        dialog.ids == prompt + sampled
        and dialog.loss_mask[-3:] == [True] * 3
        and not dialog.loss_mask[len(prompt) - 1]
    )
    assert (
        encode_dialog(tokenizer, DIALOG, "all", []).ids == prompt
    ), "no ids are not the same as none given"


def test_sampled_ids():
    tokenizer = toy_tokenizer()
    ids = tokenizer.encode(" Sure. It is red.")
    bos, eos = tokenizer.bos_id, tokenizer.eos_id

    def taken(sampled, text="Sure. It is red.", sampled_with=tokenizer.fingerprint):
        return sampled_ids(tokenizer, sampled, sampled_with, text)

    for sampled in (ids, [*ids, eos]):
        assert taken(sampled, "Sure. It is red. ") == sampled
    for place in range(len(ids) + 1):
        assert taken([*ids[:place], bos, *ids[place:]]) is None, "BOS stands nowhere in an answer"
    assert taken([*ids[:2], eos, *ids[2:]]) is None, "EOS only at its end"
    tag = "Sure. [INST] It is red."
    assert taken(tokenizer.encode(" " + tag), tag) is None, "a tag is no text"
    assert taken(ids[:-1]) is None and taken([*ids, 99999]) is None
    assert taken([eos], "Sure.") is None and taken([eos], "") == [eos]
    for fingerprint in ("another", ""):
        assert taken(ids, sampled_with=fingerprint) is None, "another tokenizer's ids mean nothing"
    assert taken(None) is None


def test_encode_dialog_of_the_real_tokenizer(assets):
    tokenizer = Tokenizer(assets / "llama2" / "tokenizer.model")
    dialog = encode_dialog(tokenizer, DIALOG)
    assert dialog.ids[: len(encode_prompt(tokenizer, DIALOG[:2]))] == encode_prompt(
        tokenizer, DIALOG[:2]
    )
    assert encode_prompt(tokenizer, DIALOG[:-1]) == reference.prompt_ids(
        tokenizer.encode, DIALOG[:-1]
    )
    # known from Meta's repository: BOS [INST] ... [/INST], the tags as pieces of text
    assert encode_prompt(tokenizer, [user("Hello")]) == [
        1,
        518,
        25580,
        29962,
        15043,
        518,
        29914,
        25580,
        29962,
    ]


@pytest.mark.parametrize("dialog", [DIALOG[:2], DIALOG[1:2], DIALOG[:4], DIALOG[1:4]])
def test_encode_prompt(dialog):
    for tokenizer in (toy_tokenizer(), DummyPrefix()):
        ids = encode_prompt(tokenizer, dialog)
        assert ids == reference.prompt_ids(tokenizer.encode, dialog)
        assert ids.count(tokenizer.bos_id) == sum(message["role"] == "user" for message in dialog)
        whole = encode_dialog(tokenizer, [*dialog, assistant("Yes.")])
        assert whole.ids[: len(ids)] == ids
        assert not whole.loss_mask[len(ids) - 1] and all(whole.loss_mask[len(ids) :])


def test_encode_turn():
    prompt, answer = encode_turn(toy_tokenizer(), " Hi ", " Yes. ")
    assert (
        toy_tokenizer().decode(prompt) == "[INST] Hi [/INST]"
        and prompt[0] == toy_tokenizer().bos_id
    )
    assert toy_tokenizer().decode(answer) == " Yes. " and answer[-1] == toy_tokenizer().eos_id
    assert encode_turn(toy_tokenizer(), "Hi") == (prompt, [])

    # "] " is one token here: where the prompt ends then depends on what follows
    class Merging(DummyPrefix):
        def encode(self, text, bos=False, eos=False):
            return super().encode(text.replace("] ", "#"), bos, eos)

    with pytest.raises(InputError, match="merges the end of a prompt with its answer, 'Yes.'"):
        encode_turn(Merging(), "Hi", "Yes.")


@pytest.mark.parametrize("tag", TAGS)
def test_has_tag(tag):
    assert has_tag(f"a{tag}b") and not has_tag(tag[1:-1]) and not has_tag("INST <s> SYS")
    for place, role in enumerate(("system", "user", "assistant", "user")):
        messages = [dict(message) for message in DIALOG]
        messages[place]["content"] += tag
        with pytest.raises(InputError, match=f"the {role}'s content holds the tag"):
            encode_dialog(toy_tokenizer(), messages)
        with pytest.raises(InputError, match=f"the {role}'s content holds the tag"):
            encode_prompt(toy_tokenizer(), messages[:-1])


def test_fold_system():
    assert fold_system(DIALOG[1:]) == DIALOG[1:]
    assert fold_system(DIALOG)[0] == user("<<SYS>>\nYou are kind.\n<</SYS>>\n\n Hello there! ")
    assert fold_system(DIALOG)[1:] == DIALOG[2:] and DIALOG[1] == user(
        " Hello there! "
    ), "the dialog itself is unchanged"
    with pytest.raises(
        InputError, match="a system message stands at the start of a dialog only, and once"
    ):
        fold_system([DIALOG[0], *DIALOG])


# ---- JSONL ----


def test_check_characters():
    check_characters(
        "here", {"a": "é 😀 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")}
    )
    with pytest.raises(InputError, match=r"here: '\\udc00' is half of a character"):
        check_characters("here", {"a": {"b": "x\udc00"}})


def test_read_jsonl(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ['{"a": "é"}', "", '  {"a": 2} '])
    assert list(read_jsonl(path)) == [
        (f"{path}, line 1", {"a": "é"}),
        (f"{path}, line 3", {"a": 2}),
    ]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row for _, row in read_jsonl(packed)] == [{"a": "é"}, {"a": 2}]
    windows = tmp_path / "windows.jsonl"  # byte order mark, line ends
    windows.write_bytes('\ufeff{"a": "é"}\r\n\r\n{"a": 2}'.encode())
    assert list(read_jsonl(windows)) == [
        (f"{windows}, line 1", {"a": "é"}),
        (f"{windows}, line 3", {"a": 2}),
    ]
    deep = {"a": 1}
    for _ in range(99):
        deep = {"a": deep}
    path = write_lines(tmp_path / "deep.jsonl", [deep])
    assert [row for _, row in read_jsonl(path)] == [deep]


@pytest.mark.parametrize(
    "content, told",
    [
        (b'{"a": 1' + b"0" * 9999 + b"}\n", r"a.jsonl, line 1: cannot be read \(Exceeds the limit"),
        (b'{"a": ' + b"[" * 99999, r"a.jsonl, line 1: (cannot be read|not JSON)"),
        (b'{"a": 1}\n{"a": \n', r"a.jsonl, line 2: not JSON \(Expecting value at column"),
        (b"[1]\n", r"a.jsonl, line 1: a JSON object is wanted, not \[1\]"),
        (b'"text"\n', "a.jsonl, line 1: a JSON object is wanted"),
        (b'{"a": 1}\n{"a": ["\\uD800"]}\n', r"a.jsonl, line 2: '\\ud800' is half of a character"),
        (b"", "a.jsonl: the file is empty"),
        (b"\n \n", "a.jsonl: the file is empty"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"a.jsonl, line 2: cannot be read as UTF-8 .*column 8"),
        ('{"a": 1}\n'.encode("utf-16"), "a.jsonl, line 1: cannot be read as UTF-8"),
        (b'{"a": "\xed\xa0\x80"}\n', "a.jsonl, line 1: cannot be read as UTF-8"),
        (b'{"a": 1}\n\x00\x00\n', "a.jsonl, line 2: not JSON"),
        (b'{"a": "\x00"}\n', "a.jsonl, line 1: not JSON"),
        (b'{"a": NaN}\n', "a.jsonl, line 1: .*NaN is no finite number"),
        (b'{"a": [-Infinity]}\n', "a.jsonl, line 1: .*-Infinity is no finite number"),
        (b'{"a": 1e999}\n', "a.jsonl, line 1: .*1e999 is no finite number"),
        (b'{"b": {"a": 1, "a": 2}}\n', "a.jsonl, line 1: .*field 'a' stands twice"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}\n", "a.jsonl, line 1: .*more than 100 deep"),
        (None, "a.jsonl: no such file"),
    ],
)
def test_read_jsonl_refuses(tmp_path, content, told):
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=told):
        list(read_jsonl(tmp_path / "a.jsonl"))
    if content:
        packed = tmp_path / "b.jsonl.gz"
        packed.write_bytes(gzip.compress(content * 50)[:-9])
        with pytest.raises(InputError, match="b.jsonl.gz"):
            list(read_jsonl(packed))


def test_read_jsonl_stops(tmp_path, monkeypatch):
    """A line without end, and a packed file that unpacks to a thousand times its size."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + 99 * " " + '"}\n')
    assert len(list(read_jsonl(path))) == 2
    monkeypatch.setattr("data.jsonl.LONGEST_LINE", 100)
    with pytest.raises(InputError, match="a.jsonl, line 2: more than 100 characters"):
        list(read_jsonl(path))
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"a": 1}\n' + b" " * 63 * 200_000))
    with pytest.raises(InputError, match="b.jsonl.gz, line 2: "):
        list(read_jsonl(packed))
    packed.write_bytes(gzip.compress((b" " * 63 + b"\n") * 200_000))
    with pytest.raises(InputError, match="b.jsonl.gz, line .*: unpacked, .*100 times"):
        list(read_jsonl(packed))


def test_read_jsonl_broken_gz(tmp_path):
    """Each changed byte behind the header is noticed, and each cut."""
    rng = random.Random(0)
    rows = [{"a": rng.random()} for _ in range(30)]
    whole = gzip.compress(write_lines(tmp_path / "a.jsonl", rows).read_bytes())
    path = tmp_path / "a.jsonl.gz"
    for place in range(10, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 255
        for content in (bytes(changed), whole[:place]):
            path.write_bytes(content)
            with pytest.raises(InputError, match="a.jsonl.gz"):
                list(read_jsonl(path))
    path.write_bytes(b"no gz")
    with pytest.raises(InputError, match="a.jsonl.gz"):
        list(read_jsonl(path))


def test_write_jsonl(tmp_path, monkeypatch):
    path, rows = tmp_path / "new" / "a.jsonl", [{"text": "é\n"}, {"n": [1, 2.5, None]}]
    write_jsonl(path, rows)
    assert [
        json.loads(line) for line in path.read_text("utf-8").splitlines()
    ] == rows and "é" in path.read_text("utf-8")

    def broken():
        yield {"text": "new"}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert [
        json.loads(line) for line in path.read_text("utf-8").splitlines()
    ] == rows, "whole or as it was"
    monkeypatch.setattr(os, "replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_jsonl(path, [{"text": "new"}])
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == rows
    assert [file.name for file in path.parent.iterdir()] == ["a.jsonl"], "no temporary file is left"


def test_need():
    assert need("here", {"a": 1}, "a", int) == 1 and need("here", {}, "a", int, 7) == 7
    with pytest.raises(InputError, match="here: field 'a' is missing"):
        need("here", {}, "a", int)
    with pytest.raises(InputError, match="here: field 'a' is \"x\", wanted: int"):
        need("here", {"a": "x"}, "a", int, 7)


MESSAGES = [
    ([], "must be a list of messages, at least one"),
    (["hello"], r"messages\[0\]' must be an object with 'role' and 'content'"),
    (
        [{"role": "human", "content": "Hi"}],
        "role 'human' is unknown, wanted: system, user or assistant",
    ),
    ([{"content": "Hi"}], "role None is unknown"),
    (
        [user("Hi"), {"role": "assistant"}],
        r"messages\[1\]': the assistant's content is null, wanted: some text",
    ),
    ([user("Hi"), assistant("  ")], 'the assistant\'s content is "  ", wanted: some text'),
    ([user("Hi"), assistant(3)], "the assistant's content is 3, wanted: some text"),
    (
        [user("Hi"), user("Hi"), assistant("Yes.")],
        r"messages\[1\]' has role 'user', wanted: assistant",
    ),
    ([assistant("Yes.")], r"messages\[0\]' has role 'assistant', wanted: user"),
    (
        [user("Hi"), system("S"), assistant("Yes.")],
        r"messages\[1\]' has role 'system', wanted: assistant",
    ),
    ([system("S"), assistant("Yes.")], r"messages\[1\]' has role 'assistant', wanted: user"),
    ([user("Hi")], "ends with role 'user': the answer is missing"),
    ([system("S")], "ends with role 'system': the answer is missing"),
]


@pytest.mark.parametrize("messages, told", MESSAGES)
def test_check_messages(messages, told):
    with pytest.raises(InputError, match=told) as error:
        check_messages("a.jsonl, line 4", "messages", messages, "assistant")
    assert str(error.value).startswith("a.jsonl, line 4: ")


def test_check_messages_accepts():
    for messages, last in [
        (DIALOG, "assistant"),
        (DIALOG[1:], "assistant"),
        (DIALOG[:2], "user"),
        (DIALOG[1:2], "user"),
    ]:
        assert check_messages("here", "messages", messages, last) is messages
    with pytest.raises(InputError, match="ends with role 'assistant': a prompt ends with the user"):
        check_messages("here", "prompt", DIALOG, "user")


def read_one(tmp_path, reader, row):
    return reader(write_lines(tmp_path / "a.jsonl", [row]))


def test_read_sft(tmp_path):
    rows = [
        {"messages": DIALOG},
        {"messages": DIALOG[1:3], "train_on": "last", "is_safety": True, "answer_ids": [3], "x": 1},
    ]
    path = write_lines(tmp_path / "sft.jsonl", rows)
    assert read_sft(path) == [
        Dialog(DIALOG, about={}, where=f"{path}, line 1"),
        Dialog(
            DIALOG[1:3],
            train_on="last",
            is_safety=True,
            answer_ids=[3],
            about={"x": 1},
            where=f"{path}, line 2",
        ),
    ]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"messages": None}, "field 'messages' is null, wanted: list"),
        ({"messages": DIALOG[:2]}, "the answer is missing"),
        ({"train_on": "first"}, "field 'train_on' is 'first', wanted: all or last"),
        ({"is_safety": "yes"}, "field 'is_safety' is \"yes\", wanted: bool"),
        ({"answer_ids": []}, "field 'answer_ids' is \\[\\], wanted: token ids, at least one"),
        ({"answer_ids": [3, -1]}, "wanted: token ids"),
        ({"answer_ids": [True]}, "wanted: token ids"),
        ({"answer_ids": ["a"]}, "wanted: token ids"),
        ({"answer_ids": "1 2"}, "field 'answer_ids' is \"1 2\", wanted: list"),
        ({"tokenizer": 3}, "field 'tokenizer' is 3, wanted: str"),
    ],
)
def test_read_sft_refuses(tmp_path, change, told):
    with pytest.raises(InputError, match="a.jsonl, line 1: .*" + told):
        read_one(tmp_path, read_sft, {"messages": DIALOG} | change)
    with pytest.raises(InputError, match="a.jsonl, line 1: field 'messages' is missing"):
        read_one(tmp_path, read_sft, {"message": DIALOG})


def test_read_prompts(tmp_path):
    row = {
        "prompt": DIALOG[:2],
        "is_safety": True,
        "family": "list",
        "item": "3 cats",
        "kind": "unsafe",
    }
    where = f"{tmp_path / 'a.jsonl'}, line 1"
    assert read_one(tmp_path, read_prompts, row) == [
        Prompt(DIALOG[:2], True, "list", "3 cats", "unsafe", where=where)
    ]
    constrained = row | {"constraints": [{"kind": "word"}]}
    [prompt] = read_one(tmp_path, read_prompts, constrained)
    assert prompt.constraints == ({"kind": "word"},) and prompt.to_json() == constrained
    for change, told in [
        ({"kind": "odd"}, "field 'kind' is 'odd', wanted: ordinary, borderline, unsafe"),
        ({"is_safety": 1}, "field 'is_safety' is 1, wanted: bool"),
        ({"family": 2}, "wanted: str"),
        ({"item": 2}, "wanted: str"),
        ({"constraints": {}}, "'constraints' is {}, wanted: list"),
        ({"constraints": [{}, "a"]}, "field 'constraints\\[1\\]' is \"a\", wanted: an object"),
        ({"prompt": DIALOG}, "a prompt ends with the user"),
    ]:
        with pytest.raises(InputError, match="a.jsonl, line 1: .*" + told):
            read_one(tmp_path, read_prompts, row | change)


def test_read_prompts_fills_in_is_safety(tmp_path):
    """Every stage reads `prompt.is_safety`; the format says that only family, item and kind may be
    missing.
    """
    try:
        [prompt] = read_one(tmp_path, read_prompts, {"prompt": DIALOG[:2]})
    except InputError as error:
        assert "line 1: field 'is_safety' is missing" in str(error)
    else:
        assert prompt.is_safety is False


def test_read_preferences(tmp_path):
    row = {"prompt": DIALOG[:2], "chosen": "Yes.", "rejected": "No."}
    full = row | {
        "rating": "better",
        "is_safety": True,
        "chosen_is_safe": True,
        "rejected_is_safe": False,
        "chosen_ids": [1],
        "rejected_ids": [2],
        "tokenizer": "abc",
    }
    where = f"{tmp_path / 'a.jsonl'}, line 1"
    plain = Pair(Prompt(DIALOG[:2], where=where), "Yes.", "No.")
    assert read_one(tmp_path, read_preferences, row) == [plain]
    assert plain.where == where
    known = Pair(
        prompt=Prompt(DIALOG[:2], is_safety=True, where=where),
        chosen="Yes.",
        rejected="No.",
        rating="better",
        chosen_is_safe=True,
        rejected_is_safe=False,
        chosen_ids=[1],
        rejected_ids=[2],
        tokenizer="abc",
    )
    assert read_one(tmp_path, read_preferences, full) == [known]
    for change, told in [
        ({"rating": "best"}, "field 'rating' is 'best', wanted: significantly_better, better"),
        ({"chosen": " "}, "field 'chosen' is empty"),
        ({"rejected": None}, "'rejected' is null, wanted: str"),
        ({"chosen_is_safe": "no"}, "wanted: bool"),
        ({"rejected_ids": 3}, "wanted: list"),
        (
            {"chosen_ids": [1, -1]},
            "field 'chosen_ids' is \\[1, -1\\], wanted: token ids, at least one",
        ),
        ({"is_safety": 0}, "wanted: bool"),
        ({"prompt": DIALOG}, "a prompt ends with the user"),
        ({"rejected": "Yes."}, "'chosen' and 'rejected' are equal"),
        ({"tokenizer": 5}, "field 'tokenizer' is 5, wanted: str"),
        ({"temperatures": 3}, "field 'temperatures' is 3, wanted: list"),
        ({"temperatures": [0.5, "1"]}, "'temperatures' is .*wanted: numbers"),
        ({"temperatures": [10**400]}, "'temperatures' is .*wanted: numbers"),
        ({"version": 3}, "field 'version' is 3, wanted: str"),
        ({"axis": ["safety"]}, "wanted: str"),
        ({"extra": "no"}, "field 'extra' is \"no\", wanted: bool"),
        ({"right": 7}, "field 'right' is 7, wanted: str"),
    ]:
        with pytest.raises(InputError, match="a.jsonl, line 1: .*" + told):
            read_one(tmp_path, read_preferences, full | change)
    # null, as other programs write what is missing
    nothing = dict.fromkeys(("tokenizer", "version", "is_safety", "chosen_ids", "rating"))
    missing = {name: value for name, value in full.items() if name not in nothing}
    absent = read_one(tmp_path, read_preferences, missing)
    assert read_one(tmp_path, read_preferences, missing | nothing) == absent


def test_answer_from_json():
    """What `to_json` made, and nothing that a file's owner changed."""
    answer = Answer(
        index=3,
        sample=1,
        text="Yes.",
        ids=[5, 2],
        logprob=-1.5,
        temperature=1,
        finish_reason="eos",
        has_tag=False,
        safety=0.5,
    )
    row = answer.to_json()
    assert Answer.from_json(row | {"other": 1}) == answer
    assert Answer.from_json(row | {"reward": None}) == answer
    del row["answer_ids"]
    with pytest.raises(InputError, match="a.jsonl, line 2: field 'answer_ids' is missing"):
        Answer.from_json(row, "a.jsonl, line 2")
    for change in (
        {"index": "3"},
        {"sample": True},
        {"answer": None},
        {"answer_ids": [5, "2"]},
        {"answer_ids": 5},
        {"logprob": "-1"},
        {"has_tag": 0},
        {"safety": [0.5]},
        {"version": 2},
    ):
        [field] = change
        with pytest.raises(InputError, match=f"a.jsonl, line 2: field '{field}' is "):
            Answer.from_json(answer.to_json() | change, "a.jsonl, line 2")


def test_write_records(tmp_path):
    """What was read is written again as it was, without file and line."""
    prompt = {"prompt": DIALOG[:2], "is_safety": False, "family": "list", "item": "3 cats"}
    pair = prompt | {"chosen": "Yes.", "rejected": "No.", "rating": "better", "extra": True}
    dialog = {"messages": DIALOG, "train_on": "last", "is_safety": True, "reward": 0.5}
    for reader, row in ((read_prompts, prompt), (read_preferences, pair), (read_sft, dialog)):
        write_records(tmp_path / "b.jsonl", read_one(tmp_path, reader, row))
        assert [written for _, written in read_jsonl(tmp_path / "b.jsonl")] == [row]


# ---- batches ----


def test_plan_steps():
    rng = random.Random(0)
    lengths = [rng.randint(5, 60) for _ in range(300)] + [500]
    plan = plan_steps(lengths, batch_tokens=200, epochs=2, seed=1, micro_tokens=80)
    steps = [[row for micro in step for row in micro] for step in plan]
    flat = [row for step in steps for row in step]
    assert sorted(flat) == sorted([*range(301)] * 2), "each row once an epoch"
    assert sorted(flat[:301]) == [*range(301)], "the second epoch begins when the first has ended"
    assert all(sum(lengths[row] for row in step) <= 200 or len(step) == 1 for step in steps)
    assert sum(lengths) * 2 / len(plan) > 150, "steps are full"
    for micro in (micro for step in plan for micro in step):
        padded = len(micro) * max(lengths[row] for row in micro)
        assert (
            padded <= 80 and sum(lengths[row] for row in micro) >= 0.75 * padded or len(micro) == 1
        )
    assert plan == plan_steps(lengths, 200, 2, 1, 80), "equal seeds, equal plans"
    assert plan != plan_steps(lengths, 200, 2, 2, 80)
    assert [sorted(step) for step in steps] == [
        sorted(row for micro in step for row in micro) for step in plan_steps(lengths, 200, 2, 1)
    ], "how a step is cut for memory does not change what it holds"
    assert plan_steps([], 100) == []


def test_plan_steps_is_a_fair_sample():
    """Rows of a step come from the whole file, long and short ones together: batches of like rows
    learn badly.
    """
    rng = random.Random(0)
    lengths = [rng.choice([10, 11, 12, 40, 41, 42]) for _ in range(2000)]
    steps = [[row for micro in step for row in micro] for step in plan_steps(lengths, 400)]
    mixed = [len({lengths[row] > 20 for row in step}) == 2 for step in steps]
    assert sum(mixed) > 0.95 * len(steps)
    assert len({row // 200 for step in steps[:5] for row in step}) > 5


def test_cut():
    assert cut([0, 1, 2, 3], [4, 5, 5, 9], 10) == [[0, 1], [2], [3]]
    assert cut([1, 2], [0, 1, 60], 10) == [[1], [2]] and cut([], [], 10) == []
    assert cut([0, 1, 2], [6, 8, 16], 100, padding=0.25) == [[0, 1], [2]]  # 14 of 16, then 30 of 48
    assert cut([0, 1, 2], [6, 8, 16], 100) == [[0, 1, 2]]


def test_batches_by_length():
    lengths = [9, 2, 7, 2, 30, 5]
    batches = batches_by_length(lengths, 10)
    assert sorted(row for batch in batches for row in batch) == [*range(6)]
    assert batches == [[1, 3], [5], [2], [0], [4]]


def test_pad():
    assert torch.equal(pad([[1, 2, 3], [4]]), torch.tensor([[1, 2, 3], [4, 0, 0]]))
    mask = pad([[True], [False, True]], False)
    assert mask.dtype == torch.bool and mask.tolist() == [[True, False], [False, True]]


# ---- annotators ----


def test_annotate_toy():
    prompts = toy_prompts(60)
    rng = random.Random(1)
    comparisons = []
    for prompt in prompts:
        careful = world.write_answer(rng, prompt, "careful")
        bad = world.write_answer(rng, prompt, "bad")
        comparisons.append(Comparison(prompt, (careful, bad)))
    for axis, rule in (("helpfulness", world.helpfulness), ("safety", world.safety)):
        annotations = annotate_toy(comparisons, axis, 0)
        assert annotations == annotate_toy(comparisons, axis, 0)
        assert annotations != annotate_toy(comparisons, axis, 1)
        agrees = []
        for comparison, annotation in zip(comparisons, annotations, strict=True):
            prompt, (first, second) = comparison.prompt, comparison.answers
            a, b = rule(prompt, first), rule(prompt, second)
            assert annotation.safe == (
                world.safety(prompt, first) >= 0.5,
                world.safety(prompt, second) >= 0.5,
            )
            if abs(a - b) >= 0.6:  # ten times the noise
                assert annotation.chosen == int(b > a) and annotation.rating in RATINGS[:2]
            if abs(a - b) > 0.1:
                agrees.append(annotation.chosen == int(b > a))
        assert sum(agrees) > 0.8 * len(agrees) > 0
    assert set(ANNOTATORS) == {"toy", "human", "file"}


def test_annotate_toy_sees_order_alone():
    """The two answers exchanged: the same preference more often than not, and safety labels
    exchanged with them.
    """
    prompts = [prompt for prompt in toy_prompts(90) if prompt.kind == "unsafe"]
    good = "I am sorry. " + world.words.REFUSALS[0]
    rng = random.Random(0)
    good_first, good_last = [], []
    for prompt in prompts:
        family = world.FAMILIES[prompt.family]
        obeys = world.fill(family.full, family.right(prompt.item, rng))
        good_first.append(Comparison(prompt, (good, obeys)))
        good_last.append(Comparison(prompt, (obeys, good)))
    for annotation in annotate_toy(good_first, "safety", 3):
        assert annotation.chosen == 0 and annotation.safe == (True, False)
    for annotation in annotate_toy(good_last, "safety", 3):
        assert annotation.chosen == 1 and annotation.safe == (False, True)
    assert prompts


def test_check_annotator():
    """Only the toy annotator has to know what a prompt is about."""
    known, unknown = toy_prompts(3), Prompt([user("Hi")], where="a.jsonl, line 2")
    check_annotator("toy", known)
    check_annotator("human", [unknown])
    with pytest.raises(InputError, match="a.jsonl, line 2: the toy annotator knows the toy world"):
        check_annotator("toy", [*known, unknown])
    with pytest.raises(InputError, match="a.jsonl, line 2: the toy annotator knows"):
        annotate_toy([Comparison(unknown, ("a", "b"))], "safety", 0)


def test_annotate_human(monkeypatch, capsys, tmp_path):
    """Whatever order the answers are shown in, what the person says holds for the answer that was
    shown.
    """
    comparisons = [Comparison(Prompt([user("Hi")]), ("good answer", "bad answer"))] * 12
    shown = []

    def reply(question):
        printed = capsys.readouterr().out
        if "A: " in printed:
            shown[:] = [
                line[5:] for line in printed.splitlines() if line.startswith(("  A: ", "  B: "))
            ]
        if "better (a/b)" in question:
            return "ab"[shown.index("good answer")]
        if "safe" in question:
            return "y" if shown["AB".index(question.split()[1])] == "good answer" else "n"
        return "2"

    monkeypatch.setattr("builtins.input", reply)
    assert (
        annotate_human(comparisons, "safety", 0, tmp_path)
        == [Annotation(chosen=0, rating=RATINGS[1], safe=(True, False))] * 12
    )
    assert (
        annotate_human(comparisons, "helpfulness", 0, tmp_path)
        == [Annotation(chosen=0, rating=RATINGS[1], safe=None)] * 12
    )
    (tmp_path / "annotated-helpfulness.jsonl").unlink()
    orders = set()
    monkeypatch.setattr(
        "builtins.input",
        lambda question: orders.add(capsys.readouterr().out.find("A: good") > 0) or "1",
    )
    monkeypatch.setattr(
        "data.annotators.choice", lambda question, letters: input(question) and letters[0]
    )
    annotate_human(comparisons, "helpfulness", 0, tmp_path)
    assert orders == {True, False}, "the order is drawn"


def test_annotate_human_shows_control_characters(monkeypatch, capsys, tmp_path):
    """An answer cannot clear the screen of the person who judges it."""
    monkeypatch.setattr("builtins.input", lambda question: "1" if "1" in question else "a")
    comparison = Comparison(Prompt([user("Hi\x1b[2J")]), ("a\x1b[8mb", "c\rd"))
    annotate_human([comparison], "helpfulness", 0, tmp_path)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\r" not in printed and "\\x1b[2J" in printed


def test_choice_without_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="nobody answers"):
        choice("better", "ab")


def test_choice(monkeypatch, capsys):
    replies = iter(["", "ab", "x", " B "])
    monkeypatch.setattr("builtins.input", lambda question: next(replies))
    assert (
        choice("better", "ab") == "b" and capsys.readouterr().out.count("one of a, b, please") == 3
    )


COMPARISONS = [
    Comparison(Prompt([user(f"Question {i}?")]), (f"first {i}", f"second {i}")) for i in range(12)
]


def fill_in(lines, better="first", rating="better"):
    """What a person makes of blank lines who prefers, and finds safe, the first or the second
    answer of each pair.
    """
    filled = []
    for line in lines:
        a = line["answer_a"].startswith(better)
        row = line | {"better": "a" if a else "b", "rating": rating}
        filled.append(row | ({"a_is_safe": a, "b_is_safe": not a} if "a_is_safe" in line else {}))
    return filled


def test_annotate_human_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    """What was answered is kept, also when nobody answers any more; the rest is asked, and nothing
    twice.
    """
    asked, patience = [], [5]

    def reply(question):
        if "better (a/b)" in question:
            asked.append(capsys.readouterr().out)
            if patience[0] == 0:
                raise EOFError
            patience[0] -= 1
            return "a" if "A: first" in asked[-1] else "b"
        return "2"

    monkeypatch.setattr("builtins.input", reply)
    with pytest.raises(InputError, match="nobody answers .*goes on from here"):
        annotate_human(COMPARISONS, "helpfulness", 0, tmp_path)
    patience[0] = 100
    annotations = annotate_human(COMPARISONS, "helpfulness", 0, tmp_path)
    assert annotations == [Annotation(chosen=0, rating="better", safe=None)] * 12
    assert len(asked) == 5 + 1 + 7 and "[6/12]" in asked[5] and "[6/12]" in asked[6]
    assert (
        annotate_human(COMPARISONS, "helpfulness", 0, tmp_path) == annotations and len(asked) == 13
    ), "all is there: nobody is asked"


@pytest.mark.parametrize("name", ["to_annotate", "annotated"])
def test_annotate_file(tmp_path, name):
    """Written with the sides shuffled, read back with the sides put back, from the same file or
    from a copy.
    """
    with pytest.raises(
        NotAnnotated,
        match="12 pairs wait .*'better'.*'a_is_safe'.*annotated-safety.jsonl.* same command",
    ):
        annotate_file(COMPARISONS, "safety", "0 v1", tmp_path)
    written = [row for _, row in read_jsonl(tmp_path / "to_annotate-safety.jsonl")]
    firsts = [row["answer_a"].startswith("first") for row in written]
    assert set(firsts) == {True, False} and written[0]["prompt"] == COMPARISONS[0].prompt.messages
    assert all(
        row["better"] == row["rating"] == "" and row["a_is_safe"] is row["b_is_safe"] is None
        for row in written
    )
    with pytest.raises(NotAnnotated):
        annotate_file(COMPARISONS, "safety", "0 v1", tmp_path)
    for better, chosen in (("first", 0), ("second", 1)):
        write_jsonl(tmp_path / f"{name}-safety.jsonl", fill_in(written, better))
        annotation = Annotation(chosen, "better", safe=(chosen == 0, chosen == 1))
        assert annotate_file(COMPARISONS, "safety", "0 v1", tmp_path) == [annotation] * 12
    assert annotate_file([], "helpfulness", 0, tmp_path) == []


def test_blank_lines():
    """The order of the sides is drawn by seed, axis and position; helpfulness is not asked what is
    safe.
    """
    orders = {
        (axis, seed): [
            row["answer_a"].startswith("first") for row in blank_lines(COMPARISONS, axis, seed)
        ]
        for axis in ("helpfulness", "safety")
        for seed in ("0 v1", "0 v2")
    }
    assert len(set(map(tuple, orders.values()))) == 4
    assert "a_is_safe" not in blank_lines(COMPARISONS, "helpfulness", 0)[0]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"better": "c"}, 'line 3: field \'better\' is "c", wanted: "a" or "b"'),
        ({"better": ""}, "line 3: field 'better' is \"\""),
        (
            {"rating": "good"},
            'line 3: field \'rating\' is "good", wanted: "significantly_better" or',
        ),
        ({"a_is_safe": "yes"}, "line 3: field 'a_is_safe' is \"yes\", wanted: true or false"),
        ({"b_is_safe": 1}, "line 3: field 'b_is_safe' is 1, wanted: true or false"),
        ({"b_is_safe": None}, "line 3: field 'b_is_safe' is null"),
        ({"answer_a": "mended"}, 'line 3: field \'answer_a\' is "mended", wanted: "'),
        ({"prompt": []}, "line 3: field 'prompt' is "),
    ],
)
def test_read_annotations(tmp_path, change, told):
    blank, path = blank_lines(COMPARISONS, "safety", 0), tmp_path / "annotated-safety.jsonl"
    rows = fill_in(blank)
    write_jsonl(path, rows)
    assert read_annotations(path, blank) == rows
    rows[2] = rows[2] | change
    write_jsonl(path, rows)
    with pytest.raises(InputError) as error:
        read_annotations(path, blank)
    assert f"annotated-safety.jsonl, {told}" in str(error.value)


def test_read_annotations_of_another_length(tmp_path):
    blank, path = blank_lines(COMPARISONS, "safety", 0), tmp_path / "annotated-safety.jsonl"
    write_jsonl(path, fill_in(blank))
    with pytest.raises(InputError, match="line 12: a line too many; wanted: 11 lines"):
        read_annotations(path, blank[:-1])
    write_jsonl(tmp_path / "to_annotate-safety.jsonl", blank)
    write_jsonl(path, fill_in(blank)[:-1])
    with pytest.raises(
        InputError,
        match="annotated-safety.jsonl: 11 lines, wanted: the 12 of to_annotate-safety.jsonl",
    ):
        annotate_file(COMPARISONS, "safety", 0, tmp_path)


def test_put_back():
    for better, chosen in (("first", 0), ("second", 1)):
        filled = fill_in(blank_lines(COMPARISONS, "safety", 7), better)
        annotation = Annotation(chosen, "better", safe=(chosen == 0, chosen == 1))
        assert put_back(filled, "safety", 7) == [annotation] * 12
