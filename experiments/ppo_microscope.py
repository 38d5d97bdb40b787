"""What does PPO's update see? One answer under the microscope, token by token.

    python -m experiments.ppo_microscope --out out --prompt "Name three animals."

after `python ppo.py`.

One rollout of the policy that PPO made, against the policy that it started from and with the value
network as it was at the end. The whitening of the reward needs other answers to compare with: the
prompt stands among `--batch` training prompts. Prints the table. With `--publish` it also writes
experiments/results/ppo_microscope.json and .png.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from data import InputError, Prompt, Tokenizer, read_prompts, world
from experiments.shared import results
from experiments.shared.pictures import save_picture
from experiments.shared.settings import ExperimentSettings
from model import Transformer
from ppo import Critic, Rollout, kl_penalty, rollout
from ppo import Settings as PPOSettings
from rejection_sampling import RewardModels
from report import Figure, Section, Table, print_tables
from runtime import (
    choose_device,
    load_checkpoint,
    load_model,
    parse_settings,
    require,
    run,
    set_threads,
)

COLUMNS = ("token", "log π", "log π_0", "KL", "reward", "value", "advantage", "return")
SHOWN_OF_ANSWER = (
    *("index", "answer", "answer_ids", "finish_reason", "has_tag"),
    *("helpfulness", "safety", "reward"),
)
KEPT_SETTINGS = ("beta", "gamma", "lam", "cut_reward", "max_new_tokens")  # of the rollout


@dataclass
class Settings(ExperimentSettings):
    out: Path = Path("out")  # reads OUT/NAME and OUT/NAME-ppo
    name: str = "rlhf-v4"  # the model that PPO started from
    prompt: str = "Name three animals."  # what to answer
    # whether the prompt counts as tagged, so that the safety model rewards it
    is_safety: bool = False
    batch: int = 64  # answers in the rollout
    seed: int = 0  # of the sampling
    device: str = "cpu"  # auto, cpu, cuda, mps
    threads: int = 1  # CPU threads
    publish: bool = False  # also write experiments/results/ppo_microscope.json and .png

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or not self.prompt.strip():
            raise InputError("--name and --prompt must not be empty")


class Players(NamedTuple):
    """What a rollout needs, as PPO left it."""

    policy: Transformer
    reference: Transformer
    critic: Critic
    reward_models: RewardModels
    tokenizer: Tokenizer
    settings: PPOSettings


def load_players(root: Path, name: str, device: torch.device) -> Players:
    """The models of ROOT/NAME-ppo, its settings and reward models."""
    folder = require(root / f"{name}-ppo", f"python ppo.py --init {root / name}")
    record = json.loads((folder / "stage.json").read_text("utf-8"))
    reward_folders = {}
    for axis, path in record["results"]["reward_models"].items():
        reward_folders[axis] = Path(path)
    policy, tokenizer = load_model(folder, device)
    reference, _ = load_model(root / name, device)
    # the value network may have other layers than the policy
    is_reward_model = record["settings"]["value_init"] == "reward"
    body, _ = load_model(reward_folders["helpfulness"] if is_reward_model else folder, device)
    critic = Critic(body)
    critic.load_state_dict(load_checkpoint(folder / "critic.pth", device))
    kept = {key: record["settings"][key] for key in KEPT_SETTINGS}
    reward_models = RewardModels(reward_folders, device)
    return Players(policy, reference, critic, reward_models, tokenizer, PPOSettings(**kept))


def token_rows(batch: Rollout, row: int, tokenizer: Tokenizer) -> list[dict]:
    """One answer of a rollout as rows {"mask", "token", …}: the end of its prompt (masked out),
    then each of its tokens.
    """
    mask = batch.mask[row]  # (seq)
    kl = kl_penalty(batch.logprobs, batch.reference, batch.mask)[row]  # (seq)
    columns = {
        "log π": batch.logprobs[row],
        "log π_0": batch.reference[row],
        "KL": kl,
        "reward": batch.rewards[row],
        "value": batch.values[row],
        "advantage": batch.advantages[row],
        "return": batch.returns[row],
    }
    places = mask.nonzero()
    first = max(0, places.min().item() - 3)
    last = places.max().item()
    rows = []
    for t in range(first, last + 1):
        token = batch.tokens[row, t].item()
        text = "</s>" if token == tokenizer.eos_id else tokenizer.decode([token])
        numbers = {name: values[t].item() for name, values in columns.items()}
        rows.append({"mask": int(mask[t]), "token": text, **numbers})
    return rows


def measure(players: Players, settings: Settings) -> dict:
    """One rollout, in which the prompt is the first: its answer, token by token."""
    asked = Prompt([{"role": "user", "content": settings.prompt}], settings.is_safety)
    others = read_prompts(world.ensure() / "prompts-train.jsonl")[: settings.batch - 1]
    batch = rollout(
        players.policy,
        players.reference,
        players.critic,
        players.reward_models,
        [asked, *others],
        (settings.seed, "microscope"),
        players.settings,
    )
    answer = batch.answers[0].to_json()
    return {
        "prompt": settings.prompt,
        "answer": {key: answer[key] for key in SHOWN_OF_ANSWER},
        "whitened": batch.scores[0].item(),
        "tokens": token_rows(batch, 0, players.tokenizer),
    }


def tokens_table(result: dict) -> Table:
    """The answer, a row for each token."""
    cells = []
    for row in result["tokens"]:
        numbers = [f"{row[name]:.3f}" for name in COLUMNS[1:]]
        cells.append([str(row["mask"]), repr(row["token"]), *numbers])
    caption = "Everything that the update sees of one answer."
    small_print = (
        "Mask: 1 on the answer's tokens, which are learned from. π is the policy, π_0 what it"
        " started from. The reward of a token is the KL penalty; the last one also gets the"
        " answer's score. Value: what the value network expects from there on. Advantage: how much"
        " better the token was than expected."
    )
    return Table(caption, ["mask", *COLUMNS], cells, small_print)


def section(result: dict) -> Section:
    """One answer, its scores, its tokens."""
    answer = result["answer"]
    rows = [row for row in result["tokens"] if row["mask"]]
    best = max(rows, key=lambda row: row["advantage"])
    worst = min(rows, key=lambda row: row["advantage"])
    return Section(
        "What does PPO's update see? One answer, token by token",
        [
            (
                f"A credit for each token: in this answer it goes from {worst['advantage']:.2f} (at"
                f" {worst['token'].strip()!r}) to {best['advantage']:.2f} (at"
                f" {best['token'].strip()!r})."
            ),
            (
                f"\"{result['prompt']}\" is answered with \"{answer['answer']}\" Its helpfulness is"
                f" {answer['helpfulness']:.2f}, its safety {answer['safety']:.2f}, the reward"
                f" {answer['reward']:.2f} (logits), whitened among the batch"
                f" {result['whitened']:.2f}."
            ),
            tokens_table(result),
            Figure(
                "One answer's log-probabilities, values, advantages.",
                file=results.RESULTS / "ppo_microscope.png",
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """Log-probabilities above, values in the middle, advantage, reward and KL below, by token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["tokens"] if row["mask"]]
    size = (max(6, 0.42 * len(rows)), 6.4)
    figure, panels = plt.subplots(3, 1, figsize=size, sharex=True, layout="constrained")
    shown = (("log π", "log π_0"), ("value", "return"), ("advantage", "reward", "KL"))
    places = range(len(rows))
    for panel, names in zip(panels, shown, strict=True):
        for name in names:
            panel.plot(places, [row[name] for row in rows], marker=".", label=name)
        panel.axhline(0, color="gray", linewidth=0.6)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    tokens = [row["token"].replace("$", r"\$") for row in rows]
    panels[2].set_xticks(places, tokens, rotation=60, ha="right")
    answer = result["answer"]
    title = (
        f"{result['prompt']}  →  {answer['answer']}\nhelpfulness {answer['helpfulness']:.2f},"
        f" safety {answer['safety']:.2f}, reward {answer['reward']:.2f} (logits), whitened"
        f" {result['whitened']:.2f}"
    )
    figure.suptitle(title.replace("$", r"\$"), fontsize=9, wrap=True)
    save_picture(figure, file)


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv=argv)
    set_threads(settings.threads)
    players = load_players(settings.out, settings.name, choose_device(settings.device))
    result = measure(players, settings)
    if settings.publish:
        results.finish("ppo_microscope", result, settings, section, draw)
    else:
        print_tables([section(result)])


if __name__ == "__main__":
    run(main)
