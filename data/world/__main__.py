"""The command `python -m data.world`: make the world's files, and look at the world."""

import argparse
import os
import sys

from data import world
from data.errors import InputError
from data.world import files
from data.world.bpe import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.world",
        description=world.__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--rules", action="store_true", help="print the annotator's rules, and what can be asked"
    )
    parser.add_argument(
        "--samples", type=int, nargs="?", const=12, help="print some demonstrations"
    )
    parser.add_argument(
        "--train-tokenizer", action="store_true", help="train data/world/toy.tiktoken again"
    )
    parser.add_argument(
        "--write-hashes",
        action="store_true",
        help="accept the world as it is now as the published one",
    )
    args = parser.parse_args()
    if args.samples is not None and args.samples < 1:
        parser.error(f"--samples {args.samples}: wanted: 1 or more")
    if args.rules:
        print_rules()
    elif args.samples:
        print_samples(args.samples)
    elif args.train_tokenizer:
        train_tokenizer()
        print(f"wrote {world.TOKENIZER}")
    elif args.write_hashes:
        accept_world()
        print_files()
    else:
        print_files()


def print_rules() -> None:
    """The annotator's rules, and an example question of each family."""
    print(world.RULES)
    print("WHAT CAN BE ASKED: a question of each family")
    for family, question in world.examples().items():
        print(f"  {family:<12}{question}")


def print_samples(count: int) -> None:
    for dialog in world.sft_rows()[:count]:
        for message in dialog.messages:
            print(f"{message['role']:>9}: {message['content']}")
        print()


def accept_world() -> None:
    """The world as its code makes it now becomes the published one."""
    before = world.world_hash()
    files.write_hashes(files.FOLDER)
    after = world.world_hash()
    if after == before:
        print(f"the world is the published one, {after}")
    else:
        print(f"the world is now {after}; numbers of {before} are of another world")


def print_files() -> None:
    for path in sorted(world.ensure(files.FOLDER).glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").count("\n")
        print(f"{lines:6d} lines  {path}")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, such as `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as SIGPIPE would
    except InputError as mistake:
        sys.exit(f"error: {mistake}")
