"""Intervals the slow way: scipy's t for independent values, the bootstrap over clusters for the
others.
"""

import numpy as np
from scipy import stats


def student(values: list[float]) -> tuple[float, float]:
    return stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))


def cluster_bootstrap_error(
    values: list[float], clusters: list, draws: int = 4000, seed: int = 0
) -> float:
    """Standard error of the mean when whole clusters are drawn anew."""
    groups = [
        [v for v, c in zip(values, clusters, strict=True) if c == name]
        for name in dict.fromkeys(clusters)
    ]
    rng, means = np.random.default_rng(seed), []
    for _ in range(draws):
        picked = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        means.append(sum(map(sum, picked)) / sum(map(len, picked)))
    return float(np.std(means))
