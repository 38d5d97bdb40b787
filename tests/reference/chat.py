"""Meta's `chat_completion` (llama/generation.py), line by line, with the encoder as a parameter."""

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"


def prompt_ids(encode, dialog: list[dict]) -> list[int]:
    """Ids of a dialog that ends with a user message. encode(text, bos, eos) -> ids."""
    if dialog[0]["role"] == "system":
        content = B_SYS + dialog[0]["content"] + E_SYS + dialog[1]["content"]
        dialog = [{"role": dialog[1]["role"], "content": content}] + dialog[2:]
    ids = []
    for prompt, answer in zip(dialog[::2], dialog[1::2], strict=False):
        text = f"{B_INST} {prompt['content'].strip()} {E_INST} {answer['content'].strip()} "
        ids += encode(text, True, True)
    return ids + encode(f"{B_INST} {dialog[-1]['content'].strip()} {E_INST}", True, False)


def spans_of_answers(
    ids: list[int], bos: int, eos: int, lengths_of_prompts: list[int]
) -> list[bool]:
    """True from the end of each turn's prompt to its EOS, found by walking through the ids."""
    mask, turn, inside = [], -1, 0
    for token in ids:
        if token == bos:
            turn, inside = turn + 1, 0
        mask.append(inside >= lengths_of_prompts[turn])
        inside += 1
        assert token != eos or mask[-1]
    return mask
