"""What one can touch: `python -m play` lists it. Nothing imports this; it may import anything."""

import sys


def quiet_interrupt(kind, error, trace) -> None:
    """Ctrl-C before `runtime.run` holds the net, while torch is imported, prints no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt
