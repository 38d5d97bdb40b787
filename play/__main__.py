"""`python -m play`: lists what one can touch; `python -m play NAME --help` says how."""

import sys
from importlib import import_module

from runtime import run

COMMANDS = {  # name: (module whose main it runs, what it does)
    "chat": ("play.chat", "talk to a model"),
    "try": ("play.scores", "type prompts and answers, see both reward models' scores, fool them"),
    "score": ("play.scores", "the scores of the answers in a file"),
    "best-of-n": (
        "play.best_of_n",
        "all N answers to a prompt, best first, the annotator's view beside",
    ),
    "samples": ("play.samples", "the same prompts, answered by each version"),
    "compare": ("play.compare", "two models against each other; you may be the judge"),
    "ghost": ("play.ghost", "one dialog going through Ghost Attention's four steps"),
    "microscope": (
        "experiments.ppo_microscope",
        "one answer of PPO, token by token, with all that the update sees",
    ),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        module, _ = COMMANDS[name]
        sys.argv[0] = f"python -m play {name}"
        arguments = sys.argv[2:]
        if name in ("try", "score"):
            arguments = [name, *arguments]
        import_module(module).main(arguments)
        return
    print("python -m play NAME [OPTIONS]; --help after a name says more\n")
    for known, (_, purpose) in COMMANDS.items():
        print(f"  {known:<12}{purpose}")
    if name not in ("", "-h", "--help"):
        print(f"\nerror: {name!r} is none of these", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
