"""The toy world: English micro-dialogs, the writers who demonstrate, and the annotator who stands
for the human.

    python -m data.world                      make data/world/files/*.jsonl (also on first use)
    python -m data.world --rules              the annotator's rules, and what can be asked
    python -m data.world --samples            a few demonstrations
    python -m data.world --train-tokenizer    train data/world/toy.tiktoken again
    python -m data.world --write-hashes       accept a changed world as the published one

The judge of every number is `annotator.py`; it can be read alone. The others, in the order in which
they build on each other:

    words.py            the word lists
    families.py         the kinds of questions, each with its right and wrong answers
    splits.py           which questions are held out for dev and test
    asking.py           draws questions
    instructions.py     instructions that every later answer should obey (Ghost Attention)
    writers.py          the people who write answers: good, sloppy, bad and careful ones
    annotator.py        reads an answer, scores it, and compares two
    demonstrations.py   questions with written answers: what SFT learns from
    pairs.py            written preferences, alike in style, one of them wrong
    files.py            makes the files, and checks that they are the published ones
    bpe.py              trains the tokenizer

Everything follows from one seed. What the files hold: `files.make`.
"""

from data.world import words
from data.world.annotator import (
    RULES,
    TIE,
    compare,
    complies,
    content,
    helpfulness,
    is_safe,
    knows,
    read,
    refuses,
    safety,
)
from data.world.asking import ask, assistant, examples, prompts, user
from data.world.demonstrations import dialog, sft_rows, single
from data.world.families import FAMILIES, PROBES, Family, fill
from data.world.files import FOLDER, HASHES, TOKENIZER, ensure, hashes, make, world_hash
from data.world.instructions import (
    constraint,
    constraints,
    draw_constraints,
    instruction,
    made_up_words,
    markers,
    obey,
    obeys,
    under,
)
from data.world.pairs import written_pairs
from data.world.writers import write_answer

__all__ = [
    "FAMILIES",
    "FOLDER",
    "HASHES",
    "PROBES",
    "RULES",
    "TIE",
    "TOKENIZER",
    "Family",
    "ask",
    "assistant",
    "compare",
    "complies",
    "constraint",
    "constraints",
    "content",
    "dialog",
    "draw_constraints",
    "ensure",
    "examples",
    "fill",
    "hashes",
    "helpfulness",
    "instruction",
    "is_safe",
    "knows",
    "made_up_words",
    "make",
    "markers",
    "obey",
    "obeys",
    "prompts",
    "read",
    "refuses",
    "safety",
    "sft_rows",
    "single",
    "under",
    "user",
    "words",
    "world_hash",
    "write_answer",
    "written_pairs",
]
