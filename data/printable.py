"""Text of a model or of a file, made safe to print."""

import re

# what moves a terminal's cursor, gives it orders, or turns the direction of what it shows
STEERING = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"


def printable(text: str, one_line: bool = False) -> str:
    r"""The text with every character that could steer a terminal written out.

    These are control characters (escape, backspace, carriage return, DEL, ...), U+2028 and U+2029,
    which end a line, overrides of the writing direction (U+202A to U+202E, U+2066 to U+2069), and
    lone surrogates, which no file can hold. Newlines and tabs stay.

    Args:
        one_line: newlines and tabs are written out, too, as the cells of a table need it.

    >>> print(printable("\x1b[2J cleared"), printable("a\nb", one_line=True))
    \x1b[2J cleared a\nb
    """
    written_out = STEERING + "\t\n" if one_line else STEERING
    return re.sub(
        f"[{written_out}]", lambda found: found[0].encode("unicode_escape").decode(), text
    )
