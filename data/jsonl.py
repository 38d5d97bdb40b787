"""JSON-lines files in and out. A bad line is an `InputError` that names file, line, field and
value.
"""

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from data.errors import InputError
from data.records import Answer, Dialog, Pair, Prompt

AXES = ("helpfulness", "safety")
RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
KINDS = ("ordinary", "borderline", "unsafe")


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield ("FILE, line N", object) for each line of a `.jsonl` or `.jsonl.gz` file; blank lines
    are passed over.

    Raises:
        InputError: the file is missing or empty, or a line is not a JSON object or holds half of a
            character.
    """
    path, empty = Path(path), True
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where, empty = f"{path}, line {number}", False
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{where}: not JSON ({error.msg} at column {error.colno})"
                    ) from None
                # a number of thousands of digits, brackets in brackets
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where}: cannot be read ({error})") from None
                if not isinstance(row, dict):
                    raise InputError(f"{where}: a JSON object is wanted, not {line.strip()[:40]}")
                if "\\ud" in line.lower():
                    check_characters(where, row)
                yield where, row
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if empty:
        raise InputError(f"{path}: the file is empty")


def check_characters(where: str, row: dict) -> None:
    """InputError if a text holds half of a character (a surrogate without the other half), which no
    file can hold.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {error.object[error.start: error.end]!a} is half of a character, wanted:"
            " text"
        ) from None


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, atomically: the file is either whole or as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something went wrong


def write_records(path: str | Path, records: Iterable[Prompt | Answer | Pair | Dialog]) -> None:
    """`write_jsonl` of the records' JSON."""
    write_jsonl(path, [record.to_json() for record in records])


def need(where: str, row: dict, field: str, kind: type, default=...):
    """The field of a row, of the wanted type; `default` where it may be missing."""
    if field not in row:
        if default is ...:
            raise InputError(f"{where}: field '{field}' is missing")
        return default
    if not isinstance(row[field], kind):
        raise InputError(
            f"{where}: field '{field}' is {json.dumps(row[field])[:40]}, wanted: {kind.__name__}"
        )
    return row[field]


def need_ids(where: str, row: dict, field: str) -> list[int] | None:
    """The token ids in a row's field, at least one; None where the field is missing."""
    ids = need(where, row, field, list, None)
    if ids is not None and (not ids or not all(type(token) is int and token >= 0 for token in ids)):
        raise InputError(
            f"{where}: field '{field}' is {json.dumps(ids)[:40]}, wanted: token ids, at least one"
        )
    return ids


def check_messages(where: str, field: str, messages, last: str) -> list[dict]:
    """Check a dialog: an optional system message, then user and assistant in turn, ending with the
    role `last`.

    Raises:
        InputError: an unknown role, a wrong order, or content that is missing, empty or not text.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: field '{field}' must be a list of messages, at least one")
    for i, message in enumerate(messages):
        here = f"{where}: field '{field}[{i}]'"
        if not isinstance(message, dict):
            raise InputError(f"{here} must be an object with 'role' and 'content'")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise InputError(f"{here}: role {role!r} is unknown, wanted: system, user or assistant")
        if not isinstance(content, str) or not content.strip():
            raise InputError(
                f"{here}: the {role}'s content is {json.dumps(content)}, wanted: some text"
            )
    system = messages[0]["role"] == "system"
    for i, message in enumerate(messages[system:]):
        wanted = ("user", "assistant")[i % 2]
        if message["role"] != wanted:
            raise InputError(
                f"{where}: field '{field}[{i + system}]' has role {message['role']!r}, wanted:"
                f" {wanted}"
            )
    if messages[-1]["role"] != last:
        what = "the answer is missing" if last == "assistant" else "a prompt ends with the user"
        raise InputError(
            f"{where}: field '{field}' ends with role {messages[-1]['role']!r}: {what}"
        )
    return messages


def read_sft(path: str | Path) -> list[Dialog]:
    """Read dialogs {"messages", "train_on"?: "all" | "last", "is_safety"?, "answer_ids"?,
    "tokenizer"?}. What else stands in a row is kept in `about`.
    """
    dialogs = []
    for where, row in read_jsonl(path):
        check_messages(where, "messages", need(where, row, "messages", list), "assistant")
        if row.get("train_on", "all") not in ("all", "last"):
            raise InputError(
                f"{where}: field 'train_on' is {row['train_on']!r}, wanted: all or last"
            )
        dialog = Dialog(
            messages=row.pop("messages"),
            train_on=row.pop("train_on", "all"),
            is_safety=need(where, row, "is_safety", bool, False),
            answer_ids=need_ids(where, row, "answer_ids"),
            tokenizer=row.get("tokenizer", ""),
            where=where,
        )
        for name in ("is_safety", "answer_ids", "tokenizer"):
            row.pop(name, None)
        dialogs.append(replace(dialog, about=row))
    return dialogs


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts {"prompt": messages, "is_safety", "family"?, "item"?, "kind"?}."""
    prompts = []
    for where, row in read_jsonl(path):
        prompt = _prompt(where, row)
        need(where, row, "is_safety", bool)
        prompts.append(prompt)
    return prompts


def _prompt(where: str, row: dict) -> Prompt:
    """The prompt in a row of prompts or of preferences; without a tag it is not safety."""
    messages = check_messages(where, "prompt", need(where, row, "prompt", list), "user")
    kind = need(where, row, "kind", str, "")
    if "kind" in row and kind not in KINDS:
        raise InputError(f"{where}: field 'kind' is {kind!r}, wanted: {', '.join(KINDS)}")
    return Prompt(
        messages=messages,
        is_safety=need(where, row, "is_safety", bool, False),
        family=need(where, row, "family", str, ""),
        item=need(where, row, "item", str, ""),
        kind=kind,
        constraints=tuple(need(where, row, "constraints", list, [])),
        where=where,
    )


def read_preferences(path: str | Path) -> list[Pair]:
    """Read pairs {"prompt", "chosen", "rejected", "rating"?, "is_safety"?, "chosen_is_safe"?,
    "rejected_is_safe"?, "chosen_ids"?, "rejected_ids"?, "tokenizer"?}.
    """
    pairs = []
    for where, row in read_jsonl(path):
        prompt = _prompt(where, row)
        for side in ("chosen", "rejected"):
            if not need(where, row, side, str).strip():
                raise InputError(f"{where}: field '{side}' is empty")
        if row.get("rating") not in (None, *RATINGS):
            raise InputError(
                f"{where}: field 'rating' is {row['rating']!r}, wanted: {', '.join(RATINGS)}"
            )
        pair = Pair(
            prompt=prompt,
            chosen=row["chosen"],
            rejected=row["rejected"],
            rating=row.get("rating"),
            chosen_is_safe=need(where, row, "chosen_is_safe", bool, None),
            rejected_is_safe=need(where, row, "rejected_is_safe", bool, None),
            chosen_ids=need_ids(where, row, "chosen_ids"),
            rejected_ids=need_ids(where, row, "rejected_ids"),
            tokenizer=row.get("tokenizer", ""),
            temperatures=tuple(row.get("temperatures", ())),
            version=row.get("version", ""),
            axis=row.get("axis", ""),
            extra=bool(row.get("extra")),
            right=row.get("right", ""),
        )
        pairs.append(pair)
    return pairs
