"""Fuzzing: does anything that a user may hand over end in a traceback, a hang, or half a file?

    python -m tests.fuzz                                   some minutes, all areas
    python -m tests.fuzz --only readers --count 20000
    python -m tests.fuzz --only readers --case 1234        that case again, its files kept

An area is a module here: `readers` (data files), `folders` (model folders), `options` (command
lines), `runs` (commands that really run, on the tiny preset), `stages` (folders of killed runs). A
case follows from seed, area and number alone: valid input is made, something in it is changed
(`mutations.py`), and what the user's command would do with it is judged (`judge.py`). Cases run in
processes that are killed when they take too long (`workers.py`).
"""
