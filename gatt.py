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
- Ordinary answers of the policy itself (replay) are shuffled in among the dialogs, so that nothing
  else is lost.

    python gatt.py          OUT/gatt from OUT/rlhf-v3; dialogs.jsonl in it goes into V4 with --mix
    python gatt.py --init MODEL --data DIALOGS.jsonl --constraints CONSTRAINTS.jsonl \\
        --check reward --context dialog
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from data import (
    Answer,
    Dialog,
    EncodedDialog,
    InputError,
    Prompt,
    Tokenizer,
    encode_prompt,
    has_tag,
    read_jsonl,
    read_sft,
    world,
    write_records,
)
from data.chat import encode_turn
from data.jsonl import need
from data.records import Message
from eval import PROBED, adherence, adherence_by_turn, ask_about, evaluate_on_dev
from model import Transformer
from rejection_sampling import RewardModels, best_of
from runtime import (
    Stage,
    StageSettings,
    check_between,
    check_positive,
    load_model,
    newest_reward_models,
    parse_settings,
    require,
    run,
    sample_answers,
    save_model,
    unusable,
)
from sft import encode_dialogs, finetune, show_answers


@dataclass
class Settings(StageSettings):
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

    def __post_init__(self):
        check_positive(
            self,
            *("dialogs", "turns", "samples", "max_new_tokens", "temperature", "epochs"),
            *("batch_tokens", "micro_tokens", "learning_rate"),
            or_zero=("weight_decay", "replay"),
        )
        check_between(self, 0, 1, "short", "resampled")
        check_between(self, 0.01, 100, "temperature")
        check_between(self, 1, 1000, "turns", "epochs")
        if not self.data or not self.constraints:
            files = "--data FILE.jsonl --constraints FILE.jsonl"
            raise InputError(f"--preset {self.preset} needs dialogs and constraints: {files}")
        if self.data == "toy" and self.constraints != "toy":
            wanted = "dialogs of your own: --data FILE.jsonl"
            raise InputError(f"--constraints {self.constraints} needs {wanted}")
        if self.check == "toy" and self.data != "toy":
            known = "the toy world's dialogs and constraints only"
            raise InputError(f"--check toy knows {known}; use --check reward or none")


PAPER = {
    "data": "",
    "constraints": "",
    "check": "reward",
    "context": "dialog",
    "dialogs": 10000,
    "max_new_tokens": 1024,
    "batch_tokens": 64 * 4096,
    "micro_tokens": 4096,
    "learning_rate": 2e-5,
}
PRESETS = {
    "tiny": {"check": "none", "dialogs": 40, "turns": 4, "replay": 60},
    "class": {"dialogs": 600, "turns": 12, "replay": 600},
    "toy": {},
    "small": {"learning_rate": 2e-4, "batch_tokens": 16384},
    "llama-2-7b": PAPER,
    "llama-2-13b": PAPER,
    "llama-2-34b": PAPER,
    "llama-2-70b": PAPER,
}


@dataclass(frozen=True)
class GhostDialog:
    """A dialog whose last question is open, and the instruction that must hold in it (step 1)."""

    messages: list[Message]  # end with the user; the instruction stands in none of them
    instruction: str  # as it is trained on: each constraint in its long or its short form
    constraints: list[dict]  # what it asks for: {"kind", "value", "long", "short"}
    is_safety: bool = False  # the last question is tagged as possibly unsafe
    # the last question as the toy world's annotator judges it, under the constraints; None
    # elsewhere
    prompt: Prompt | None = None
    where: str = ""  # "FILE, line N", for messages to the user


# ---- the four steps ----


def sample_constraints(rng: random.Random, pool: Sequence[dict] | None = None) -> list[dict]:
    """Draw what an instruction asks for: one constraint, or two of different kinds (step 1).

    Two come half of the time, and never where the pool has one kind only. Each kind is as likely
    as any other, however many constraints the pool has of it. Within a kind each is as likely.

    Args:
        pool: constraints {"kind", "value", "long", "short"}; None: `toy_constraints()`.

    Returns:
        one or two of the pool, in the order in which they were drawn.
    """
    pool = pool or toy_constraints()
    kinds = sorted({constraint["kind"] for constraint in pool})
    wanted = 2 if rng.random() < 0.5 else 1
    drawn_kinds = rng.sample(kinds, min(len(kinds), wanted))
    constraints = []
    for kind in drawn_kinds:
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
    messages: list[Message],
    instruction: str,
    turns: Literal["every", "first"] = "every",
) -> list[Message]:
    """The dialog with the instruction in front of user messages: of all, or of the first alone.

    "every" is step 2, "first" is step 3. The messages given stay as they are.

    >>> [m["content"] for m in instruct([{"role": "user", "content": "Hi."}], "Figure: Napoleon.")]
    ['Figure: Napoleon. Hi.']
    """
    users = [n for n, message in enumerate(messages) if message["role"] == "user"]
    marked = users if turns == "every" else users[:1]
    instructed = list(messages)
    for n in marked:
        content = f"{instruction} {messages[n]['content']}"
        instructed[n] = messages[n] | {"content": content}
    return instructed


def ghost_dialogs(dialogs: list[GhostDialog], answers: dict[int, Answer]) -> list[Dialog]:
    """The dialogs to train on: those whose last answer was kept (step 3).

    The instruction, as the dialog has it, stands in front of the first user message and nowhere
    else. The answer comes last, with the ids that were sampled, and the loss is on it alone.

    Args:
        dialogs: the last question of each is open.
        answers: number of a dialog in `dialogs` -> the answer that was kept, with the fingerprint
            of its tokenizer.

    Returns:
        one for each answer, in the order of `dialogs`: train_on "last", `answer_ids`, `tokenizer`,
        `is_safety`, and `about` = {"instruction", "constraints"}, for a toy dialog also {"family",
        "item", "kind"} of its prompt. The dialogs given stay as they are.
    """
    ghosts = []
    for i in sorted(answers):
        dialog = dialogs[i]
        answer = answers[i]
        messages = instruct(dialog.messages, dialog.instruction, "first")
        messages.append({"role": "assistant", "content": answer.text})
        about = {"instruction": dialog.instruction, "constraints": dialog.constraints}
        if dialog.prompt:
            about["family"] = dialog.prompt.family
            about["item"] = dialog.prompt.item
            about["kind"] = dialog.prompt.kind
        ghosts.append(
            Dialog(
                messages=messages,
                train_on="last",
                is_safety=dialog.is_safety,
                answer_ids=answer.ids,
                tokenizer=answer.tokenizer,
                about=about,
            )
        )
    return ghosts


def ghost_loss_mask(turns: list[int], loss_mask: list[bool]) -> list[bool]:
    """Step 4: no loss on any token of an earlier turn.

    What is left is the mask of the last turn. The training takes its mask from here;
    `encode_dialog(..., train_on="last")`, which reads these dialogs elsewhere (`--mix`), gives the
    same.

    Args:
        turns: (tokens) the turn that each token belongs to, rising from 0.
        loss_mask: (tokens) true on the tokens of all answers.

    Returns:
        (tokens) true on the tokens of the last answer.

    Raises:
        ValueError: the two are not of the same length, or empty.

    >>> ghost_loss_mask([0, 0, 1, 1], [False, True, False, True])
    [False, False, False, True]
    """
    last_turn = max(turns)
    ghost_mask = []
    for turn, is_answer in zip(turns, loss_mask, strict=True):
        ghost_mask.append(is_answer and turn == last_turn)
    return ghost_mask


def _encode_ghosts(
    tokenizer: Tokenizer, ghosts: list[Dialog], max_seq_len: int
) -> list[EncodedDialog]:
    """Step 4 for whole dialogs: encoded with the loss on all answers, then masked."""
    on_all_answers = [replace(ghost, train_on="all") for ghost in ghosts]
    masked = []
    for encoded in encode_dialogs(tokenizer, on_all_answers, max_seq_len):
        ghost_mask = ghost_loss_mask(encoded.turns, encoded.loss_mask)
        masked.append(encoded._replace(loss_mask=ghost_mask))
    return masked


# ---- dialogs ----


def toy_dialogs(settings: Settings, ordinary: list[Dialog]) -> list[GhostDialog]:
    """Dialogs of 1 to `settings.turns` turns.

    Earlier turns are ordinary questions with the policy's answers, the last question is open.

    Our choices: a length is 1 + turns·u², u even in [0, 1): half of the dialogs have at most a
    quarter of the turns. Where a name or a hobby holds, three of four last questions ask for it,
    else it would not show.
    """
    dialogs = []
    for i in range(settings.dialogs):
        rng = random.Random(f"gatt {settings.seed} {i}")
        constraints = sample_constraints(rng)
        messages = []
        earlier_turns = int(settings.turns * rng.random() ** 2)
        for _ in range(earlier_turns):
            messages += rng.choice(ordinary).messages
        question = _last_question(rng, constraints)
        messages += question.messages
        dialogs.append(
            GhostDialog(
                messages=messages,
                instruction=world.instruction(rng, constraints, settings.short),
                constraints=constraints,
                is_safety=question.is_safety,
                prompt=world.under(question, constraints),
            )
        )
    return dialogs


def _last_question(rng: random.Random, constraints: list[dict]) -> Prompt:
    """A toy prompt; three times in four for a name or hobby that holds, where there is one."""
    hidden = [constraint for constraint in constraints if constraint["kind"] in PROBED]
    probe = None
    if hidden and rng.random() < 0.75:
        probe = rng.choice(hidden)
    return ask_about(rng, "train", probe)


def read_dialogs(settings: Settings) -> list[GhostDialog]:
    """Dialogs from --data, each cut behind a random user message, with constraints from
    --constraints.
    """
    pool = None
    if settings.constraints != "toy":
        pool = _read_constraints(settings.constraints)
    dialogs = []
    for i, source in enumerate(read_sft(settings.data)[: settings.dialogs]):
        rng = random.Random(f"gatt {settings.seed} {i}")
        constraints = sample_constraints(rng, pool)
        users = [n for n, message in enumerate(source.messages) if message["role"] == "user"]
        last_user = rng.choice(users[: settings.turns])
        dialogs.append(
            GhostDialog(
                messages=source.messages[: last_user + 1],
                instruction=world.instruction(rng, constraints, settings.short),
                constraints=constraints,
                is_safety=source.is_safety,
                where=source.where,
            )
        )
    return dialogs


def _dialogs_from_files(
    tokenizer: Tokenizer, settings: Settings, max_seq_len: int
) -> list[GhostDialog]:
    """`read_dialogs`, without those that are too long; none for the toy world."""
    if settings.data == "toy":
        return []
    return leave_out_long(tokenizer, read_dialogs(settings), settings, max_seq_len)


def _read_constraints(path: str) -> list[dict]:
    """Constraints from a file; InputError names the line and field where one is no usable text."""
    pool = []
    for where, constraint in read_jsonl(path):
        for field in ("kind", "value", "long", "short"):
            text = need(where, constraint, field, str)
            if has_tag(text) or not text.strip():
                wanted = "wanted: some text and no tag of the format"
                raise InputError(f"{where}: field '{field}' is {text!r}, {wanted}")
        pool.append(constraint | {"where": where})
    return pool


def leave_out_long(
    tokenizer: Tokenizer, dialogs: list[GhostDialog], settings: Settings, max_seq_len: int
) -> list[GhostDialog]:
    """The dialogs that leave room for an answer where they are answered and where they are trained
    on; the others are counted.

    Raises:
        InputError: a tag of the chat format inside content (names file and line), or no dialog is
            short enough.
    """
    fitting = []
    for dialog in dialogs:
        length = _longest_prompt(tokenizer, dialog, settings.context)
        if length + settings.max_new_tokens <= max_seq_len:
            fitting.append(dialog)
    context = f"the model's context of {max_seq_len} tokens"
    if not fitting:
        remedy = "lower --turns or --max-new-tokens"
        raise InputError(f"no dialog leaves room for an answer in {context}; {remedy}")
    left_out = len(dialogs) - len(fitting)
    if left_out:
        print(f"{left_out} dialogs are left out: too long for {context}")
    return fitting


def _longest_prompt(tokenizer: Tokenizer, dialog: GhostDialog, context: str) -> int:
    """Ids of the longest prompt that a dialog becomes: to be trained on, or to be sampled from."""
    trained_on = instruct(dialog.messages, dialog.instruction, "first")
    # no prompt that is sampled from is longer than this one
    turns = "every" if context == "dialog" else "first"
    sampled_from = instruct(dialog.messages, in_full(dialog), turns)
    longest = 0
    for messages in (trained_on, sampled_from):
        try:
            prompt = encode_prompt(tokenizer, messages)
        except InputError as error:
            raise InputError(f"{dialog.where or 'dialog'}: {error}") from None
        longest = max(longest, len(prompt))
    return longest


# ---- answers ----


def in_full(dialog: GhostDialog) -> str:
    """The dialog's instruction with nothing shortened: what answers are sampled under, since it is
    obeyed more often.
    """
    return " ".join(constraint["long"] for constraint in dialog.constraints)


def sampling_prompt(
    dialog: GhostDialog, context: Literal["question", "dialog"], end: int | None = None
) -> Prompt:
    """What the answer behind message `end` - 1 (default: the last) is sampled from (step 2).

    context: "dialog", the dialog up to there, or "question", that question alone. The instruction
    stands in each user message.
    """
    messages = dialog.messages[:end]
    if context == "question":
        messages = messages[-1:]
    return Prompt(instruct(messages, in_full(dialog)), dialog.is_safety)


def is_stable(tokenizer: Tokenizer, question: str, answer: Answer) -> bool:
    """Whether a sampled answer can stand in a dialog: it is usable, and its text is encoded to the
    ids that were sampled.
    """
    if unusable(answer):
        return False
    _, encoded = encode_turn(tokenizer, question, answer.text)
    return encoded == answer.ids


def _ordinary_prompts(settings: Settings, dialogs: list[GhostDialog]) -> list[Prompt]:
    """Prompts without instruction: toy questions, or the dialogs of --data."""
    count = max(settings.replay, 50)
    if settings.data == "toy":
        rng = random.Random(f"gatt ordinary {settings.seed}")
        return [world.ask(rng) for _ in range(count)]
    return [Prompt(dialog.messages, dialog.is_safety) for dialog in dialogs[:count]]


def sample_ordinary(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    settings: Settings,
    folder: Path | None = None,
) -> list[Dialog]:
    """The policy's own answers to prompts without instruction, as dialogs to train on.

    Those that cannot stand in a dialog (`is_stable`) are left out.

    folder: keeps all answers in answers-ordinary.jsonl; None: nothing is written.

    Raises:
        InputError: no answer is left.
    """
    answers = sample_answers(
        model,
        tokenizer,
        prompts,
        key=(settings.seed, "gatt", "ordinary"),
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        path=folder / "answers-ordinary.jsonl" if folder else None,
        desc="ordinary answers",
    )
    ordinary = []
    for answer in answers:
        prompt = prompts[answer.index]
        if not is_stable(tokenizer, prompt.question, answer):
            continue
        ordinary.append(
            Dialog(
                messages=[*prompt.messages, {"role": "assistant", "content": answer.text}],
                train_on="last",
                is_safety=prompt.is_safety,
                answer_ids=answer.ids,
                tokenizer=tokenizer.fingerprint,
            )
        )
    if not ordinary:
        raise InputError(
            "none of the model's answers to ordinary questions ends and can stand in a dialog"
        )
    return ordinary


def resample_earlier(
    model: Transformer,
    tokenizer: Tokenizer,
    dialogs: list[GhostDialog],
    settings: Settings,
    folder: Path,
) -> list[GhostDialog]:
    """The dialogs with a share of their earlier answers exchanged for answers under the
    instruction.

    All are sampled from the dialogs as they came. An answer that cannot stand in a dialog
    (`is_stable`) leaves the old one there.
    """
    rng = random.Random(f"gatt resampled {settings.seed}")
    places = []  # (number of the dialog, number of the answer's message)
    prompts = []
    for i, dialog in enumerate(dialogs):
        for n, message in enumerate(dialog.messages):
            if message["role"] == "assistant" and rng.random() < settings.resampled:
                places.append((i, n))
                prompts.append(sampling_prompt(dialog, settings.context, n))
    answers = sample_answers(
        model,
        tokenizer,
        prompts,
        key=(settings.seed, "gatt", "earlier"),
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        path=folder / "answers-earlier.jsonl",
        desc="earlier answers",
    )
    changed = list(dialogs)
    for (i, n), prompt, answer in zip(places, prompts, answers, strict=True):
        if is_stable(tokenizer, prompt.question, answer):
            messages = list(changed[i].messages)
            messages[n] = {"role": "assistant", "content": answer.text}
            changed[i] = replace(changed[i], messages=messages)
    return changed


def _sample_last(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    settings: Settings,
    folder: Path,
) -> list[Answer]:
    """`settings.samples` answers to each dialog's last question; each names its tokenizer."""

    def sign(batch: list[Answer]) -> list[Answer]:
        return [replace(answer, tokenizer=tokenizer.fingerprint) for answer in batch]

    return sample_answers(
        model,
        tokenizer,
        prompts,
        key=(settings.seed, "gatt"),
        samples=settings.samples,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        path=folder / "answers-last.jsonl",
        desc="last answers",
        finish=sign,
    )


def obeys_exactly(prompt: Prompt, answer: str, constraints: list[dict]) -> bool:
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
        is_asked = PROBED.get(constraint["kind"]) == prompt.family
        if is_asked and not world.obeys(prompt, answer, constraint):
            return False
    return True


def keep_answers(
    dialogs: list[GhostDialog],
    answers: list[Answer],
    check: Literal["toy", "reward", "none"],
    reward_models: RewardModels | None = None,
    prompts: list[Prompt] | None = None,
) -> dict[int, Answer]:
    """Number of a dialog in `dialogs` -> the answer kept.

    Of the answers that pass the check (which only "toy" makes) it is the one with the highest
    reward, without reward models the first. A dialog none of whose answers passes is not there.

    Args:
        answers: sampled ones; `index` is the dialog's number.
        reward_models: score the answers behind `prompts`, one for each dialog.
    """
    candidates = []
    for answer in answers:
        if unusable(answer):
            continue
        if check == "toy":
            dialog = dialogs[answer.index]
            if not obeys_exactly(dialog.prompt, answer.text, dialog.constraints):
                continue
        candidates.append(answer)
    rewards = torch.zeros(len(candidates))  # (candidates)
    if reward_models:
        rewards = reward_models.scores(prompts, candidates)["reward"]
    numbers = [answer.index for answer in candidates]
    kept = {}
    for number, best in best_of(rewards, numbers).items():
        kept[number] = candidates[best]
    return kept


# ---- the stage ----


def _newest_policy(settings: Settings) -> Path:
    """The folder of the model that answers and is tuned."""
    if settings.init:
        return Path(settings.init)
    return require(settings.out / "rlhf-v3", "python rejection_sampling.py --rounds 1-3")


def _reward_folders(settings: Settings) -> dict[str, Path]:
    """{axis: folder} of the reward models that V3 was chosen by; none where they do not judge."""
    if settings.check != "reward":
        return {}
    rounds = [settings.out / f"rlhf-v{version}" for version in (1, 2, 3)]
    return newest_reward_models(settings.out, rounds)


def _inputs(
    settings: Settings, policy_folder: Path, reward_folders: dict[str, Path]
) -> dict[str, Path]:
    """All that the stage reads, by name."""
    inputs = {"model": policy_folder}
    if settings.data != "toy":
        inputs["data"] = Path(settings.data)
    if settings.constraints != "toy":
        inputs["constraints"] = Path(settings.constraints)
    for axis, folder in reward_folders.items():
        inputs[f"reward-{axis}"] = folder
    return inputs


def _write_dialogs(folder: Path, ghosts: list[Dialog], replay: list[Dialog]) -> None:
    """What is trained on, into dialogs.jsonl (V4's mix) and replay.jsonl."""
    if not ghosts:
        raise InputError(f"{folder}: no answer passed the check; sample more, or use --check none")
    write_records(folder / "dialogs.jsonl", ghosts)
    write_records(folder / "replay.jsonl", replay)


def _finetune(model: Transformer, training: list[EncodedDialog], stage: Stage) -> None:
    """`finetune` with the stage's settings."""
    settings = stage.settings
    finetune(
        model,
        training,
        epochs=settings.epochs,
        batch_tokens=settings.batch_tokens,
        micro_tokens=settings.micro_tokens,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        folder=stage.folder,
        phase="gatt",
        seed=settings.seed,
        dtype=stage.dtype,
    )


def _show_last_answers(model: Transformer, tokenizer: Tokenizer, ghosts: list[Dialog]) -> None:
    """What the tuned model now answers where the dialogs' last answers stood."""
    prompts = [ghost.messages[:-1] for ghost in ghosts]
    show_answers(model, tokenizer, prompts, "last answers of five dialogs")


def _measure(model: Transformer, tokenizer: Tokenizer, settings: Settings) -> dict:
    """What the tuned model is like on the toy world's dev prompts, and how long it keeps to an
    instruction; nothing where dialogs are from a file, which no measure knows.
    """
    if settings.data != "toy":
        return {}
    results = {"dev": evaluate_on_dev("gatt", model, tokenizer)}
    lasting = [sample_constraints(random.Random(f"adherence {i}")) for i in range(32)]
    turns = min(settings.turns, 20)
    judged = adherence(model, tokenizer, lasting, turns=turns, split="dev", batch_rows=32)
    shares = {}
    for turn, share in adherence_by_turn(judged).items():
        shares[turn] = share.mean
    results["adherence"] = shares
    shown = []
    for turn in ("1", "2", "4", "10", "20"):
        if turn in shares:
            shown.append(f"turn {turn} {shares[turn]:.2f}")
    print("answers that obey an instruction of turn 1:", ", ".join(shown))
    return results


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, PRESETS, argv)
    stage = Stage(settings, "gatt")
    policy_folder = _newest_policy(settings)
    reward_folders = _reward_folders(settings)
    world.ensure()
    model, tokenizer = load_model(policy_folder, stage.device)
    max_seq_len = model.args.max_seq_len
    # files are read before the folder is begun, so that a bad one leaves nothing behind
    dialogs = _dialogs_from_files(tokenizer, settings, max_seq_len)
    inputs = _inputs(settings, policy_folder, reward_folders)
    if not stage.begin(inputs, aside=("init", "data", "constraints")):
        return
    reward_models = RewardModels(reward_folders, stage.device) if reward_folders else None

    # 1. dialogs, each with an instruction that must hold throughout; the policy's ordinary answers
    prompts = _ordinary_prompts(settings, dialogs)
    ordinary = sample_ordinary(model, tokenizer, prompts, settings, stage.folder)
    if settings.data == "toy":
        dialogs = toy_dialogs(settings, ordinary)
        dialogs = leave_out_long(tokenizer, dialogs, settings, max_seq_len)

    # 2. the instruction in every user message: the newest model answers, some earlier turns anew
    dialogs = resample_earlier(model, tokenizer, dialogs, settings, stage.folder)
    dialogs = leave_out_long(tokenizer, dialogs, settings, max_seq_len)  # some have grown
    prompts = [sampling_prompt(dialog, settings.context) for dialog in dialogs]
    answers = _sample_last(model, tokenizer, prompts, settings, stage.folder)
    seconds_sampling = stage.seconds()

    # 3. keep what the check or the reward prefers; the instruction in the first message only
    kept = keep_answers(dialogs, answers, settings.check, reward_models, prompts)
    ghosts = ghost_dialogs(dialogs, kept)
    replay = ordinary[: settings.replay]
    _write_dialogs(stage.folder, ghosts, replay)
    print(
        f"{len(kept)} of {len(dialogs)} dialogs have an answer that the check keeps; "
        f"replay: {len(replay)} answers ({seconds_sampling:.0f} s)"
    )

    # 4. fine-tune: no loss on any earlier turn
    training = _encode_ghosts(tokenizer, ghosts, max_seq_len)
    training += encode_dialogs(tokenizer, replay, max_seq_len)
    _finetune(model, training, stage)
    save_model(stage.folder, model, tokenizer)

    # what came of it
    _show_last_answers(model, tokenizer, ghosts[:5])
    results = {"kept": len(kept) / len(dialogs), "seconds_sampling": seconds_sampling}
    results |= _measure(model, tokenizer, settings)
    stage.finish(results)
    mix = f"--mix {stage.folder / 'dialogs.jsonl'}"
    print(f"V4: python rejection_sampling.py --rounds 4 {mix} --batch-tokens 1500")


if __name__ == "__main__":
    run(main)
