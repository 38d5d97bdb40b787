"""Planted bugs in what is typed and printed: see `tests/planted/__init__.py`."""

from tests.planted.bug import Bug

BUGS = [
    Bug(
        "a model's orders reach the terminal",
        "play.chat:stream_answer",
        'print(printable(text[len(shown) :]), end="", flush=True)',
        'print(text[len(shown) :], end="", flush=True)',
        "test_play::test_chat_shows_what_steers",
    ),
    Bug(
        "an answer of several lines in a table",
        "report.terminal:_print_shown",
        "print(printable(line + answer.text, one_line=True))",
        "print(printable(line + answer.text))",
        "test_report::test_tables_show_what_steers",
    ),
    Bug(
        "half a character in the page",
        "report.page:_escaped",
        "html.escape(printable(text))",
        "html.escape(text)",
        "test_report::test_page_shows_what_steers",
    ),
    Bug(
        "a reward model that talks",
        "play.shared:find_model",
        'if _holds(folder, "reward_head.pth"):',
        "if False:",
        "test_play::test_find_model",
    ),
    Bug(
        "seeds below 0",
        "play.shared:check_sampling",
        'check_between(settings, 0, 2**32 - 1, "seed")',
        "pass",
        "test_play::test_wrong_arguments",
    ),
    Bug(
        "an experiment over no seeds",
        "experiments.shared.settings:ExperimentSettings.__post_init__",
        "if value == () and field.name not in MAY_BE_EMPTY:",
        "if False:",
        "test_experiments::test_settings_out_of_range",
    ),
    Bug(
        "infinite ends of intervals as numbers",
        "report.numbers:number",
        "end is not None and math.isfinite(end)",
        "end is not None",
        "test_report::test_families_table_of_few_items",
    ),
]
