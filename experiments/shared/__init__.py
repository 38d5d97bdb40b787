"""What the experiments share.

results.py        where results are kept: one file for each seed, and what is published of them
over_seeds.py     statistics over seeds, and the tables that show them
pictures.py       panels and curves
processes.py      commands side by side
reward_models.py  fresh pairs, reward models trained on them, and how good those are
best_of_n.py      many answers of a model, and what the best of N of them gives
"""
