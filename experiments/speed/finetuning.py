"""How fast is supervised fine-tuning on ragged dialogs, beside TRL's SFTTrainer?

    python -m experiments.speed.finetuning

The toy world's demonstrations, one epoch over some of them, from rows of ids to the last update:
batches, padding and logs included, what stands before the first step and behind the last left out.
What counts are answer tokens, the ones with a loss. Equal numbers of dialogs a step on average,
float32, no packing.

TRL pads the dialogs of a step as they come: one long dialog pads all others, and that is most of
the difference. A further row lets it sort them by length, which makes its steps less of a fair
sample. Its longest step then comes first and is not timed, in its favour.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from data import EncodedDialog, Tokenizer, read_sft, world
from experiments.speed import peers
from experiments.speed.measuring import Case, Settings, Time, main, time_steps
from experiments.speed.sizes import Size, flops
from model import PRESETS, Transformer
from sft import encode_dialogs, finetune

KIND = "SFT on ragged dialogs, end to end"


def cases(settings: Settings) -> Iterator[Case]:
    tokenizer = Tokenizer(world.TOKENIZER)
    demonstrations = read_sft(world.ensure() / "sft.jsonl")
    small = settings.small.with_words()
    small = replace(small, args=replace(small.args, max_seq_len=2048))
    toy = Size("toy", PRESETS["tiny" if settings.tiny else "toy"]).with_words()
    works = [(toy, 350, 400), (small, 2048, 600)]  # size, tokens a step, dialogs
    if settings.tiny:
        works = [(toy, 60, 6)]
    for size, batch_tokens, count in works:
        encoded = encode_dialogs(tokenizer, demonstrations[:count], size.args.max_seq_len)
        name = f"{size.name}, {batch_tokens:,} tokens a step"
        yield case(size, encoded, batch_tokens, name, target=1.6)
        yield case(size, encoded, batch_tokens, f"{name}, TRL sorts", by_length=True)


def case(
    size: Size,
    dialogs: list[EncodedDialog],
    batch_tokens: int,
    name: str,
    *,
    by_length: bool = False,
    target: float | None = None,
) -> Case:
    """One epoch over the dialogs."""
    lengths = [len(dialog.ids) for dialog in dialogs]
    answers = sum(sum(dialog.loss_mask) for dialog in dialogs)
    rows = max(1, round(batch_tokens * len(dialogs) / sum(lengths)))
    model = size.model()

    def ours() -> Time:
        with tempfile.TemporaryDirectory() as folder:
            return time_steps(
                lambda: finetune(
                    model,
                    dialogs,
                    epochs=1,
                    batch_tokens=batch_tokens,
                    learning_rate=1e-4,
                    folder=Path(folder),
                    phase="speed",
                    seed=0,
                )
            )

    skipped = peers.missing("transformers", "trl", "datasets")
    return Case(
        kind=KIND,
        name=name,
        unit="answer tokens",
        amount=answers,
        ours=ours,
        theirs=None if skipped else their_run(model, dialogs, rows, by_length),
        peer="TRL SFTTrainer",
        skipped=skipped,
        target=target,
        flops=3 * flops(size.args, lengths, answers),
    )


def their_run(
    model: Transformer, dialogs: list[EncodedDialog], rows: int, by_length: bool
) -> Callable[[], Time]:
    """The same epoch by TRL; a new trainer each time, made before the clock starts."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    their_model = peers.llama(model)
    tokenizer = peers.tokenizer(model.args.vocab_size, pad_id=0)
    columns = {
        "input_ids": [dialog.ids for dialog in dialogs],
        "completion_mask": [[int(one) for one in dialog.loss_mask] for dialog in dialogs],
    }
    dataset = datasets.Dataset.from_dict(columns)
    changes = {"max_length": None, "completion_only_loss": True}
    if by_length:
        changes["train_sampling_strategy"] = "group_by_length"

    def run() -> Time:
        with tempfile.TemporaryDirectory() as folder:
            settings = peers.trainer_settings(Path(folder), rows, **changes)
            trainer = SFTTrainer(
                model=their_model,
                args=SFTConfig(**settings),
                train_dataset=dataset,
                processing_class=tokenizer,
            )
            return time_steps(peers.silence(trainer).train)

    return run


if __name__ == "__main__":
    main(cases, __doc__)
