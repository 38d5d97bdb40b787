"""Planted bugs in `experiments`: see `tests/planted/__init__.py`."""
# ruff: noqa: E501 (a table is easier to read with one bug a row)

from tests.planted.bug import Bug

BUGS = [
    Bug("one of two words is enough", "experiments.longer_sft:asked", "all(toy.obeys", "any(toy.obeys", "test_experiments::test_asked"),
    Bug("a right word counts as a blend", "experiments.longer_sft:is_blend", "word not in values and ", "", "test_experiments::test_asked"),
    # statistics over seeds, marks of results
    Bug("intervals of families not corrected", "experiments.forgetting:families_over_seeds", "comparisons=len(tables[0])", "comparisons=1",
        "test_experiments::test_families_over_seeds"),
    Bug("a seed's own interval for one over seeds", "experiments.forgetting:families_over_seeds", "gap = measures.interval(differences, comparisons=len(tables[0]))",
        "gap = measures.Interval(*tables[0][family][1])", "test_experiments::test_families_over_seeds"),
    Bug("over seeds: not corrected", "experiments.common:over_seeds", "None, comparisons)", "None, 1)", "test_experiments::test_over_seeds_corrected"),
    Bug("differences over seeds: not corrected", "experiments.common:differences_over_seeds", "None, comparisons)", "None, 1)", "test_experiments::test_over_seeds_corrected"),
    Bug("results of other settings are mixed", "experiments.common:load_result", "if found != value:", 'if found != value and part != "settings":',
        "test_experiments::test_load_result_refuses_to_mix"),
    Bug("results of another version are mixed", "experiments.common:mark_of", '"version": RESULTS_VERSION', '"version": 1', "test_experiments::test_load_result_refuses_to_mix"),
    Bug("the world's mark forgets the annotator", "data.toy:world_hash", "judge = [RULES, NOISE, RATING_CUTS, TIE]", "judge = []",
        "test_experiments::test_load_result_refuses_to_mix"),
    Bug("reference runs of another world", "eval:read_reference", 'content["mark"]["world"] != toy.world_hash()', "False", "test_report::test_read_reference"),
]
