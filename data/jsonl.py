"""JSON-lines files in and out. A bad line is an `InputError` that names file, line, field and
value.
"""

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from data.errors import InputError
from data.records import Answer, Dialog, Pair, Prompt

AXES = ("helpfulness", "safety")
RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
KINDS = ("ordinary", "borderline", "unsafe")
LONGEST_LINE = 1 << 24  # characters; a dialog that fills a context of 4,096 tokens has some 20,000
DEEPEST = 100  # lists and objects in each other; ours are 4 deep


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield ("FILE, line N", object) for each line of a `.jsonl` or `.jsonl.gz` file in UTF-8, with
    or without a byte order mark; blank lines are passed over.

    Raises:
        InputError: the file is missing, empty, or broken (`.gz`), or it unpacks without end. Or a
            line is too long (LONGEST_LINE), not UTF-8, or not a JSON object: NaN, infinite numbers,
            a field that stands twice, half a character and deep nesting (DEEPEST) are refused, too.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    open_file = gzip.open if path.suffix == ".gz" else open
    # in characters; real text becomes some 10 times smaller when it is packed
    most = max(10_000_000, 100 * path.stat().st_size)
    empty = True
    number, total = 0, 0
    # surrogateescape: `_parse_line` says in which line a byte is not UTF-8
    with open_file(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                total += len(line)
                where = f"{path}, line {number}"
                if total > most:
                    raise InputError(
                        f"{where}: unpacked, the file is more than 100 times as large as packed;"
                        " text is not: wanted is another file, or an unpacked one"
                    )
                if len(line) > LONGEST_LINE:
                    raise InputError(
                        f"{where}: more than {LONGEST_LINE} characters, wanted: one row a line"
                    )
                if line.strip():
                    empty = False
                    yield where, _parse_line(where, line)
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(
                f"{path}: cannot be read behind line {number}, it is broken or cut short ({error})"
            ) from None
    if empty:
        raise InputError(f"{path}: the file is empty")


def _parse_line(where: str, line: str) -> dict:
    """The JSON object in a line."""
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: cannot be read as UTF-8 text (column {error.start + 1})"
            ) from None
    try:
        row = STRICT.decode(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # such as a number of thousands of digits
        raise InputError(f"{where}: cannot be read ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON object is wanted, not {line.strip()[:40]}")
    if line.count("[") + line.count("{") > DEEPEST and _is_deeper(row, DEEPEST):
        raise InputError(f"{where}: lists and objects in each other, more than {DEEPEST} deep")
    if "\\ud" in line.lower():
        check_characters(where, row)
    return row


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError where a field stands twice, since one of the two would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field '{twice[:40]}' stands twice")
    return row


def _finite(text: str) -> float:
    """A JSON number; ValueError for NaN, Infinity and 1e999, which count as no numbers."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no finite number")
    return number


STRICT = json.JSONDecoder(parse_float=_finite, parse_constant=_finite, object_pairs_hook=_object)


def _is_deeper(value, levels: int) -> bool:
    """Whether lists and objects stand in each other more than so many levels deep."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deeper(one, levels - 1) for one in value)


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
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as problem:  # a full disk does not say which file
        problem.filename = problem.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)  # there only if something went wrong


def write_records(path: str | Path, records: Iterable[Prompt | Answer | Pair | Dialog]) -> None:
    """`write_jsonl` of the records' JSON."""
    write_jsonl(path, [record.to_json() for record in records])


def need(where: str, row: dict, field: str, kind: type, default=...):
    """The field of a row, of the wanted type; `default` where it may be missing, and is or is null.
    """
    if field not in row or (row[field] is None and default is not ...):
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
            raise InputError(
                f"{here}: role {repr(role)[:40]} is unknown, wanted: system, user or assistant"
            )
        if not isinstance(content, str) or not content.strip():
            raise InputError(
                f"{here}: the {role}'s content is {json.dumps(content)[:40]}, wanted: some text"
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
                f"{where}: field 'train_on' is {repr(row['train_on'])[:40]}, wanted: all or last"
            )
        dialog = Dialog(
            messages=row.pop("messages"),
            train_on=row.pop("train_on", "all"),
            is_safety=need(where, row, "is_safety", bool, False),
            answer_ids=need_ids(where, row, "answer_ids"),
            tokenizer=need(where, row, "tokenizer", str, ""),
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
        raise InputError(f"{where}: field 'kind' is {repr(kind)[:40]}, wanted: {', '.join(KINDS)}")
    constraints = need(where, row, "constraints", list, [])
    for i, constraint in enumerate(constraints):
        if not isinstance(constraint, dict):
            raise InputError(
                f"{where}: field 'constraints[{i}]' is {json.dumps(constraint)[:40]}, wanted: an"
                " object"
            )
    return Prompt(
        messages=messages,
        is_safety=need(where, row, "is_safety", bool, False),
        family=need(where, row, "family", str, ""),
        item=need(where, row, "item", str, ""),
        kind=kind,
        constraints=tuple(constraints),
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
        if row["chosen"] == row["rejected"]:
            raise InputError(
                f"{where}: fields 'chosen' and 'rejected' are equal, wanted: two different answers"
            )
        if row.get("rating") not in (None, *RATINGS):
            raise InputError(
                f"{where}: field 'rating' is {repr(row['rating'])[:40]}, wanted:"
                f" {', '.join(RATINGS)}"
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
            tokenizer=need(where, row, "tokenizer", str, ""),
            temperatures=_temperatures(where, row),
            version=need(where, row, "version", str, ""),
            axis=need(where, row, "axis", str, ""),
            extra=need(where, row, "extra", bool, False),
            right=need(where, row, "right", str, ""),
        )
        pairs.append(pair)
    return pairs


def _temperatures(where: str, row: dict) -> tuple[float, ...]:
    """Those at which a pair's answers were sampled; none where the row does not say."""
    temperatures = need(where, row, "temperatures", list, [])
    for temperature in temperatures:
        if type(temperature) not in (int, float) or not 0 <= temperature <= 100:
            raise InputError(
                f"{where}: field 'temperatures' is {json.dumps(temperatures)[:40]}, wanted: numbers"
                " from 0 to 100"
            )
    return tuple(temperatures)
