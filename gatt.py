"""Ghost Attention (paper §3.3, A.3.5): an instruction given once holds for the whole dialog.

The paper, in four steps:

1. take dialogs and draw an instruction that must hold throughout;
2. put it into *every* user message and sample answers with the newest RLHF model;
3. for training leave it in the first message only;
4. set the loss to zero on all tokens of earlier turns, answers included, since those need not fit
   the instruction.

It is applied after V3.

Ours, where the paper is silent:

- The earlier answers are the model's own. Half of them are given under the instruction and half
  not, so that the model has to look at the instruction and cannot just go on as before.
- By default answers are sampled with their own question alone as context. That is enough for the
  toy world's, costs little, and a model whose rounds saw single questions obeys better so.
  (--context dialog is the paper's way, and what real dialogs need.)
- Answers are kept where a check or the reward models prefer them.
- Every step also sees ordinary answers of the policy itself (replay), so that nothing else is lost.

    python gatt.py          OUT/gatt from OUT/rlhf-v3; dialogs.jsonl in it goes into V4 with --mix
    python gatt.py --show   one dialog going through the four steps
    python gatt.py --init MODEL --data DIALOGS.jsonl --constraints CONSTRAINTS.jsonl \\
        --check reward --context dialog
"""

import random
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from data import InputError, Tokenizer, has_tag, read_jsonl, read_sft, world, write_jsonl
from data.chat import Dialog, encode_dialog, encode_prompt, encode_turn
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
    # the model to start from, which also answers; empty: OUT/rlhf-v3, as in the paper
    init: str = ""
    data: str = "toy"  # JSONL of dialogs {"messages"}, or toy
    # JSONL of {"kind", "value", "long", "short"}, or toy: the toy world's training constraints
    constraints: str = "toy"
    # what chooses among the answers: exact markers, reward models, nothing
    check: Literal["toy", "reward", "none"] = "toy"
    dialogs: int = 2400  # our choice; with --data at most so many
    # the longest dialog, some beyond the 20 turns that are measured: the ends are rare
    # (see `toy_dialogs`)
    turns: int = 24
    # chance of a constraint's short form in training (paper: half of the time); sampling sees the
    # long one
    short: float = 0.5
    # what a last answer is sampled from: its question alone, or all
    context: Literal["question", "dialog"] = "question"
    samples: int = 8  # answers to a dialog's last question, of which one is kept; our choice
    # longest answer; one that gets there has no end to learn from and is left out
    max_new_tokens: int = 96
    # of these and of all other answers; our choice (1 cost some helpfulness)
    temperature: float = 0.7
    # share of the earlier answers that are sampled under the instruction; our choice
    resampled: float = 0.5
    # ordinary answers of the policy trained on beside the dialogs; our choice
    replay: int = 2400
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


PAPER = dict(
    data="",
    constraints="",
    check="reward",
    context="dialog",
    dialogs=10000,
    max_new_tokens=1024,
    batch_tokens=64 * 4096,
    micro_tokens=4096,
    learning_rate=2e-5,
)
PRESETS = {
    "tiny": dict(check="none", dialogs=40, turns=4, replay=60),
    "toy": {},
    "small": dict(learning_rate=2e-4, batch_tokens=16384),
    "llama-2-7b": PAPER,
    "llama-2-13b": PAPER,
    "llama-2-70b": PAPER,
}


def _check_settings(s: Settings) -> None:
    """InputError, naming the options, where the settings cannot go together."""
    check_positive(
        s,
        "dialogs",
        "turns",
        "samples",
        "max_new_tokens",
        "temperature",
        "epochs",
        "batch_tokens",
        "micro_tokens",
        "learning_rate",
        or_zero=("weight_decay", "replay"),
    )
    if not 0 <= s.short <= 1 or not 0 <= s.resampled <= 1:
        values = f"{s.short}, {s.resampled}"
        raise InputError(f"wanted: --short and --resampled from 0 to 1 (are {values})")
    if not s.data or not s.constraints:
        files = "--data FILE.jsonl --constraints FILE.jsonl"
        raise InputError(f"--preset {s.preset} needs dialogs and constraints: {files}")
    if s.data == "toy" and s.constraints != "toy":
        wanted = "dialogs of your own: --data FILE.jsonl"
        raise InputError(f"--constraints {s.constraints} needs {wanted}")
    if s.check == "toy" and s.data != "toy":
        known = "the toy world's dialogs and constraints only"
        raise InputError(f"--check toy knows {known}; use --check reward or none")


# ---- the four steps ----


def sample_constraints(rng: random.Random, pool: list[dict] | None = None) -> list[dict]:
    """A random combination of constraints (step 1).

    One, or (half of the time) two of different kinds; each kind comes as often.

    pool: constraints {"kind", "value", "long", "short"}; None: the toy world's, of training.
    """
    pool = pool or toy_constraints()
    kinds = sorted({constraint["kind"] for constraint in pool})
    wanted = 2 if rng.random() < 0.5 else 1
    picked = rng.sample(kinds, min(len(kinds), wanted))
    constraints = []
    for kind in picked:
        of_this_kind = [constraint for constraint in pool if constraint["kind"] == kind]
        constraints.append(rng.choice(of_this_kind))
    return constraints


@cache
def toy_constraints() -> tuple[dict, ...]:
    """The toy world's training constraints.

    The few famous names stand among them so often that half of the figures are such.
    """
    famous = [world.constraint("figure", name) for name in world.words.FIGURES]
    made_up = len(world.made_up_words("train"))
    copies = made_up // len(famous) - 1  # one more is in the training constraints already
    return (*world.constraints("train"), *famous * copies)


def instruct(
    messages: list[dict],
    instruction: str,
    turns: Literal["every", "first"] = "every",
) -> list[dict]:
    """The dialog with the instruction in front of user messages: of all, or of the first alone.

    "every" is step 2, "first" is step 3. The messages given stay as they are.

    >>> [m["content"] for m in instruct([{"role": "user", "content": "Hi."}], "Figure: Napoleon.")]
    ['Figure: Napoleon. Hi.']
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    marked = users if turns == "every" else users[:1]
    instructed = list(messages)
    for i in marked:
        content = f"{instruction} {messages[i]['content']}"
        instructed[i] = messages[i] | {"content": content}
    return instructed


def ghost_dialogs(dialogs: list[dict], answers: dict[int, dict]) -> list[dict]:
    """SFT rows of the dialogs whose last answer was kept (step 3).

    The instruction stands in the first message, and the loss is on the last answer.

    Args:
        dialogs: {"messages": ending with the user, without the instruction, "instruction",
            "constraints", "is_safety", "prompt"?: what the toy world's annotator has to know of the
            last question}.
        answers: dialog's number -> the answer kept, {"answer", "answer_ids", "tokenizer":
            fingerprint of that of the ids}.

    Returns:
        rows in the order of the dialogs, {"messages", "train_on": "last", "answer_ids",
        "tokenizer", "is_safety", "instruction", "constraints"}, and with a prompt its "family",
        "item" and "kind".
    """
    rows = []
    for i in sorted(answers):
        dialog = dialogs[i]
        answer = answers[i]
        messages = instruct(dialog["messages"], dialog["instruction"], "first")
        messages.append({"role": "assistant", "content": answer["answer"]})
        row = {"messages": messages, "train_on": "last"}
        for name in ("answer_ids", "tokenizer"):
            row[name] = answer[name]
        for name in ("is_safety", "instruction", "constraints"):
            row[name] = dialog[name]
        if "prompt" in dialog:
            for name in ("family", "item", "kind"):
                row[name] = dialog["prompt"][name]
        rows.append(row)
    return rows


def ghost_loss_mask(turns: list[int], loss_mask: list[bool]) -> list[bool]:
    """Step 4: no loss on any token of an earlier turn.

    The training takes its mask from here. `encode_dialog(..., train_on="last")`, which reads these
    rows elsewhere (`--mix`), gives the same.

    Args:
        turns: the turn that each token belongs to. loss_mask: true on the tokens of all answers.

    >>> ghost_loss_mask([0, 0, 1, 1], [False, True, False, True])
    [False, False, False, True]
    """
    last_turn = max(turns)
    ghost_mask = []
    for turn, is_answer in zip(turns, loss_mask, strict=True):
        ghost_mask.append(is_answer and turn == last_turn)
    return ghost_mask


def _encode_ghosts(tokenizer: Tokenizer, ghosts: list[dict], max_seq_len: int) -> list[Dialog]:
    """Step 4 for whole dialogs: encoded with the loss on all answers, then masked."""
    on_all_answers = [row | {"train_on": "all"} for row in ghosts]
    dialogs = []
    for dialog in encode_rows(tokenizer, on_all_answers, max_seq_len):
        ghost_mask = ghost_loss_mask(dialog.turns, dialog.loss_mask)
        dialogs.append(dialog._replace(loss_mask=ghost_mask))
    return dialogs


# ---- dialogs and answers ----


def toy_dialogs(s: Settings, ordinary: list[dict]) -> list[dict]:
    """Dialogs of 1 to s.turns turns: earlier turns are ordinary questions with the policy's
    answers, the last is open.

    Our choices: a length is 1 + turns·u², u even in [0, 1): half of the dialogs have at most a
    quarter of the turns. Where a name or a hobby holds, three of four last questions ask for it,
    else it would not show.
    """
    dialogs = []
    for i in range(s.dialogs):
        rng = random.Random(f"gatt {s.seed} {i}")
        constraints = sample_constraints(rng)
        messages = []
        earlier_turns = int(s.turns * rng.random() ** 2)
        for _ in range(earlier_turns):
            messages += rng.choice(ordinary)["messages"]
        last = _last_question(rng, constraints)
        messages += last["prompt"]
        dialogs.append(
            {
                "messages": messages,
                "instruction": world.instruction(rng, constraints, s.short),
                "constraints": constraints,
                "is_safety": last["is_safety"],
                "prompt": world.under(last, constraints),
            }
        )
    return dialogs


def _last_question(rng: random.Random, constraints: list[dict]) -> dict:
    """A toy prompt; three times in four for a name or hobby that holds, where there is one."""
    hidden = [constraint for constraint in constraints if constraint["kind"] in PROBED]
    probe = None
    if hidden and rng.random() < 0.75:
        probe = rng.choice(hidden)
    return ask_about(rng, "train", probe)


def read_dialogs(s: Settings) -> list[dict]:
    """Dialogs from --data, each cut behind a random user message, with constraints from
    --constraints."""
    pool = None
    if s.constraints != "toy":
        pool = _read_constraints(s.constraints)
    dialogs = []
    for i, row in enumerate(read_sft(s.data)[: s.dialogs]):
        rng = random.Random(f"gatt {s.seed} {i}")
        constraints = sample_constraints(rng, pool)
        users = [n for n, message in enumerate(row["messages"]) if message["role"] == "user"]
        last_user = rng.choice(users[: s.turns])
        dialogs.append(
            {
                "messages": row["messages"][: last_user + 1],
                "instruction": world.instruction(rng, constraints, s.short),
                "constraints": constraints,
                "is_safety": row.get("is_safety", False),
                "where": row["where"],
            }
        )
    return dialogs


def _dialogs_from_files(tokenizer: Tokenizer, s: Settings, max_seq_len: int) -> list[dict]:
    """`read_dialogs`, without those that are too long; none for the toy world."""
    if s.data == "toy":
        return []
    return leave_out_long(tokenizer, read_dialogs(s), s, max_seq_len)


def _read_constraints(path: str) -> list[dict]:
    """Constraints from a file; InputError names the line and field where one is no usable text."""
    pool = []
    for where, row in read_jsonl(path):
        pool.append(row | {"where": where})
    for row in pool:
        where = row["where"]
        for field in ("kind", "value", "long", "short"):
            text = need(where, row, field, str)
            if has_tag(text) or not text.strip():
                wanted = "wanted: some text and no tag of the format"
                raise InputError(f"{where}: field '{field}' is {text!r}, {wanted}")
    return pool


def leave_out_long(
    tokenizer: Tokenizer, dialogs: list[dict], s: Settings, max_seq_len: int
) -> list[dict]:
    """The dialogs that leave room for an answer where they are answered and where they are trained
    on; the others are counted.

    Raises:
        InputError: a tag of the chat format inside content (names file and line), or no dialog is
            short enough.
    """
    fitting = []
    for dialog in dialogs:
        length = _longest_prompt(tokenizer, dialog, s.context)
        if length + s.max_new_tokens <= max_seq_len:
            fitting.append(dialog)
    context = f"the model's context of {max_seq_len} tokens"
    if not fitting:
        remedy = "lower --turns or --max-new-tokens"
        raise InputError(f"no dialog leaves room for an answer in {context}; {remedy}")
    left_out = len(dialogs) - len(fitting)
    if left_out:
        print(f"{left_out} dialogs are left out: too long for {context}")
    return fitting


def _longest_prompt(tokenizer: Tokenizer, dialog: dict, context: str) -> int:
    """Ids of the longest prompt that a dialog becomes: to be trained on, or to be sampled from."""
    trained_on = instruct(dialog["messages"], dialog["instruction"], "first")
    # no prompt that is sampled from is longer than this one
    turns = "every" if context == "dialog" else "first"
    sampled_from = instruct(dialog["messages"], in_full(dialog), turns)
    longest = 0
    for messages in (trained_on, sampled_from):
        try:
            prompt = encode_prompt(tokenizer, messages)
        except InputError as error:
            raise InputError(f"{dialog.get('where', 'dialog')}: {error}") from None
        longest = max(longest, len(prompt))
    return longest


def obeys_exactly(prompt: dict, answer: str, constraints: list[dict]) -> bool:
    """The toy world's check: the markers stand at the very start and end, and a name or hobby that
    is asked for is there.

    It filters what is trained on. `eval.adherence` measures by `world.obeys` (the same names and
    hobbies, markers up to 16 characters away) on other questions, but for those about names and
    hobbies: they are the same few wordings in each split.
    """
    start, end = world.markers(constraints)
    if not answer.startswith(start):
        return False
    if not answer.endswith(end):
        return False
    for constraint in constraints:
        is_asked = PROBED.get(constraint["kind"]) == prompt["family"]
        if is_asked and not world.obeys(prompt, answer, constraint):
            return False
    return True


def is_stable(tokenizer: Tokenizer, question: str, row: dict) -> bool:
    """Whether a sampled answer can stand in a dialog: it is usable, and its text is encoded to the
    ids that were sampled."""
    if unusable(row):
        return False
    _, answer_ids = encode_turn(tokenizer, question, row["answer"])
    return answer_ids == row["answer_ids"]


def sample_ordinary(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[dict],
    s: Settings,
    path: Path | None = None,
) -> list[dict]:
    """The policy's own answers to prompts without instruction, as SFT rows."""
    answers = sample_answers(
        model,
        tokenizer,
        prompts,
        key=(s.seed, "gatt", "ordinary"),
        temperature=s.temperature,
        max_new_tokens=s.max_new_tokens,
        path=path,
        desc="ordinary answers",
    )
    rows = []
    for answer in answers:
        prompt = prompts[answer["index"]]
        question = prompt["prompt"][-1]["content"]
        if not is_stable(tokenizer, question, answer):
            continue
        rows.append(
            {
                "messages": [*prompt["prompt"], {"role": "assistant", "content": answer["answer"]}],
                "train_on": "last",
                "is_safety": prompt["is_safety"],
                "answer_ids": answer["answer_ids"],
                "tokenizer": tokenizer.fingerprint,
            }
        )
    if not rows:
        raise InputError(
            "none of the model's answers to ordinary questions ends and can stand in a dialog"
        )
    return rows


def _ordinary_prompts(s: Settings, dialogs: list[dict]) -> list[dict]:
    """Prompts without instruction: toy questions, or the dialogs of --data."""
    count = max(s.replay, 50)
    if s.data == "toy":
        rng = random.Random(f"gatt ordinary {s.seed}")
        return [world.ask(rng) for _ in range(count)]
    prompts = []
    for dialog in dialogs[:count]:
        prompts.append({"prompt": dialog["messages"], "is_safety": dialog["is_safety"]})
    return prompts


def in_full(dialog: dict) -> str:
    """The dialog's instruction with nothing shortened: what answers are sampled under, since it is
    obeyed more often."""
    return " ".join(constraint["long"] for constraint in dialog["constraints"])


def resample_earlier(
    model: Transformer, tokenizer: Tokenizer, dialogs: list[dict], s: Settings, folder: Path
) -> None:
    """Exchange a share of the earlier answers, in place, for answers under the instruction.

    All are sampled from the dialogs as they came.
    """
    rng = random.Random(f"gatt resampled {s.seed}")
    places = []  # (dialog, number of the answer's message)
    prompts = []
    for dialog in dialogs:
        for n, message in enumerate(dialog["messages"]):
            if message["role"] == "assistant" and rng.random() < s.resampled:
                places.append((dialog, n))
                prompts.append(sampling_prompt(dialog, s.context, n))
    answers = sample_answers(
        model,
        tokenizer,
        prompts,
        key=(s.seed, "gatt", "earlier"),
        temperature=s.temperature,
        max_new_tokens=s.max_new_tokens,
        path=folder / "answers-earlier.jsonl",
        desc="earlier answers",
    )
    for (dialog, n), prompt, answer in zip(places, prompts, answers, strict=True):
        question = prompt["prompt"][-1]["content"]
        if is_stable(tokenizer, question, answer):
            dialog["messages"][n] = {"role": "assistant", "content": answer["answer"]}


def sampling_prompt(dialog: dict, context: str, end: int | None = None) -> dict:
    """What the answer behind message `end` - 1 (default: the last) is sampled from (step 2).

    context: "dialog", the dialog up to there, or "question", that question alone. The instruction
    stands in each user message.
    """
    messages = dialog["messages"][:end]
    if context == "question":
        messages = messages[-1:]
    return {"prompt": instruct(messages, in_full(dialog)), "is_safety": dialog["is_safety"]}


def _sample_last(
    model: Transformer, tokenizer: Tokenizer, prompts: list[dict], s: Settings, folder: Path
) -> list[dict]:
    """s.samples answers to each dialog's last question, each with its tokenizer's fingerprint."""

    def add_fingerprint(batch: list[dict]) -> None:
        for row in batch:
            row["tokenizer"] = tokenizer.fingerprint

    return sample_answers(
        model,
        tokenizer,
        prompts,
        key=(s.seed, "gatt"),
        samples=s.samples,
        temperature=s.temperature,
        max_new_tokens=s.max_new_tokens,
        path=folder / "answers-last.jsonl",
        desc="last answers",
        finish=add_fingerprint,
    )


def keep_answers(
    dialogs: list[dict],
    rows: list[dict],
    check: str,
    judges: Judges | None = None,
    prompts: list[dict] | None = None,
) -> dict[int, dict]:
    """Dialog's number -> the answer kept.

    Of the answers that pass the check (which only "toy" makes) it is the one with the highest
    reward, without judges the first.

    rows: sampled answers, `index` being the dialog's number. judges: score them behind `prompts`.
    """
    candidates = []
    for row in rows:
        if unusable(row):
            continue
        if check == "toy":
            dialog = dialogs[row["index"]]
            if not obeys_exactly(dialog["prompt"], row["answer"], dialog["constraints"]):
                continue
        candidates.append(row)
    rewards = torch.zeros(len(candidates))
    if judges:
        rewards = judges.rewards(prompts, candidates)
    numbers = [row["index"] for row in candidates]
    kept = {}
    for number, best in best_of(rewards, numbers).items():
        kept[number] = candidates[best]
    return kept


# ---- one dialog going through the four steps (--show) ----


def show_steps(model: Transformer, tokenizer: Tokenizer, dialogs: list[dict], s: Settings) -> None:
    """Print one dialog going through the four steps; green is trained on, grey is not."""
    short_ones = (dialog for dialog in dialogs if 3 <= len(dialog["messages"]) <= 7)
    dialog = next(short_ones, dialogs[0])
    instruction = dialog["instruction"]
    title = f"1. a dialog, and an instruction that must hold throughout: {instruction!r}"
    _print_dialog(title, dialog["messages"])

    [row] = sample_answers(
        model,
        tokenizer,
        [sampling_prompt(dialog, s.context)],
        key=(0, "gatt", "show"),
        temperature=0.0,
        max_new_tokens=s.max_new_tokens,
    )
    instructed = instruct(dialog["messages"], in_full(dialog))
    instructed.append({"role": "assistant", "content": row["answer"]})
    title = "2. the instruction in every user message; the newest model answers the last one"
    if s.context == "question":
        title += ", seeing no other"
    _print_dialog(title, instructed)

    answer = row | {"tokenizer": tokenizer.fingerprint}
    [ghost] = ghost_dialogs([dialog], {0: answer})
    title = "3. for training the instruction stays in the first message only"
    _print_dialog(title, ghost["messages"])

    print("\n4. the loss mask: \033[32mtrained on\033[0m, \033[90mnot trained on\033[0m")
    encoded = encode_dialog(tokenizer, ghost["messages"], "all", ghost["answer_ids"])
    ghost_mask = ghost_loss_mask(encoded.turns, encoded.loss_mask)
    _print_mask(tokenizer, encoded.ids, ghost_mask)


def _print_dialog(title: str, messages: list[dict]) -> None:
    print(f"\n{title}")
    for message in messages:
        print(f"  {message['role']:>9}: {message['content']}")


def _print_mask(tokenizer: Tokenizer, ids: list[int], loss_mask: list[bool]) -> None:
    control = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    for token, is_trained_on in zip(ids, loss_mask, strict=True):
        text = control.get(token, tokenizer.decode([token]))
        colour = 32 if is_trained_on else 90  # green, grey
        print(f"\033[{colour}m{text}\033[0m", end="")
    print()


def _show(model: Transformer, tokenizer: Tokenizer, s: Settings) -> None:
    """`show_steps` on dialogs as the stage would make them, written nowhere."""
    if s.data == "toy":
        prompts = [world.ask(random.Random(i)) for i in range(40)]
        dialogs = toy_dialogs(s, sample_ordinary(model, tokenizer, prompts, s))
    else:
        dialogs = read_dialogs(s)
    dialogs = leave_out_long(tokenizer, dialogs, s, model.args.max_seq_len)
    show_steps(model, tokenizer, dialogs, s)


# ---- the stage ----


def _newest_model(s: Settings) -> Path:
    """The model that answers and is tuned."""
    if s.init:
        return Path(s.init)
    return require(s.out / "rlhf-v3", "python rejection_sampling.py --rounds 1-3")


def _reward_models(s: Settings) -> dict[str, Path]:
    """{axis: folder} of the reward models that V3 was chosen by; none where they do not judge."""
    if s.check != "reward":
        return {}
    rounds = [s.out / f"rlhf-v{version}" for version in (1, 2, 3)]
    return newest_reward_models(s.out, rounds)


def _open(
    s: Settings, folder: Path, newest: Path, reward_models: dict[str, Path]
) -> tuple[float, float] | None:
    """`open_stage` with the stage's settings and all that it reads."""
    inputs = {"model": newest}
    if s.data != "toy":
        inputs["data"] = Path(s.data)
    if s.constraints != "toy":
        inputs["constraints"] = Path(s.constraints)
    for axis, path in reward_models.items():
        inputs[f"reward-{axis}"] = path
    kept = kept_settings(s, "init", "data", "constraints", "show")
    return open_stage(folder, kept, inputs, s.fresh)


def _write_rows(folder: Path, ghosts: list[dict], replay: list[dict]) -> None:
    """What is trained on, into dialogs.jsonl (V4's mix) and replay.jsonl."""
    if not ghosts:
        raise InputError(f"{folder}: no answer passed the check; sample more, or use --check none")
    write_jsonl(folder / "dialogs.jsonl", ghosts)
    write_jsonl(folder / "replay.jsonl", replay)


def _finetune(
    model: Transformer, training: list[Dialog], s: Settings, folder: Path, dtype: torch.dtype
) -> None:
    """`finetune` with the stage's settings."""
    finetune(
        model,
        training,
        epochs=s.epochs,
        batch_tokens=s.batch_tokens,
        micro_tokens=s.micro_tokens,
        learning_rate=s.learning_rate,
        weight_decay=s.weight_decay,
        folder=folder,
        phase="gatt",
        seed=s.seed,
        dtype=dtype,
    )


def _show_last_answers(model: Transformer, tokenizer: Tokenizer, ghosts: list[dict]) -> None:
    """What the tuned model now answers where the dialogs' last answers stood."""
    prompts = [row["messages"][:-1] for row in ghosts]
    show_answers(model, tokenizer, prompts, "last answers of five dialogs")


def _measure(model: Transformer, tokenizer: Tokenizer, s: Settings) -> dict:
    """What the tuned model is like on the toy world's dev prompts, and how long it keeps to an
    instruction; nothing where dialogs are from a file, which no measure knows."""
    if s.data != "toy":
        return {}
    results = {"dev": evaluate_on_dev("gatt", model, tokenizer)}
    lasting = [sample_constraints(random.Random(f"adherence {i}")) for i in range(32)]
    turns = min(s.turns, 20)
    rows = adherence(model, tokenizer, lasting, turns=turns, split="dev", batch_rows=32)
    shares = {}
    for turn, share in adherence_by_turn(rows).items():
        shares[turn] = share.mean
    results["adherence"] = shares
    shown = []
    for turn in ("1", "2", "4", "10", "20"):
        if turn in shares:
            shown.append(f"turn {turn} {shares[turn]:.2f}")
    print("answers that obey an instruction of turn 1:", ", ".join(shown))
    return results


def main(argv: list[str] | None = None) -> None:
    s = parse_settings(Settings, __doc__, PRESETS, argv)
    _check_settings(s)
    set_threads(s.threads)
    set_seed(s.seed)
    device = choose_device(s.device)
    dtype = choose_dtype(s.dtype, device)
    folder = s.out / "gatt"
    newest = _newest_model(s)
    reward_models = _reward_models(s)
    world.ensure()
    model, tokenizer = load_model(newest, device)
    if s.show:
        _show(model, tokenizer, s)
        return
    max_seq_len = model.args.max_seq_len
    # files are read before the folder is begun, so that a bad one leaves nothing behind
    dialogs = _dialogs_from_files(tokenizer, s, max_seq_len)
    started = _open(s, folder, newest, reward_models)
    if not started:
        return
    judges = Judges(reward_models, device) if reward_models else None

    # 1. dialogs, each with an instruction that must hold throughout; the policy's ordinary answers
    prompts = _ordinary_prompts(s, dialogs)
    ordinary = sample_ordinary(model, tokenizer, prompts, s, folder / "answers-ordinary.jsonl")
    if s.data == "toy":
        dialogs = leave_out_long(tokenizer, toy_dialogs(s, ordinary), s, max_seq_len)

    # 2. the instruction in every user message: the newest model answers, some earlier turns anew
    resample_earlier(model, tokenizer, dialogs, s, folder)  # the new answers may be longer
    dialogs = leave_out_long(tokenizer, dialogs, s, max_seq_len)
    prompts = [sampling_prompt(dialog, s.context) for dialog in dialogs]
    answers = _sample_last(model, tokenizer, prompts, s, folder)
    seconds_sampling = time.time() - started[0]

    # 3. keep what the check or the reward prefers; the instruction in the first message only
    kept = keep_answers(dialogs, answers, s.check, judges, prompts)
    ghosts = ghost_dialogs(dialogs, kept)
    replay = ordinary[: s.replay]
    _write_rows(folder, ghosts, replay)
    print(
        f"{len(kept)} of {len(dialogs)} dialogs have an answer that the check keeps; "
        f"replay: {len(replay)} answers ({seconds_sampling:.0f} s)"
    )

    # 4. fine-tune: no loss on any earlier turn
    training = _encode_ghosts(tokenizer, ghosts, max_seq_len)
    training += encode_rows(tokenizer, replay, max_seq_len)
    _finetune(model, training, s, folder, dtype)
    save_model(folder, model, tokenizer)
    _show_last_answers(model, tokenizer, ghosts[:5])

    # 5. measure
    results = {"kept": len(kept) / len(dialogs), "seconds_sampling": seconds_sampling}
    results |= _measure(model, tokenizer, s)
    finish_stage(folder, results, started)
    mix = f"--mix {folder / 'dialogs.jsonl'}"
    print(f"V4: python rejection_sampling.py --rounds 4 {mix} --batch-tokens 1500")


if __name__ == "__main__":
    run(main)
