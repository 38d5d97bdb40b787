"""How fast: ours beside what people would use instead, and measurements on real Llama 2 sizes.

    python -m experiments.speed                      all that follows, one run: docs/speed.md
    python -m experiments.speed.training             a training step, beside transformers
    python -m experiments.speed.preferences          a reward model on pairs, beside TRL
    python -m experiments.speed.finetuning           SFT on ragged dialogs, beside TRL
    python -m experiments.speed.generation           sampling, beside transformers
    python -m experiments.speed.llama2c              one answer, beside llama2.c
    python -m experiments.speed.ppo_iteration        PPO, beside TRL
    python -m experiments.speed.cost                 time and memory of a token

By themselves, since they need files or another checkout:

    python -m experiments.speed.chain OLD NEW        the default chain of two checkouts
    python -m experiments.speed.load_7b FOLDER       loading a model of 7B
    python -m experiments.speed.tokenizer LLAMA TEXT encoding text, beside sentencepiece

What they share: measuring.py (times, tables), sizes.py (models), peers.py (transformers with our
weights), page.py (docs/speed.md).
"""
