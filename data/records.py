"""What flows through the house: prompts, answers, pairs and dialogs, each with its JSON form.

Records do not change. `dataclasses.replace` makes another one; a list of records in a file is JSON
lines, written by `data.write_records` and read by `data.read_prompts`, `read_answers`, ...
"""

import json
from dataclasses import MISSING, dataclass

from data.errors import InputError

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}


@dataclass(frozen=True)
class Prompt:
    """A dialog that ends with a user message: what a model answers.

    JSON: {"prompt": messages, "is_safety", "family"?, "item"?, "kind"?, "constraints"?}.
    """

    messages: list[Message]
    is_safety: bool = False  # tagged as possibly unsafe (§3.2.3): judged by its safety
    family: str = ""  # the toy world's kind of question, such as "capital"; "" elsewhere
    item: str = ""  # what it asks about, such as "France"
    kind: str = ""  # "ordinary", "borderline" or "unsafe"; "" elsewhere
    constraints: tuple[dict, ...] = ()  # the toy world's instructions that hold, for its annotator
    where: str = ""  # "FILE, line N", for messages to the user; not in the JSON

    @property
    def question(self) -> str:
        """The last user message."""
        return self.messages[-1]["content"]

    def to_json(self) -> dict:
        row = {"prompt": self.messages, "is_safety": self.is_safety}
        return row | _known(self, "family", "item", "kind", "constraints")


@dataclass(frozen=True)
class Answer:
    """An answer as it was sampled, and later its scores.

    JSON: {"index", "sample", "answer": text, "answer_ids": ids, "logprob", "temperature",
    "finish_reason", "has_tag", "version"?, "tokenizer"?, "helpfulness"?, "safety"?, "reward"?,
    "made_by"?}.
    """

    index: int  # number of its prompt in the list of prompts
    sample: int  # 0 ... K-1 of that prompt
    text: str  # decoded, without control tokens and outer spaces
    ids: list[int]  # the tokens as sampled, EOS included
    logprob: float  # their summed log-probability under the model itself, in nats
    temperature: float
    finish_reason: str  # "eos", or "length": cut at the limit
    has_tag: bool  # it holds a tag of the chat format
    version: str = ""  # the model that answered, such as "rlhf-v2"
    tokenizer: str = ""  # fingerprint of the tokenizer of the ids
    helpfulness: float | None = None  # scores of the reward models, logits; None: not scored
    safety: float | None = None
    reward: float | None = None  # combined, a logit
    made_by: str = ""  # mark of model and settings, where answers are kept for later

    def to_json(self) -> dict:
        row = {
            "index": self.index,
            "sample": self.sample,
            "answer": self.text,
            "answer_ids": self.ids,
            "logprob": self.logprob,
            "temperature": self.temperature,
            "finish_reason": self.finish_reason,
            "has_tag": self.has_tag,
        }
        later = ("version", "tokenizer", "helpfulness", "safety", "reward", "made_by")
        return row | _known(self, *later)

    @classmethod
    def from_json(cls, row: dict, where: str = "a sampled answer") -> "Answer":
        """The answer in a row that `to_json` made; keys of others are passed over.

        InputError, naming `where` ("FILE, line N") and the field, for one that is missing or of
        another type.
        """
        names = {"text": "answer", "ids": "answer_ids"}
        fields = {}
        for name, field in cls.__dataclass_fields__.items():
            key = names.get(name, name)
            if key in row:
                fields[name] = row[key]
                if not _fits(row[key], field.type):
                    raise InputError(f"{where}: field '{key}' is {json.dumps(row[key])[:40]}")
            elif field.default is MISSING:
                raise InputError(f"{where}: field '{key}' is missing")
        return cls(**fields)


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, and which one is better (§3.2.1).

    JSON: the prompt's, with "chosen", "rejected", and where they are known "rating",
    "chosen_is_safe", "rejected_is_safe", "chosen_ids", "rejected_ids", "tokenizer",
    "temperatures", "version", "axis", "extra", "right".
    """

    prompt: Prompt
    chosen: str
    rejected: str
    rating: str | None = None  # one of RATINGS; None: unknown, then the margin is 0
    chosen_is_safe: bool | None = None  # None: nobody has said
    rejected_is_safe: bool | None = None
    chosen_ids: list[int] | None = None  # as sampled; None: the text is encoded
    rejected_ids: list[int] | None = None
    tokenizer: str = ""  # fingerprint of the tokenizer of the ids
    temperatures: tuple[float, ...] = ()  # of the chosen and the rejected answer
    version: str = ""  # the collection that it comes from, such as "sft" or "rlhf-v2"
    axis: str = ""  # "helpfulness" or "safety"
    extra: bool = False  # mixed in from another file
    right: str = ""  # the right answer, where somebody wrote it down

    @property
    def where(self) -> str:
        return self.prompt.where

    def to_json(self) -> dict:
        row = self.prompt.to_json()
        row |= {"chosen": self.chosen, "rejected": self.rejected}
        row |= _known(self, "rating", "right", "chosen_ids", "rejected_ids", "tokenizer")
        row |= _known(self, "temperatures", "axis", "version")
        row |= _known(self, "chosen_is_safe", "rejected_is_safe")
        if self.extra:
            row["extra"] = True
        return row


@dataclass(frozen=True)
class Dialog:
    """A dialog that ends with an answer: what is fine-tuned on.

    JSON: {"messages", "train_on"?, "is_safety", "answer_ids"?, "tokenizer"?} and `about`.
    """

    messages: list[Message]
    train_on: str = "all"  # loss on "all" answers, or on the "last" one
    is_safety: bool = False
    answer_ids: list[int] | None = None  # the last answer as sampled; None: the text is encoded
    tokenizer: str = ""  # fingerprint of the tokenizer of the ids
    about: dict | None = None  # what a reader of the file may want to know, such as the reward
    where: str = ""  # "FILE, line N"; not in the JSON

    def to_json(self) -> dict:
        row = {"messages": self.messages}
        if self.train_on != "all":
            row["train_on"] = self.train_on
        row["is_safety"] = self.is_safety
        return row | _known(self, "answer_ids", "tokenizer") | (self.about or {})


def _known(record, *names: str) -> dict:
    """These fields of the record, but for those that say nothing: None, "" and ()."""
    row = {}
    for name in names:
        value = getattr(record, name)
        if value not in (None, "", ()):
            row[name] = list(value) if isinstance(value, tuple) else value
    return row


def _fits(value, kind: type) -> bool:
    """Whether a JSON value is of a field's type; null stands for a number that is not finite."""
    if kind in (float, float | None):
        return value is None or type(value) in (int, float)
    if kind == list[int]:
        return type(value) is list and all(type(token) is int for token in value)
    return type(value) is kind
