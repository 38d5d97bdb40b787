"""Text to tokens and back: records, tokenizer, chat format, JSONL files, batches, the toy world and
its annotator.
"""

from data.batches import batches_by_length, micro_batches, pad, plan_steps
from data.chat import EncodedDialog, encode_dialog, encode_prompt, has_tag
from data.errors import InputError
from data.jsonl import (
    read_jsonl,
    read_preferences,
    read_prompts,
    read_sft,
    write_jsonl,
    write_records,
)
from data.printable import printable
from data.records import Answer, Dialog, Pair, Prompt
from data.tokenizer import Tokenizer

__all__ = [
    "Answer",
    "Dialog",
    "EncodedDialog",
    "InputError",
    "Pair",
    "Prompt",
    "Tokenizer",
    "batches_by_length",
    "encode_dialog",
    "encode_prompt",
    "has_tag",
    "micro_batches",
    "pad",
    "plan_steps",
    "printable",
    "read_jsonl",
    "read_preferences",
    "read_prompts",
    "read_sft",
    "write_jsonl",
    "write_records",
]
