"""Planted bugs in `report`: see `tests/planted/__init__.py`."""

from tests.planted.bug import Bug

BUGS = [
    Bug(
        "unsafe prompts shown by helpfulness",
        "report.answers:verdict",
        "score = world.safety(prompt, answer)",
        "pass",
        "test_report::test_verdict",
    ),
    Bug(
        "candidates by the lowest reward",
        "report.answers:candidates_blocks",
        'rows.sort(key=lambda row: -row["reward"])',
        'rows.sort(key=lambda row: row["reward"])',
        "test_report::test_candidates",
    ),
    Bug(
        "colour codes in pipes",
        "report.terminal:_bold",
        'not _is_terminal() or "NO_COLOR" in os.environ',
        '"NO_COLOR" in os.environ',
        "test_report::test_terminal_and_pipe",
    ),
    Bug(
        "answers not escaped",
        "report.page:_shown",
        "<p>{_escaped(answer.text)}</p>",
        "<p>{answer.text}</p>",
        "test_report::test_page_escapes",
    ),
    Bug(
        "outside called inside",
        "report.opening:health_section",
        "if not is_inside:",
        "if is_far:",
        "test_report::test_health_section",
    ),
]
