"""The experiments in the paper's order: what is published, and what each needs."""

import ast
import importlib
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent.parent


class Experiment(NamedTuple):
    """A module of `experiments`, and where its result is published."""

    module: str  # python -m experiments.MODULE
    result: str  # experiments/results/RESULT.json
    needs: str = ""  # the experiment whose models it measures, seed by seed
    minutes: str = ""  # on two cores, where it has been timed

    @property
    def question(self) -> str:
        """The first sentence of its docstring."""
        docstring = ast.get_docstring(ast.parse((FOLDER / f"{self.module}.py").read_text("utf-8")))
        return " ".join(docstring.split("\n\n")[0].split())

    @property
    def command(self) -> str:
        return f"python -m experiments.{self.module}"

    def load(self):
        """The module."""
        return importlib.import_module(f"experiments.{self.module}")


class Chapter(NamedTuple):
    """A part of the paper. text: what a newcomer must know to read its sections."""

    title: str
    text: str
    experiments: list[Experiment]


CHAPTERS = [
    Chapter(
        "Supervised fine-tuning (§3.1)",
        "SFT is where the chat model begins: it learns to answer from written demonstrations. The"
        " paper starts from a pre-trained Llama 2. Pre-training is not ours: here SFT starts from"
        " random weights and learns English, too.",
        [
            Experiment("sft_budget", "sft_budget"),
            Experiment("longer_sft", "longer_sft", needs="reference"),
        ],
    ),
    Chapter(
        "Reward models (§3.2.2)",
        "A reward model reads a prompt and an answer and gives a score, any number; its sigmoid"
        " makes a probability of it. It learns from pairs: two answers to one prompt, and which of"
        " them the annotator chose. There are two, one for helpfulness and one for safety. A pair"
        " has one of four ratings, from significantly better to negligibly better. *Accuracy* is"
        " the share of pairs whose chosen answer has the higher score; a coin would have 50 %. In"
        " the rounds the two scores become one reward. The *gate* does it: an answer to an unsafe"
        " prompt, or one that the safety model calls less than 15 % safe, is judged by its safety,"
        " any other by its helpfulness.",
        [
            Experiment("table08_accuracy_by_rating", "table08", needs="seeds"),
            Experiment("table28_margin", "table28", needs="seeds"),
            Experiment("table29_safety_loss", "table29", needs="seeds"),
            Experiment("figure06_scaling", "figure06", needs="seeds"),
            Experiment("figure29_calibration", "figure29", needs="seeds"),
            Experiment("reward_heads", "reward_heads", needs="seeds"),
            Experiment("reward_sees_content", "reward_sees_content", needs="seeds"),
        ],
    ),
    Chapter(
        "RLHF by rejection sampling (§3.2.3)",
        "Each round makes the next version, V1 to V4. It collects fresh preferences between answers"
        " of the newest version, refreshes the reward models, samples several answers to each"
        " prompt, keeps the one with the highest reward, and fine-tunes on it. The *pool* holds the"
        " answers of all rounds so far. *Best of N* is the answer with the highest reward among N.",
        [
            Experiment("seeds", "seeds", minutes="7 a seed"),
            Experiment("rivals", "rivals", needs="seeds"),
            Experiment("figure07_best_of_n", "figure07", needs="seeds"),
            Experiment("figure08_temperature", "figure08", needs="seeds"),
            Experiment("forgetting", "forgetting", needs="seeds"),
            Experiment("overoptimisation", "overoptimisation", needs="seeds"),
            Experiment("figure20_score_drift", "figure20", needs="reference"),
        ],
    ),
    Chapter(
        "PPO and V5 (§3.2.3)",
        "PPO (proximal policy optimisation) makes each answer that the model samples likelier or"
        " less likely by its reward, and pays for moving away from the model it started from: the"
        " *KL*, in nats an answer. V4-PPO is V4 after PPO, V5 is V4-PPO after one more round of"
        " rejection sampling.",
        [
            Experiment("figure11_ppo", "figure11_ppo", needs="reference"),
            Experiment("ppo_microscope", "ppo_microscope", needs="reference"),
        ],
    ),
    Chapter(
        "Ghost Attention (§3.3)",
        'Ghost Attention trains a model to keep an instruction of the first turn, such as "Begin'
        ' every answer with the word Kogo.", through a long dialog. It starts from V3; its dialogs'
        " go into V4's training, too. *Adherence* is the share of answers that obey.",
        [
            Experiment("table30_gatt", "table30", needs="reference"),
            Experiment("figure10_attention", "figure10", needs="reference"),
            Experiment("constrained_prompts", "constrained_prompts", needs="reference"),
        ],
    ),
    Chapter(
        "The reference runs",
        "The whole pipeline with its default settings: SFT, reward models, V1 to V3, Ghost"
        " Attention on V3, V4 with its dialogs, PPO on V4, and V5. Your own run's report is"
        " compared with these runs.",
        [Experiment("reference", "reference", minutes="15 a seed")],
    ),
]

EXPERIMENTS = [experiment for chapter in CHAPTERS for experiment in chapter.experiments]


def find(module: str) -> Experiment:
    """The experiment of this module."""
    [experiment] = [one for one in EXPERIMENTS if one.module == module]
    return experiment
