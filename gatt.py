"""Ghost Attention (paper §3.3, A.3.5): an instruction given once holds for the whole dialog.

The paper, in four steps: (1) take dialogs and draw an instruction that must hold throughout; (2) put it into *every* user
message and sample answers with the newest RLHF model; (3) for training leave it in the first message only, and (4) set the
loss to zero on all tokens of earlier turns, answers included, since those need not fit the instruction. Applied after V3.
Ours, where the paper is silent: the earlier answers are the model's own, half of them given under the instruction and half
not, so that the model has to look at the instruction and cannot just go on as before. By default answers are sampled with
their own question alone as context: that is enough for the toy world's, costs little, and a model whose rounds saw single
questions obeys better so (--context dialog is the paper's way, and what real dialogs need). Answers are kept where a check
or the reward models prefer them. Every step also sees ordinary answers of the policy itself (replay), so that nothing else
is lost.

    python gatt.py                         OUT/gatt from OUT/rlhf-v3; dialogs.jsonl in it goes into V4 with --mix
    python gatt.py --show                  one dialog going through the four steps
    python gatt.py --init MODEL --data DIALOGS.jsonl --constraints CONSTRAINTS.jsonl --check reward --context dialog
"""

import random
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from data import InputError, Tokenizer, has_tag, read_jsonl, read_sft, toy, write_jsonl
from data.chat import encode_dialog, encode_prompt, encode_turn
from data.jsonl import need
from eval import PROBED, adherence, adherence_by_turn, ask_about, evaluate_on_dev
from model import Transformer
from rejection_sampling import Judges, best_of
from runtime import (
    check_positive,
    choose_device,
    choose_dtype,
    finish_stage,
    kept_settings,
    load_model,
    newest_reward_models,
    open_stage,
    parse_settings,
    require,
    run,
    sample_answers,
    save_model,
    set_seed,
    set_threads,
    unusable,
)
from sft import encode_rows, finetune, show_answers


@dataclass
class Settings:
    preset: str = "toy"  # sizes and hyper-parameters; see below
    out: Path = Path("out")  # results go to OUT/gatt
    init: str = ""  # the model to start from, which also answers; empty: OUT/rlhf-v3, as in the paper
    data: str = "toy"  # JSONL of dialogs {"messages"}, or toy
    constraints: str = "toy"  # JSONL of {"kind", "value", "long", "short"}, or toy: the toy world's training constraints
    check: Literal["toy", "reward", "none"] = "toy"  # what chooses among the answers: exact markers, reward models, nothing
    dialogs: int = 2400  # our choice; with --data at most so many
    turns: int = 24  # the longest dialog, some beyond the 20 turns that are measured: the ends are rare (see `toy_dialogs`)
    short: float = 0.5  # chance of a constraint's short form in training (paper: half of the time); sampling sees the long one
    context: Literal["question", "dialog"] = "question"  # what a last answer is sampled from: its question alone, or all
    samples: int = 8  # answers to a dialog's last question, of which one is kept; our choice
    max_new_tokens: int = 96  # longest answer; one that gets there has no end to learn from and is left out
    temperature: float = 0.7  # of these and of all other answers; our choice (1 cost some helpfulness)
    resampled: float = 0.5  # share of the earlier answers that are sampled under the instruction; our choice
    replay: int = 2400  # ordinary answers of the policy trained on beside the dialogs; our choice
    epochs: int = 2  # our choice
    batch_tokens: int = 1500  # tokens a step
    micro_tokens: int = 16384  # tokens a forward pass
    learning_rate: float = 5e-4  # our choice
    weight_decay: float = 0.1  # paper, of SFT
    seed: int = 0  # of dialogs, sampling and order
    show: bool = False  # print one dialog going through the four steps, and stop
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16 for the products
    threads: int = 0  # CPU threads; 0: torch decides
    fresh: bool = False  # start over: delete what is in OUT/gatt


PAPER = dict(data="", constraints="", check="reward", context="dialog", dialogs=10000, max_new_tokens=1024,
             batch_tokens=64 * 4096, micro_tokens=4096, learning_rate=2e-5)
PRESETS = {
    "tiny": dict(check="none", dialogs=40, turns=4, replay=60), "toy": {},
    "small": dict(learning_rate=2e-4, batch_tokens=16384),
    "llama-2-7b": PAPER, "llama-2-13b": PAPER, "llama-2-70b": PAPER,
}


# ---- the four steps ----

def sample_constraints(rng: random.Random, pool: list[dict] | None = None) -> list[dict]:
    """A random combination of constraints: one, or (half of the time) two of different kinds; each kind as often.

    pool: constraints {"kind", "value", "long", "short"}; None: the toy world's training constraints.
    """
    pool = pool or toy_constraints()
    kinds = sorted({constraint["kind"] for constraint in pool})
    picked = rng.sample(kinds, min(len(kinds), 1 + (rng.random() < 0.5)))
    return [rng.choice([constraint for constraint in pool if constraint["kind"] == kind]) for kind in picked]


@cache
def toy_constraints() -> tuple[dict, ...]:
    """The toy world's training constraints, the few famous names so often that half of the figures are such."""
    famous = [toy.constraint("figure", name) for name in toy.words.FIGURES]
    made_up = len(toy.made_up_words("train"))
    return (*toy.constraints("train"), *famous * (made_up // len(famous) - 1))


def instruct(messages: list[dict], instruction: str, turns: Literal["every", "first"] = "every") -> list[dict]:
    """The dialog with the instruction in front of every user message, or of the first alone (steps 2 and 3).

    >>> [m["content"] for m in instruct([{"role": "user", "content": "Hi."}], "Figure: Napoleon.")]
    ['Figure: Napoleon. Hi.']
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    marked = set(users if turns == "every" else users[:1])
    return [message | {"content": f"{instruction} {message['content']}"} if i in marked else message
            for i, message in enumerate(messages)]


def ghost_dialogs(dialogs: list[dict], answers: dict[int, dict]) -> list[dict]:
    """SFT rows of the dialogs whose last answer was kept: the instruction in the first message, loss on the last answer.

    Args:
        dialogs: {"messages": ending with the user, without the instruction, "instruction", "constraints", "is_safety",
            "prompt"?: what the toy world's annotator has to know of the last question}.
        answers: dialog's number -> the answer kept, {"answer", "answer_ids", "tokenizer": fingerprint of that of the ids}.
    """
    rows = []
    for i in sorted(answers):
        messages = instruct(dialogs[i]["messages"], dialogs[i]["instruction"], "first")
        rows.append({"messages": [*messages, {"role": "assistant", "content": answers[i]["answer"]}], "train_on": "last",
                     **{name: answers[i][name] for name in ("answer_ids", "tokenizer")},
                     **{name: dialogs[i][name] for name in ("is_safety", "instruction", "constraints")},
                     **{name: dialogs[i]["prompt"][name] for name in ("family", "item", "kind") if "prompt" in dialogs[i]}})
    return rows


def ghost_loss_mask(turns: list[int], loss_mask: list[bool]) -> list[bool]:
    """Step 4: no loss on any token of an earlier turn. `encode_dialog(..., train_on="last")` gives the same.

    Args:
        turns: the turn that each token belongs to. loss_mask: true on the tokens of all answers.

    >>> ghost_loss_mask([0, 0, 1, 1], [False, True, False, True])
    [False, False, False, True]
    """
    return [answer and turn == max(turns) for turn, answer in zip(turns, loss_mask, strict=True)]


# ---- dialogs and answers ----

def toy_dialogs(s: Settings, ordinary: list[dict]) -> list[dict]:
    """Dialogs of 1 to s.turns turns: earlier turns are ordinary questions with the policy's answers, the last is open.

    Our choices: a length is 1 + turns·u², u even in [0, 1): half of the dialogs have at most a quarter of the turns. Where a
    name or a hobby holds, three of four last questions ask for it, else it would not show.
    """
    dialogs = []
    for i in range(s.dialogs):
        rng = random.Random(f"gatt {s.seed} {i}")
        found = sample_constraints(rng)
        messages = [message for _ in range(int(s.turns * rng.random() ** 2)) for message in rng.choice(ordinary)["messages"]]
        hidden = [c for c in found if c["kind"] in PROBED]
        last = ask_about(rng, "train", rng.choice(hidden) if hidden and rng.random() < 0.75 else None)
        dialogs.append({"messages": messages + last["prompt"], "instruction": toy.instruction(rng, found, s.short),
                        "constraints": found, "is_safety": last["is_safety"], "prompt": toy.under(last, found)})
    return dialogs


def read_dialogs(s: Settings) -> list[dict]:
    """Dialogs from --data, each cut behind a random user message, with constraints from --constraints."""
    pool = [row | {"where": where} for where, row in read_jsonl(s.constraints)] if s.constraints != "toy" else None
    for row in pool or []:
        for field in ("kind", "value", "long", "short"):
            if has_tag(need(row["where"], row, field, str)) or not row[field].strip():
                raise InputError(f"{row['where']}: field '{field}' is {row[field]!r}, wanted: some text and no tag of the format")
    dialogs = []
    for i, row in enumerate(read_sft(s.data)[: s.dialogs]):
        rng = random.Random(f"gatt {s.seed} {i}")
        users = [n for n, message in enumerate(row["messages"]) if message["role"] == "user"][: s.turns]
        found = sample_constraints(rng, pool)
        messages = row["messages"][: rng.choice(users) + 1]
        dialogs.append({"messages": messages, "instruction": toy.instruction(rng, found, s.short), "constraints": found,
                        "is_safety": row.get("is_safety", False), "where": row["where"]})
    return dialogs


def leave_out_long(tokenizer: Tokenizer, dialogs: list[dict], s: Settings, max_seq_len: int) -> list[dict]:
    """The dialogs that leave room for an answer where they are answered and where they are trained on; the others are counted.

    Raises:
        InputError: a tag of the chat format inside content (names file and line), or no dialog is short enough.
    """
    found = []
    for dialog in dialogs:
        trained_on = instruct(dialog["messages"], dialog["instruction"], "first")
        in_full_too = instruct(dialog["messages"], in_full(dialog), "every" if s.context == "dialog" else "first")
        try:  # no prompt that is sampled from is longer than the second one
            length = max(len(encode_prompt(tokenizer, messages)) for messages in (trained_on, in_full_too))
        except InputError as error:
            raise InputError(f"{dialog.get('where', 'dialog')}: {error}") from None
        found += [dialog] * (length + s.max_new_tokens <= max_seq_len)
    if not found:
        raise InputError(f"no dialog leaves room for an answer in the model's context of {max_seq_len} tokens; lower --turns "
                         "or --max-new-tokens")
    if len(found) < len(dialogs):
        print(f"{len(dialogs) - len(found)} dialogs are left out: too long for the model's context of {max_seq_len} tokens")
    return found


def obeys_exactly(prompt: dict, answer: str, found: list[dict]) -> bool:
    """The toy world's check: the markers stand at the very start and end, and a name or hobby that is asked for is there.

    It filters what is trained on; `eval.adherence` measures by `toy.obeys` (the same names and hobbies, markers up to 16
    characters away) on other questions, but for those about names and hobbies: they are the same few wordings in each split.
    """
    start, end = toy.markers(found)
    asked = [c for c in found if PROBED.get(c["kind"]) == prompt["family"]]
    return answer.startswith(start) and answer.endswith(end) and all(toy.obeys(prompt, answer, c) for c in asked)


def is_stable(tokenizer: Tokenizer, question: str, row: dict) -> bool:
    """Whether a sampled answer can stand in a dialog: usable, and its text is encoded to the ids that were sampled."""
    return not unusable(row) and encode_turn(tokenizer, question, row["answer"])[1] == row["answer_ids"]


def sample_ordinary(model: Transformer, tokenizer: Tokenizer, prompts: list[dict], s: Settings,
                    path: Path | None = None) -> list[dict]:
    """The policy's own answers to prompts without instruction, as SFT rows."""
    rows = sample_answers(model, tokenizer, prompts, key=(s.seed, "gatt", "ordinary"), temperature=s.temperature,
                          max_new_tokens=s.max_new_tokens, path=path, desc="ordinary answers")
    found = [{"messages": [*prompts[row["index"]]["prompt"], {"role": "assistant", "content": row["answer"]}],
              "train_on": "last", "is_safety": prompts[row["index"]]["is_safety"], "answer_ids": row["answer_ids"],
              "tokenizer": tokenizer.fingerprint}
             for row in rows if is_stable(tokenizer, prompts[row["index"]]["prompt"][-1]["content"], row)]
    if not found:
        raise InputError("none of the model's answers to ordinary questions ends and can stand in a dialog")
    return found


def in_full(dialog: dict) -> str:
    """The dialog's instruction with nothing shortened: what answers are sampled under, since it is obeyed more often."""
    return " ".join(constraint["long"] for constraint in dialog["constraints"])


def resample_earlier(model: Transformer, tokenizer: Tokenizer, dialogs: list[dict], s: Settings, folder: Path) -> None:
    """Exchange a share of the earlier answers for answers under the instruction, all sampled from the dialogs as they came."""
    rng = random.Random(f"gatt resampled {s.seed}")
    places = [(dialog, n) for dialog in dialogs for n, message in enumerate(dialog["messages"])
              if message["role"] == "assistant" and rng.random() < s.resampled]
    prompts = [sampling_prompt(dialog, s.context, n) for dialog, n in places]
    rows = sample_answers(model, tokenizer, prompts, key=(s.seed, "gatt", "earlier"), temperature=s.temperature,
                          max_new_tokens=s.max_new_tokens, path=folder / "answers-earlier.jsonl", desc="earlier answers")
    for (dialog, n), prompt, row in zip(places, prompts, rows, strict=True):
        if is_stable(tokenizer, prompt["prompt"][-1]["content"], row):
            dialog["messages"][n] = {"role": "assistant", "content": row["answer"]}


def sampling_prompt(dialog: dict, context: str, end: int | None = None) -> dict:
    """What the answer behind message `end` - 1 (default: the last) is sampled from: the dialog up to there, or that question
    alone, with the instruction in each user message (step 2)."""
    messages = dialog["messages"][:end] if context == "dialog" else dialog["messages"][:end][-1:]
    return {"prompt": instruct(messages, in_full(dialog)), "is_safety": dialog["is_safety"]}


def keep_answers(dialogs: list[dict], rows: list[dict], check: str, judges: Judges | None = None,
                 prompts: list[dict] | None = None) -> dict[int, dict]:
    """Dialog's number -> the answer kept: of those that pass the check (which only "toy" makes) the one with the highest reward,
    without judges the first.

    rows: sampled answers, `index` being the dialog's number. judges: score them behind `prompts`.
    """
    rows = [row for row in rows if not unusable(row)]
    if check == "toy":
        rows = [row for row in rows if obeys_exactly(dialogs[row["index"]]["prompt"], row["answer"],
                                                     dialogs[row["index"]]["constraints"])]
    rewards = torch.zeros(len(rows))
    if judges:
        rewards = judges.rewards(prompts, rows)
    return {i: rows[n] for i, n in best_of(rewards, [row["index"] for row in rows]).items()}


def show_steps(model: Transformer, tokenizer: Tokenizer, dialogs: list[dict], s: Settings) -> None:
    """Print one dialog going through the four steps; green is trained on, grey is not."""
    dialog = next((d for d in dialogs if 3 <= len(d["messages"]) <= 7), dialogs[0])

    def show(title: str, messages: list[dict]) -> None:
        print(f"\n{title}")
        for message in messages:
            print(f"  {message['role']:>9}: {message['content']}")

    show(f"1. a dialog, and an instruction that must hold throughout: {dialog['instruction']!r}", dialog["messages"])
    every = instruct(dialog["messages"], in_full(dialog))
    [row] = sample_answers(model, tokenizer, [sampling_prompt(dialog, s.context)], key=(0, "gatt", "show"), temperature=0.0,
                           max_new_tokens=s.max_new_tokens)
    answer = {"role": "assistant", "content": row["answer"]}
    alone = ", seeing no other" if s.context == "question" else ""
    show(f"2. the instruction in every user message; the newest model answers the last one{alone}", [*every, answer])
    [ghost] = ghost_dialogs([dialog], {0: row | {"tokenizer": tokenizer.fingerprint}})
    show("3. for training the instruction stays in the first message only", ghost["messages"])
    encoded = encode_dialog(tokenizer, ghost["messages"], "all", ghost["answer_ids"])
    print("\n4. the loss mask: \033[32mtrained on\033[0m, \033[90mnot trained on\033[0m")
    for token, counts in zip(encoded.ids, ghost_loss_mask(encoded.turns, encoded.loss_mask), strict=True):
        names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
        print(f"\033[{32 if counts else 90}m{names.get(token, tokenizer.decode([token]))}\033[0m", end="")
    print()


def main(argv: list[str] | None = None) -> None:
    s = parse_settings(Settings, __doc__, PRESETS, argv)
    check_positive(s, "dialogs", "turns", "samples", "max_new_tokens", "temperature", "epochs", "batch_tokens", "micro_tokens",
                   "learning_rate", or_zero=("weight_decay", "replay"))
    if not 0 <= s.short <= 1 or not 0 <= s.resampled <= 1:
        raise InputError(f"wanted: --short and --resampled from 0 to 1 (are {s.short}, {s.resampled})")
    if not s.data or not s.constraints:
        raise InputError(f"--preset {s.preset} needs dialogs and constraints: --data FILE.jsonl --constraints FILE.jsonl")
    if s.data == "toy" and s.constraints != "toy":
        raise InputError(f"--constraints {s.constraints} needs dialogs of your own: --data FILE.jsonl")
    if s.check == "toy" and s.data != "toy":
        raise InputError("--check toy knows the toy world's dialogs and constraints only; use --check reward or none")
    set_threads(s.threads)
    set_seed(s.seed)
    device, folder = choose_device(s.device), s.out / "gatt"
    dtype = choose_dtype(s.dtype, device)
    start = Path(s.init) if s.init else require(s.out / "rlhf-v3", "python rejection_sampling.py --rounds 1-3")
    inputs = {"model": start} | {name: Path(getattr(s, name)) for name in ("data", "constraints") if getattr(s, name) != "toy"}
    judged_by = newest_reward_models(s.out, [s.out / f"rlhf-v{v}" for v in (1, 2, 3)]) if s.check == "reward" else {}
    inputs |= {f"reward-{axis}": path for axis, path in judged_by.items()}
    toy.ensure()
    model, tokenizer = load_model(start, device)
    if s.show:
        ordinary = sample_ordinary(model, tokenizer, [toy.ask(random.Random(i)) for i in range(40)], s)
        dialogs = read_dialogs(s) if s.data != "toy" else toy_dialogs(s, ordinary)
        show_steps(model, tokenizer, leave_out_long(tokenizer, dialogs, s, model.args.max_seq_len), s)
        return
    given = leave_out_long(tokenizer, read_dialogs(s), s, model.args.max_seq_len) if s.data != "toy" else []
    started = open_stage(folder, kept_settings(s, "init", "data", "constraints", "show"), inputs, s.fresh)
    if not started:
        return
    judges = Judges(judged_by, device) if s.check == "reward" else None

    # 1. dialogs, each with an instruction; the policy's ordinary answers
    rng = random.Random(f"gatt ordinary {s.seed}")
    if s.data == "toy":
        ordinary = sample_ordinary(model, tokenizer, [toy.ask(rng) for _ in range(max(s.replay, 50))], s,
                                   folder / "answers-ordinary.jsonl")
        dialogs = leave_out_long(tokenizer, toy_dialogs(s, ordinary), s, model.args.max_seq_len)
    else:
        dialogs, prompts = given, [{"prompt": dialog["messages"], "is_safety": dialog["is_safety"]} for dialog in given]
        ordinary = sample_ordinary(model, tokenizer, prompts[: max(s.replay, 50)], s, folder / "answers-ordinary.jsonl")

    # 2. the instruction in every user message: sample answers
    resample_earlier(model, tokenizer, dialogs, s, folder)
    dialogs = leave_out_long(tokenizer, dialogs, s, model.args.max_seq_len)  # exchanged answers may be longer
    prompts = [sampling_prompt(dialog, s.context) for dialog in dialogs]
    rows = sample_answers(model, tokenizer, prompts, key=(s.seed, "gatt"), samples=s.samples, temperature=s.temperature,
                          max_new_tokens=s.max_new_tokens, path=folder / "answers-last.jsonl", desc="last answers",
                          finish=lambda batch: [row.update(tokenizer=tokenizer.fingerprint) for row in batch])
    sampled = time.time() - started[0]

    # 3. keep what the check or the reward prefers; the instruction in the first message only
    kept = keep_answers(dialogs, rows, s.check, judges, prompts)
    ghosts = ghost_dialogs(dialogs, kept)
    if not ghosts:
        raise InputError(f"{folder}: no answer passed the check; sample more, or use --check none")
    replay = ordinary[: s.replay]
    write_jsonl(folder / "dialogs.jsonl", ghosts)
    write_jsonl(folder / "replay.jsonl", replay)
    print(f"{len(kept)} of {len(dialogs)} dialogs have an answer that the check keeps; replay: {len(replay)} "
          f"answers ({sampled:.0f} s)")

    # 4. fine-tune, the loss on the last turn only
    training = encode_rows(tokenizer, ghosts + replay, model.args.max_seq_len)
    finetune(model, training, epochs=s.epochs, batch_tokens=s.batch_tokens, micro_tokens=s.micro_tokens,
             learning_rate=s.learning_rate, weight_decay=s.weight_decay, folder=folder, phase="gatt", seed=s.seed,
             dtype=dtype)
    save_model(folder, model, tokenizer)
    show_answers(model, tokenizer, [row["messages"][:-1] for row in ghosts[:5]], "last answers of five dialogs")

    # 5. measure
    results = {"kept": len(kept) / len(dialogs), "seconds_sampling": sampled}
    if s.data == "toy":
        results["dev"] = evaluate_on_dev("gatt", model, tokenizer)
        lasting = [sample_constraints(random.Random(f"adherence {i}")) for i in range(32)]
        rows = adherence(model, tokenizer, lasting, turns=min(s.turns, 20), split="dev", batch_rows=32)
        results["adherence"] = {turn: share.mean for turn, share in adherence_by_turn(rows).items()}
        print("answers that obey an instruction of turn 1:", ", ".join(
            f"turn {turn} {share:.2f}" for turn, share in results["adherence"].items() if turn in ("1", "2", "4", "10", "20")))
    finish_stage(folder, results, started)
    print(f"V4: python rejection_sampling.py --rounds 4 --mix {folder / 'dialogs.jsonl'} --batch-tokens 1500")


if __name__ == "__main__":
    run(main)
