"""The folders of out/: what each model is, in plain words, and the command that makes it."""

import re
from pathlib import Path

PIPELINE = {  # what makes each folder of out/, in the order of the whole pipeline
    "sft": "python sft.py",
    "reward-helpfulness": "python reward.py",
    "reward-safety": "python reward.py",
    "rlhf-v1": "python rejection_sampling.py --rounds 1-3",
    "rlhf-v2": "python rejection_sampling.py --rounds 1-3",
    "rlhf-v3": "python rejection_sampling.py --rounds 1-3",
    "gatt": "python gatt.py",
    "rlhf-v4": (
        "python rejection_sampling.py --rounds 4 --mix OUT/gatt/dialogs.jsonl --batch-tokens 1500"
    ),
    "rlhf-v4-ppo": "python ppo.py",
    "rlhf-v5": "python rejection_sampling.py --rounds 5 --init OUT/rlhf-v4-ppo",
    "rlhf-v5-no-ppo": "python rejection_sampling.py --rounds 5 --name rlhf-v5-no-ppo",
    "rlhf-v5-ppo": "python ppo.py --init OUT/rlhf-v5",
    "second": "python reward.py --init OUT/sft --seed 100 --mix-share 0,0 --out OUT/second",
}

DESCRIPTIONS = {
    "sft": (
        "SFT (supervised fine-tuning): learned to answer from written demonstrations. All others"
        " start from it."
    ),
    "rlhf-v1": (
        "V1: SFT after one round of rejection sampling. A round samples several answers to each"
        " prompt, keeps the one that the reward models score highest, and trains on it."
    ),
    "gatt": "V3 after Ghost Attention, which trains it to keep an instruction over many turns.",
    "rlhf-v4-ppo": (
        "V4 after PPO (proximal policy optimisation): reinforcement learning, in which each answer"
        " that it samples becomes likelier or less likely by its reward."
    ),
    "rlhf-v5": "V5: V4-PPO after one more round.",
    "rlhf-v5-no-ppo": "A control, to see what PPO added: V4 after one more round, without PPO.",
    "rlhf-v5-ppo": "A control: V5 after PPO.",
}


def command(name: str, out: Path) -> str:
    """What makes a folder of `out`."""
    words = PIPELINE[name].replace("OUT", str(out))
    if str(out) == "out" or "--out" in words:
        return words
    return f"{words} --out {out}"


def describe(name: str, metrics: dict, out: Path) -> str:
    """A model in one or two plain sentences; one that is none of ours is the reader's own."""
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    later_round = re.fullmatch(r"rlhf-v(\d+)", name)
    if not later_round:
        return f"A model of your own, in `{out / name}`."
    version = int(later_round[1])
    text = f"V{version}: V{version - 1} after one more round."
    if "mix" in metrics["stages"].get(name, {}).get("inputs", {}):
        text += " Ghost Attention's dialogs are mixed into what it learned."
    return text


def setting(metrics: dict, name: str, key: str):
    """A stage's setting, as its record has it."""
    return metrics["stages"][name]["settings"].get(key, "?")
