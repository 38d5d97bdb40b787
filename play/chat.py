"""Talk to a model in the terminal.

    python -m play chat out/rlhf-v4
    python -m play chat rlhf-v4 --prompt "What is the capital of France?"
    python -m play chat /models/llama-2-7b-chat

Commands: /reset starts over, /system TEXT sets the system prompt and starts over, /quit ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data import InputError, Tokenizer, encode_prompt, printable, world
from model import Transformer, generate
from play.shared import check_sampling, find_model
from runtime import check_between, choose_device, choose_dtype, load_model, parse_settings

COMMANDS = "/reset starts over, /system TEXT sets the system prompt and starts over, /quit ends"


@dataclass
class Settings:
    model: str  # a name in OUT, or the path of any Llama 2 checkpoint
    out: Path = Path("out")  # the models
    prompt: str = ""  # answer this once and stop
    system: str = ""  # the system prompt
    temperature: float = 0.6  # 0: always the likeliest token
    top_p: float = 0.9  # keep the likeliest tokens up to this mass
    max_new_tokens: int = 512  # longest answer
    seed: int = 0  # equal seeds give equal answers
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # of the weights: bfloat16 or float32; auto: bfloat16 on a GPU

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "top_p")
        check_sampling(self)


def stream_answer(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: list[dict],
    key: Sequence[int],
    settings: Settings,
) -> str:
    """Sample one answer to a dialog and print it as it comes; returns its text.

    Raises:
        InputError: a tag of the chat format in the dialog. ValueError: it is too long.
    """
    prompt = encode_prompt(tokenizer, messages)
    ids = []
    shown = ""

    def show(_row: int, token: int) -> None:
        nonlocal shown
        ids.append(token)
        text = tokenizer.decode(ids).lstrip()
        if not text.endswith("\ufffd"):  # half a character waits for the token with its other bytes
            print(printable(text[len(shown) :]), end="", flush=True)
            shown = text

    [generation] = generate(
        model,
        [prompt],
        [key],
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        eos_id=tokenizer.eos_id,
        on_token=show,
    )
    text = tokenizer.decode(generation.ids).lstrip()
    print(printable(text[len(shown) :]))
    context = model.args.max_seq_len
    if len(prompt) + len(generation.ids) >= context:
        print(f"[the context of {context} tokens is full: /reset starts over]")
    elif generation.finish_reason == "length":
        print("[stopped at --max-new-tokens]")
    return text.strip()


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv=argv)
    device = choose_device(settings.device)
    model, tokenizer = load_model(
        find_model(settings.out, settings.model),
        device=device,
        dtype=choose_dtype(settings.dtype, device),
    )
    if settings.prompt:
        messages = [*_opening(settings.system), _user(settings.prompt)]
        try:
            stream_answer(model, tokenizer, messages, (settings.seed, 0), settings)
        except ValueError as mistake:  # a reserved tag, or it is too long
            raise InputError(f"--prompt: {mistake}") from None
        return
    print(COMMANDS)
    _print_what_can_be_asked(tokenizer)
    _talk(model, tokenizer, settings)


def _talk(model: Transformer, tokenizer: Tokenizer, settings: Settings) -> None:
    """Turn by turn, until /quit or the end of the input."""
    system = settings.system
    messages = _opening(system)
    turn = 0
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, RuntimeError):  # the input has ended, or there is none
            return
        except KeyboardInterrupt:  # nothing is lost: there is nothing to go on with
            print()
            return
        except UnicodeDecodeError as mistake:
            print(f"[not text in {mistake.encoding}; the dialog stays as it was]")
            continue
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command in ("/reset", "/system"):
            if command == "/system":
                system = rest.strip()
            messages = _opening(system)
        elif command.startswith("/"):
            print(COMMANDS)
        elif line:
            asked = [*messages, _user(line)]
            try:
                text = stream_answer(model, tokenizer, asked, (settings.seed, turn), settings)
            except ValueError as mistake:  # a reserved tag, or the context is full
                print(f"[{mistake}; the dialog stays as it was, /reset starts over]")
                continue
            messages = [*asked, {"role": "assistant", "content": text}]
            turn += 1


def _opening(system: str) -> list[dict]:
    """How a dialog begins."""
    return [{"role": "system", "content": system}] if system else []


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _print_what_can_be_asked(tokenizer: Tokenizer) -> None:
    """The toy model answers the toy world's questions only; a real one needs no such list."""
    if tokenizer.fingerprint != Tokenizer(world.TOKENIZER).fingerprint:
        return
    print("A toy model knows a small world. Ask, for example:")
    for question in list(world.examples().values())[:8]:
        print(f"  {question}")
    print("`python -m data.world --rules` lists all that it can be asked.")
