"""PPO under the microscope: one answer, token by token, with everything that the update sees.

    python experiments/ppo_microscope.py --out out --prompt "Name three animals."

after `python ppo.py`.

One rollout of the policy that PPO made, against the policy that it started from and with the value
network as it was at the end. The whitening of the reward needs other answers to compare with: the
prompt stands among `--batch` training prompts. Prints a table and writes
experiments/results/ppo_microscope.json and .png.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Tokenizer, read_prompts, world
from experiments.common import RESULTS, save_result
from ppo import Critic, Rollout, kl_penalty, rollout
from ppo import Settings as PPOSettings
from rejection_sampling import Judges
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


@dataclass
class Settings:
    out: Path = Path("out")  # reads OUT/NAME and OUT/NAME-ppo
    name: str = "rlhf-v4"  # the model that PPO started from
    prompt: str = "Name three animals."  # what to answer
    # whether the prompt counts as tagged, so that the safety model rewards it
    is_safety: bool = False
    batch: int = 64  # answers in the rollout
    seed: int = 0  # of the sampling
    device: str = "cpu"  # auto, cpu, cuda, mps
    threads: int = 1  # CPU threads


def table(batch: Rollout, row: int, tokenizer: Tokenizer) -> list[dict]:
    """One answer of a rollout as rows {"mask", "token", …}: the end of its prompt (masked out),
    then each of its tokens.
    """
    mask = batch.mask[row]  # (seq)
    kl = kl_penalty(batch.logprobs, batch.reference, batch.mask)[row]  # (seq)
    numbers = (
        batch.logprobs[row],
        batch.reference[row],
        kl,
        batch.rewards[row],
        batch.values[row],
        batch.advantages[row],
        batch.returns[row],
    )
    first, last = mask.nonzero().min().item(), mask.nonzero().max().item()
    names = [
        "</s>" if i == tokenizer.eos_id else tokenizer.decode([i])
        for i in batch.tokens[row].tolist()
    ]
    return [
        {
            "mask": int(mask[t]),
            "token": names[t],
            **dict(zip(COLUMNS[1:], (x[t].item() for x in numbers), strict=True)),
        }
        for t in range(max(0, first - 3), last + 1)
    ]


def draw(rows: list[dict], title: str) -> None:
    """experiments/results/ppo_microscope.png: log-probabilities and KL above, reward, value,
    advantage below, by token.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["mask"]]
    figure, panels = plt.subplots(
        3, 1, figsize=(max(6, 0.42 * len(rows)), 6.4), sharex=True, layout="constrained"
    )
    places = range(len(rows))
    for panel, names in zip(
        panels,
        (("log π", "log π_0"), ("value", "return"), ("advantage", "reward", "KL")),
        strict=True,
    ):
        for name in names:
            panel.plot(places, [row[name] for row in rows], marker=".", label=name)
        panel.axhline(0, color="gray", linewidth=0.6)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    panels[2].set_xticks(
        places, [row["token"].replace("$", r"\$") for row in rows], rotation=60, ha="right"
    )
    figure.suptitle(title.replace("$", r"\$"), fontsize=9, wrap=True)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "ppo_microscope.png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    # 1. the models as PPO left them, its settings and reward models
    s = parse_settings(Settings, __doc__, argv=argv)
    set_threads(s.threads)
    device, folder = choose_device(s.device), require(
        s.out / f"{s.name}-ppo", f"python ppo.py --init {s.out / s.name}"
    )
    record = json.loads((folder / "stage.json").read_text())
    policy, tokenizer = load_model(folder, device)
    reference = load_model(s.out / s.name, device)[0]
    # it may have other layers than the policy
    as_reward = record["settings"]["value_init"] == "reward"
    critic = Critic(
        load_model(
            record["results"]["reward_models"]["helpfulness"] if as_reward else folder, device
        )[0]
    )
    critic.load_state_dict(load_checkpoint(folder / "critic.pth", device))
    judges = Judges(
        {axis: Path(path) for axis, path in record["results"]["reward_models"].items()}, device
    )
    known = {
        name: record["settings"][name]
        for name in ("beta", "gamma", "lam", "shift_mean", "cut_reward", "max_new_tokens")
    }

    # 2. one rollout, in which the prompt is the first
    prompts = [
        {"prompt": [{"role": "user", "content": s.prompt}], "is_safety": s.is_safety},
        *read_prompts(world.ensure() / "prompts-train.jsonl")[: s.batch - 1],
    ]
    batch = rollout(
        policy, reference, critic, judges, prompts, (s.seed, "microscope"), PPOSettings(**known)
    )
    rows = table(batch, 0, tokenizer)

    # 3. table and picture
    answer = batch.rows[0]
    title = (
        f"{s.prompt}  →  {answer['answer']}\nhelpfulness {answer['helpfulness']:.2f}, safety"
        f" {answer['safety']:.2f}, reward {answer['reward']:.2f} (logits), whitened"
        f" {batch.scores[0]:.2f}; β {known['beta']}, λ {known['lam']}"
    )
    print(f"{title}\n\nmask  {COLUMNS[0]:<14}" + "".join(f"{name:>11}" for name in COLUMNS[1:]))
    for row in rows:
        print(
            f"{row['mask']:>4}  {row['token']!r:<14}"
            + "".join(f"{row[name]:>11.3f}" for name in COLUMNS[1:])
        )
    draw(rows, title)
    save_result(
        "ppo_microscope",
        {"prompt": s.prompt, "answer": answer, "whitened": batch.scores[0].item(), "tokens": rows},
        s,
    )


if __name__ == "__main__":
    run(main)
