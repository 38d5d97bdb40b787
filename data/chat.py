"""Meta's chat format: dialogs become token ids, with a loss mask and the number of the turn each
token belongs to.

    <s>[INST] <<SYS>>
    system
    <</SYS>>

    user [/INST] answer </s><s>[INST] user [/INST] answer </s>

The same as `chat_completion` of Meta's `generation.py`: each turn is encoded by itself, BOS in
front, EOS behind, a space before EOS. The tags are ordinary text, so they may not occur inside
content.
"""

from typing import NamedTuple

from data.errors import InputError
from data.tokenizer import Tokenizer

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())


class EncodedDialog(NamedTuple):
    """An encoded dialog; three lists of the same length."""

    ids: list[int]
    loss_mask: list[bool]  # true on the tokens that are trained on: answers with their EOS
    turns: list[int]  # the turn (user message and its answer) a token belongs to, from 0


def has_tag(text: str) -> bool:
    """Whether the text holds one of the format's own tags, which a reader could mistake for
    structure.
    """
    return any(tag in text for tag in TAGS)


def fold_system(messages: list[dict]) -> list[dict]:
    """The dialog without its system message, which becomes the head of the first user message."""
    for message in messages:
        if has_tag(message["content"]):
            tag = next(tag for tag in TAGS if tag in message["content"])
            raise InputError(
                f"the {message['role']}'s content holds the tag {tag}, which is reserved for the"
                " chat format"
            )
    if any(message["role"] == "system" for message in messages[1:]):
        raise InputError("a system message stands at the start of a dialog only, and once")
    if messages[0]["role"] != "system":
        return messages
    first = B_SYS + messages[0]["content"] + E_SYS + messages[1]["content"]
    return [{"role": "user", "content": first}, *messages[2:]]


def encode_turn(
    tokenizer: Tokenizer, user: str, answer: str | None = None
) -> tuple[list[int], list[int]]:
    """One turn as (prompt ids, answer ids): BOS `[INST] user [/INST]`, then ` answer ` EOS (no
    answer: no ids).

    The turn is encoded whole, as Meta does; the prompt encoded alone tells where the answer begins.
    """
    prompt = f"{B_INST} {user.strip()} {E_INST}"
    ids = tokenizer.encode(prompt, bos=True)
    if answer is None:
        return ids, []
    whole = tokenizer.encode(f"{prompt} {answer.strip()} ", bos=True, eos=True)
    if whole[: len(ids)] != ids:
        raise InputError(
            f"the tokenizer merges the end of a prompt with its answer, {answer[:40]!r}"
        )
    return ids, whole[len(ids) :]


def encode_dialog(
    tokenizer: Tokenizer,
    messages: list[dict],
    train_on: str = "all",
    answer_ids: list[int] | None = None,
) -> EncodedDialog:
    """Encode a dialog that ends with an answer (paper §3.1: no loss on the tokens of prompts).

    Args:
        messages: optional system message, then user and assistant in turn.
        train_on: "all" answers carry loss, or only the "last" (Ghost Attention, paper §3.3).
        answer_ids: the last answer's ids as a model sampled them, used instead of its text.

    Raises:
        InputError: a tag of the format inside content.
    """
    messages = fold_system(messages)
    last_turn = len(messages) // 2 - 1
    ids, loss_mask, turns = [], [], []
    for turn in range(last_turn + 1):
        user, assistant = messages[2 * turn : 2 * turn + 2]
        prompt, answer = encode_turn(tokenizer, user["content"], assistant["content"])
        if turn == last_turn and answer_ids is not None:
            answer = list(answer_ids)
        is_trained_on = train_on == "all" or turn == last_turn
        ids += prompt + answer
        loss_mask += [False] * len(prompt) + [is_trained_on] * len(answer)
        turns += [turn] * (len(prompt) + len(answer))
    return EncodedDialog(ids, loss_mask, turns)


def sampled_ids(
    tokenizer: Tokenizer, ids: list[int] | None, sampled_with: str, text: str
) -> list[int] | None:
    """The ids that were sampled (ints >= 0), where they may stand for an answer's text; else None.

    They may where this tokenizer's fingerprint is `sampled_with`, they still spell the text, and
    the text holds no tag. Control tokens spell nothing, so they are looked for: BOS may stand
    nowhere, EOS only at the end. What is trained on never writes a control token elsewhere,
    whatever a file says.
    """
    if not ids or sampled_with != tokenizer.fingerprint or max(ids) >= tokenizer.vocab_size:
        return None
    if has_tag(text) or tokenizer.bos_id in ids or tokenizer.eos_id in ids[:-1]:
        return None
    return ids if tokenizer.decode(ids).strip() == text.strip() else None


def encode_prompt(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Encode a dialog that ends with a user message; a model goes on from here.

    Raises:
        InputError: a tag of the format inside content.
    """
    folded = fold_system(messages)
    earlier = encode_dialog(tokenizer, messages[:-1]).ids if len(folded) > 1 else []
    prompt, _ = encode_turn(tokenizer, folded[-1]["content"])
    return earlier + prompt


def end_of_prompt(tokenizer: Tokenizer) -> list[int]:
    """The ids of `[/INST]` at a prompt's end: what the encodings of any two prompts end with alike.
    """
    first = encode_prompt(tokenizer, [{"role": "user", "content": "a"}])
    second = encode_prompt(tokenizer, [{"role": "user", "content": "?"}])
    alike = 0
    while first[-1 - alike] == second[-1 - alike]:
        alike += 1
    return first[len(first) - alike :]
