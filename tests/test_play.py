"""What one can touch: each command of `python -m play`."""

import re
from dataclasses import replace

import pytest
import torch

import gatt
import report
import reward
import runtime
from data import Answer, InputError, Prompt, printable, read_prompts, world
from data.preferences import GivenAnswer
from model import Generation
from play import __main__ as commands
from play import best_of_n, chat, compare, ghost, samples, scores
from play.shared import find_model
from rejection_sampling import RewardModels
from reward import score_dialogs
from runtime import newest_reward_models
from tests.helpers import (
    assistant,
    chain,
    run_quietly,
    system,
    tiny_model,
    toy_tokenizer,
    user,
    write_lines,
)


class ByteTokenizer:
    """Ids are bytes; a character beyond ASCII is several tokens."""

    bos_id, eos_id, vocab_size = 256, 257, 258
    fingerprint = "bytes"

    def encode(self, text, bos=False, eos=False):
        return [self.bos_id] * bos + list(text.encode()) + [self.eos_id] * eos

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


HI = [user("Hi")]


def scripted(monkeypatch, text, finish_reason="eos"):
    """Replaces `generate` by a model that says `text`; returns the prompts it was given."""
    prompts = []

    def say(model, batch, keys, *_, eos_id, on_token, **__):
        prompts.append(bytes(i for i in batch[0] if i < 256).decode())
        ids = list(text.encode()) + [eos_id] * (finish_reason == "eos")
        for token in ids:
            on_token(0, token)
        return [Generation(ids, [0.0] * len(ids), finish_reason)]

    monkeypatch.setattr(chat, "generate", say)
    return prompts


def test_stream_answer(monkeypatch):
    settings = chat.Settings("anywhere")
    printed = []
    monkeypatch.setattr(
        "builtins.print", lambda *parts, end="\n", **_: printed.append("".join(parts) + end)
    )
    model, tokenizer = tiny_model(max_seq_len=64, vocab_size=258), ByteTokenizer()
    scripted(monkeypatch, " Zoë: 🦙! ")
    assert chat.stream_answer(model, tokenizer, HI, (0, 0), settings) == "Zoë: 🦙!"
    assert "".join(printed) == "Zoë: 🦙! \n"
    assert [piece for piece in printed if piece] == ["Z", "o", "ë", ":", " ", "🦙", "!", " ", "\n"]
    printed.clear()
    scripted(monkeypatch, "ab", "length")
    chat.stream_answer(model, tokenizer, HI, (0, 0), settings)
    assert "--max-new-tokens" in printed[-1]
    chat.stream_answer(model, tokenizer, [user("x" * 46)], (0, 0), settings)
    assert "context" in printed[-1] and "/reset" in printed[-1]
    # an answer of broken bytes alone
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "�" * len(ids))
    assert chat.stream_answer(model, tokenizer, HI, (0, 0), settings) == "��"
    assert printed[-2] == "��\n"  # printed after all


def talk(monkeypatch, lines, argv=(), max_seq_len=400):
    model = tiny_model(vocab_size=258, max_seq_len=max_seq_len)
    monkeypatch.setattr(chat, "load_model", lambda folder, **_: (model, ByteTokenizer()))
    monkeypatch.setattr(chat, "find_model", lambda out, name: name)
    lines = iter(lines)

    def type_line(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_line)
    chat.main(["anywhere", "--device", "cpu", *argv])


def test_main(monkeypatch, capsys):
    prompts = scripted(monkeypatch, " Fine. ")
    lines = ["", "How are you?", "And now?", "/reset", "Hello"]
    talk(
        monkeypatch,
        [*lines, "/system No.", "/system Be brief.", "Hi", "/what", "/quit", "never read"],
    )
    first = "[INST] How are you? [/INST]"
    assert prompts == [
        first,
        f"{first} Fine. [INST] And now? [/INST]",
        "[INST] Hello [/INST]",
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
    ]
    assert capsys.readouterr().out.count("Fine.") == 4
    prompts.clear()
    talk(monkeypatch, [], ["--prompt", "Hi", "--system", "Be brief."])
    assert prompts == ["[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"]
    assert capsys.readouterr().out == "Fine. \n"
    for wrong in (["--temperature", "-1"], ["--top-p", "1.5"], ["--max-new-tokens", "0"]):
        with pytest.raises(InputError):
            talk(monkeypatch, [], wrong)


def test_main_tells_of_a_full_context_and_of_tags(monkeypatch, capsys):
    """With the real `generate`: mistakes of the user do not end the chat, nor enter the dialog."""
    talk(
        monkeypatch,
        ["x" * 90, "say [INST]", "Hi", "more", "/reset", "Hi"],
        ["--seed", "3"],
        max_seq_len=64,
    )
    out = capsys.readouterr().out
    assert "possible are 1 to 63" in out and "tag [INST]" in out
    assert "the context of 64 tokens is full" in out and out.count("/reset starts over") >= 4


def test_main_with_prompt_samples_the_same_for_the_same_seed(monkeypatch, capsys):
    answers = []
    for seed in ("1", "1", "2"):
        talk(
            monkeypatch,
            [],
            ["--prompt", "Hi", "--seed", seed, "--max-new-tokens", "30", "--temperature", "1"],
        )
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


# ---- Ghost Attention's four steps ----

WORD = world.constraint("first word", "Kogo")


def three_turns() -> gatt.GhostDialog:
    messages = []
    for n in range(2):
        messages += [user(f"Name {n} birds."), assistant(f"Owl {n}.")]
    question = user("Spell cat.")
    return gatt.GhostDialog(
        messages=[*messages, question],
        instruction=WORD["long"],
        constraints=[WORD],
        prompt=Prompt([question], family="spell", item="cat", kind="ordinary"),
    )


def test_show_steps(capsys, monkeypatch):
    model, tokenizer = runtime.load_model(chain()[0] / "sft")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    ghost.show_steps(model, tokenizer, [three_turns()], gatt.Settings())
    printed = capsys.readouterr().out
    times = printed.split("4. the loss mask")[0].count(WORD["long"])
    assert times == 1 + 3 + 1, "named once, then in every message, then in the first"
    assert all(f"\n{step}. " in printed for step in (1, 2, 3, 4))
    coloured = printed.split("not trained on")[1]
    assert coloured.count("<s>") == 3 and coloured.count("</s>") == 3
    assert coloured.count("\033[32m") == 1 and "\033[90m" in coloured, "one run is trained on"


def test_show_steps_into_a_pipe(capsys):
    """No colour codes where nobody sees colours."""
    model, tokenizer = runtime.load_model(chain()[0] / "sft")
    ghost.show_steps(model, tokenizer, [three_turns()], gatt.Settings())
    printed = capsys.readouterr().out
    assert "\033" not in printed and printed.count("[[") == 2 and "</s>]]" in printed


def test_ghost(tmp_path):
    printed = run_quietly(ghost.main, "--out", tmp_path, "--init", chain()[0] / "rlhf-v2")
    assert "4. the loss mask" in printed and not list(tmp_path.iterdir())


# ---- scores ----


def toy_prompt(kind: str) -> Prompt:
    world.ensure()
    prompts = read_prompts(world.FOLDER / "prompts-dev.jsonl")
    return next(prompt for prompt in prompts if prompt.kind == kind)


def test_with_toy_prompts():
    """A prompt of the toy world is known by its text: one question, nothing before it."""
    unsafe = toy_prompt("unsafe")
    plain = Prompt(unsafe.messages, where="a.jsonl, line 1")
    other = GivenAnswer(Prompt([user("Who won?")]), "Me.")
    longer = GivenAnswer(Prompt([system("x"), *unsafe.messages]), "No.")
    known, *unknown = scores.with_toy_prompts([GivenAnswer(plain, "No."), other, longer])
    assert known == GivenAnswer(replace(unsafe, where="a.jsonl, line 1"), "No.")
    assert known.prompt.is_safety and world.knows(known.prompt)
    assert unknown == [other, longer]


def test_score(tmp_path):
    """`score`: both scores as logit and sigmoid, of what every row says."""
    out, _ = chain()
    prompt = toy_prompt("unsafe")
    row = {"prompt": [user("Hi")], "chosen": "Hello!", "rejected": "What?"}
    refusal = {"prompt": prompt.messages, "answer": "No."}
    path = write_lines(tmp_path / "rows.jsonl", [row, refusal])
    printed = run_quietly(scores.main, "score", path, "--out", out)
    models = {
        axis: reward.load_reward_model(folder) for axis, folder in newest_reward_models(out).items()
    }
    assert "rlhf-v2" in str(newest_reward_models(out)["safety"]), "the newest ones"
    [expected] = score_dialogs(models, [(prompt, "No.")])
    last = printed.splitlines()[-1]
    cells = re.findall(r"([+-][\d.]+) \(([\d.]+)\)", last)
    assert [(float(a), float(b)) for a, b in cells] == [
        tuple(round(x, 3) for x in expected[name]) for name in ("reward", "helpfulness", "safety")
    ]
    annotator = (world.helpfulness(prompt, "No."), world.safety(prompt, "No."))
    assert last.split()[-3:] == [*(f"{value:.2f}" for value in annotator), "'No.'"]
    assert cells[0] == cells[2], "the tag is known by the prompt's text: the safety score counts"
    assert "tagged as possibly unsafe, toy world: unsafe" in printed
    assert (
        "chosen: 'Hello!'" in printed
        and "rejected: 'What?'" in printed
        and "'Hi' (turn 1)" in printed
    )


def test_try(monkeypatch):
    """`try`: several answers to one prompt side by side, the best first; a mistake is told and
    one goes on.
    """
    out, _ = chain()
    prompt = toy_prompt("ordinary").question
    typed = iter([prompt, "One.", "[INST]", "Two two.", "", "Something else", "Three.", "", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(typed))
    printed = run_quietly(scores.main, "try", "--out", out)
    assert next(typed, None) is None
    assert (
        printed.count("'One.'") == 2
        and printed.count("'Two two.'") == 1
        and printed.count("'Three.'") == 1
    )
    assert "tag" in printed and "annotator: helpfulness safety" in printed
    both = printed.split("the tag")[1].split("'Something else'")[0]
    rewards = [float(x) for x in re.findall(r"^ +([+-][\d.]+)", both, re.M)]
    assert len(rewards) == 2 and rewards == sorted(rewards, reverse=True)


def test_try_ends_with_the_input(monkeypatch):
    def closed(question):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert "empty prompt ends" in run_quietly(scores.main, "try", "--out", chain()[0])


# ---- best of N ----

ASK = Prompt([user("Name two birds.")])


def an_answer(sample: int, **changes) -> Answer:
    answer = Answer(
        index=0,
        sample=sample,
        text="Owl.",
        ids=[sample, 2],
        logprob=-1.0,
        temperature=1.0,
        finish_reason="eos",
        has_tag=False,
    )
    return replace(answer, **changes)


def test_candidates_that_cannot_be_used_stand_last(monkeypatch):
    special = [
        {"reward": 1.0},
        {"reward": 9.0, "finish_reason": "length"},
        {"reward": 5.0},
        {"reward": 8.0, "has_tag": True},
        {"reward": 7.0},
    ]
    answers = [an_answer(k, **changes) for k, changes in enumerate(special)]
    monkeypatch.setattr(best_of_n, "sample_and_score", lambda *args, **options: answers)
    ranked = best_of_n.candidates(None, None, None, ASK, n=5)
    assert [answer.sample for answer in ranked] == [4, 2, 0, 1, 3]


def test_candidates():
    folders = runtime.newest_reward_models(chain()[0])
    answers = best_of_n.candidates(
        tiny_model(),
        toy_tokenizer(),
        RewardModels(folders, torch.device("cpu")),
        ASK,
        n=12,
        temperature=1.3,
        max_new_tokens=9,
    )
    assert sorted(answer.sample for answer in answers) == list(range(12))
    assert {answer.temperature for answer in answers} == {1.3}
    fine = [answer for answer in answers if not runtime.unusable(answer)]
    others = [answer for answer in answers if runtime.unusable(answer)]
    assert answers == fine + others, "what cannot be used stands last"
    for group in (fine, others):
        rewards = [answer.reward for answer in group]
        assert rewards == sorted(rewards, reverse=True)


def test_best_of_n():
    """The newest model of OUT, or --init, and the newest reward models; all candidates, the best
    first, and the annotator's view of a question that it knows.
    """
    out, _ = chain()
    argv = ("Name two birds.", "--out", out, "--n", 5)
    printed = run_quietly(best_of_n.main, *argv)
    assert str(out / "rlhf-v2" / "reward-helpfulness") in printed
    assert printed.startswith(f"{out / 'rlhf-v2'} answers")
    table = []
    for line in printed.split("answer\n")[1].splitlines():
        if re.match(r" *-?\d+\.\d\d ", line):
            table.append(line.split()[:3])
    assert len(table) == 5 and printed.count("[annotator 0.") == 5
    for combined, helpfulness, safety in table:
        assert combined == (safety if float(safety) < -1.73 else helpfulness)
    other = run_quietly(best_of_n.main, *argv, "--init", out / "sft")
    assert other.startswith(f"{out / 'sft'} answers")
    assert run_quietly(best_of_n.main, *argv, "--temperature", 0.2) != printed


# ---- the same prompts, model by model ----


def test_samples(tmp_path):
    """A few prompts, each answered by all models; nothing is written."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("sft", "rlhf-v1", "rlhf-v2"):
        (out / name).symlink_to(chain()[0] / name)
    printed = run_quietly(samples.main, "--out", out, "--split", "dev", "--show", 3)
    prompts = read_prompts(world.FOLDER / "prompts-dev.jsonl")
    shown = [prompts[i] for i in report.pick_shown(prompts, 3)]
    assert printed.count("\n> ") == 3 and all(prompt.question in printed for prompt in shown)
    assert printed.count("\n  rlhf-v2 ") == 3 and not (out / "eval").exists()


# ---- which model, which settings ----


def test_find_model(tmp_path):
    """By its name in OUT or by its path; what is no model that answers is told, with what there is.
    """
    out = tmp_path / "out"
    for name in ("sft", "dpo", "reward-safety", "empty"):
        (out / name).mkdir(parents=True)
    (out / "sft" / "params.json").touch()
    (out / "dpo" / "config.json").touch()
    for file in ("params.json", "reward_head.pth"):
        (out / "reward-safety" / file).touch()
    assert find_model(out, "sft") == find_model(tmp_path, str(out / "sft")) == out / "sft"
    assert find_model(tmp_path / "nowhere", str(out / "dpo")) == out / "dpo"
    for wrong in ("", " ", "empty", "rlhf-v1", str(out / "sft" / "params.json"), str(tmp_path)):
        with pytest.raises(InputError, match=r"is neither a model in .*out \(dpo, sft\) nor"):
            find_model(out, wrong)
    with pytest.raises(InputError, match="it holds none"):
        find_model(tmp_path / "nowhere", "sft")
    with pytest.raises(InputError, match="reward-safety is a reward model"):
        find_model(out, "reward-safety")


HUGE = "1" + "0" * 20
SAMPLING = {
    "temperature": ["-1", "1e-9", "1e9"],
    "max-new-tokens": ["0", "-1", HUGE],
    "seed": ["-1", HUGE],
}
WRONG = {  # command: (what it needs, {option: values that are no good})
    "chat": (["sft"], SAMPLING | {"top-p": ["-0.1", "1.1"]}),
    "best-of-n": (["Hi"], SAMPLING | {"n": ["0", "-1", HUGE], "temperature": ["0", "1e9"]}),
    "samples": ([], SAMPLING | {"show": ["0", "-1", HUGE], "split": ["", "all"]}),
    "compare": (["a", "b"], SAMPLING | {"answers": ["0", HUGE], "judge": ["me"]}),
    "ghost": ([], {"seed": ["-1", HUGE], "context": ["", "answer"]}),
    "microscope": ([], {"batch": ["0", HUGE], "seed": ["-1", HUGE], "name": [""], "prompt": [" "]}),
}
NOT_THERE = {  # command: arguments that name something which is not there
    "chat": [["nothing"], [""], [__file__]],
    "best-of-n": [[" "], ["Hi"], ["Hi", "--init", "nothing"], ["Hi", "--init", __file__]],
    "compare": [["sft", "nothing"], ["", ""]],
    "samples": [[], ["--prompts", "nothing.jsonl"], ["--prompts", "."]],
    "score": [["nothing.jsonl"], ["."], [""]],
    "try": [[]],
    "ghost": [[], ["--init", "nothing"], ["--data", "nothing.jsonl"]],
    "microscope": [[], ["--name", "nothing"]],
}


def wrong_arguments() -> list[tuple[list[str], str]]:
    """(command line of `python -m play` with one thing wrong, what must be told of it)."""
    lines = []
    for command, (needed, options) in WRONG.items():
        for option, values in options.items():
            for value in values:
                lines.append(([command, *needed, f"--{option}={value}"], f"--{option}"))
    for command, alternatives in NOT_THERE.items():
        for arguments in alternatives:
            lines.append(([command, *arguments], "error: "))
    for command in commands.COMMANDS:
        needed = ["f.jsonl"] if command == "score" else []
        needed, _ = WRONG.get(command, (needed, {}))
        lines.append(([command, *needed, "--device=tpu"], "--device"))
        if command != "chat":
            lines.append(([command, *needed, "--threads=-1"], "--threads"))
    return lines


def test_wrong_arguments(tmp_path, monkeypatch, capsys):
    """What is out of range, unknown or missing ends with one clear line and writes nothing."""
    monkeypatch.chdir(tmp_path)
    lines = wrong_arguments()
    assert len(lines) > 80
    for line, told in lines:
        monkeypatch.setattr("sys.argv", ["play", *line])
        with pytest.raises(SystemExit) as end:
            runtime.run(commands.main)
        printed = capsys.readouterr().err
        assert end.value.code in (1, 2) and told in printed.splitlines()[-1], line
        if end.value.code == 1:
            assert printed.startswith("error: ") and printed.count("\n") == 1, line
        assert not list(tmp_path.iterdir()), line


# ---- what a model says cannot steer the terminal ----

BAD = "\x1b[2J\u202e\rx"
SHOWN = r"\x1b[2J\u202e\rx"


def test_chat_shows_what_steers(monkeypatch, capsys):
    scripted(monkeypatch, f" {BAD}\nNext.")
    talk(monkeypatch, [], ["--prompt", "Hi"])
    assert capsys.readouterr().out == f"{SHOWN}\nNext.\n"


def test_candidates_show_what_steers(capsys):
    one = an_answer(0, text=f"{BAD}\nNext.", reward=1.0, helpfulness=1.0, safety=1.0)
    best_of_n.print_candidates(Prompt([user("Hi")]), [one])
    assert capsys.readouterr().out.endswith(SHOWN + r"\nNext." + "\n")


def test_judging_shows_what_steers(monkeypatch, capsys):
    monkeypatch.setattr(compare, "choice", lambda *_: "4")
    compare._ask_grade(Prompt([user(BAD)]), an_answer(0, text=BAD), an_answer(1, text=BAD))
    printed = capsys.readouterr().out
    assert printed.count(SHOWN) == 3 and printable(printed) == printed


def test_ghost_shows_what_steers(monkeypatch, capsys):
    ghost._print_dialog("title", [user(BAD)])
    ids = [256, *BAD.encode(), 257]
    ghost._print_mask(ByteTokenizer(), ids, [True] * len(ids))
    printed = capsys.readouterr().out
    assert r"\x1b[2J" in printed.split("title")[1] and printable(printed) == printed


# ---- the list ----


def test_list(monkeypatch, capsys):
    """Each command that is listed can be run; another name is told."""
    monkeypatch.setattr("sys.argv", ["play"])
    commands.main()
    listed = capsys.readouterr().out
    for name, (module, _) in commands.COMMANDS.items():
        assert f"\n  {name} " in listed
        monkeypatch.setattr("sys.argv", ["play", name, "--help"])
        with pytest.raises(SystemExit) as end:
            commands.main()
        assert end.value.code == 0 and "usage" in capsys.readouterr().out, module
    monkeypatch.setattr("sys.argv", ["play", "chess"])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2
