"""Planted bugs in `model`: see `tests/planted/__init__.py`."""

from tests.planted.bug import Bug

BUGS = [
    Bug(
        "log-probabilities at the sampling temperature",
        "model:generate",
        "token_logprobs(logits, ids)",
        "token_logprobs(logits / (temperature or 1), ids)",
        "test_sampling::test_sample_answers_logprob_is_the_models_own",
    )
]
