"""One planted bug."""

from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    function: str  # module:function or module:Class.method
    right: str  # a piece of its source, there exactly once
    wrong: str
    test: str  # file::test, without tests/ and .py
