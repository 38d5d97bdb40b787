"""Experiments: each asks one question, and answers it with numbers over seeds.

    python -m experiments               what there is: question, command, answer
    python -m experiments.NAME          one of them
    python -m experiments.all           everything that is published, made again
    python -m experiments.publish       docs/results.md, made from experiments/results

Each module has

    Settings              whose defaults are what is published
    measure(...)          what one seed gives
    section(result)       the published result in words and tables: the answer comes first
    draw(result, file)    its picture, where it has one
    main()                measures, saves, draws, prints the section

What several of them need stands in `experiments/shared`.
"""

import sys


def quiet_interrupt(kind, error, trace) -> None:
    """Ctrl-C before `runtime.run` holds the net, while torch is imported, prints no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt
