"""Planted bugs in `experiments`: see `tests/planted/__init__.py`."""
# ruff: noqa: E501 (a table is easier to read with one bug a row)

from tests.planted.bug import Bug

BUGS = [
    Bug("one of two words is enough", "experiments.longer_sft:asked", "all(toy.obeys", "any(toy.obeys", "test_experiments::test_asked"),
    Bug("a right word counts as a blend", "experiments.longer_sft:is_blend", "word not in values and ", "", "test_experiments::test_asked"),
    # statistics over seeds, marks of results
    Bug("intervals of families not corrected", "experiments.forgetting:families_over_seeds", "gap = measures.interval(differences, comparisons=len(tables[0]))",
        "gap = measures.interval(differences)", "test_experiments::test_families_over_seeds"),
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
    Bug("claims over seeds: not corrected", "experiments.common:print_claims", "comparisons=count", "comparisons=1", "test_experiments::test_print_claims"),
    Bug("win rates of families not corrected", "experiments.forgetting:families_over_seeds", "wins = measures.interval(rates, comparisons=len(tables[0]))",
        "wins = measures.interval(rates)", "test_experiments::test_families_over_seeds"),
    Bug("differences of families pooled over seeds again", "experiments.forgetting:families_over_seeds", "measures.interval(differences, comparisons=len(tables[0]))",
        "measures.interval([value for table in tables for value in table[family][1]], comparisons=len(tables[0]))", "test_experiments::test_families_over_seeds"),
    Bug("histograms pooled over seeds", "experiments.table29_safety_loss:mean_shares", "100 * count / sum(counts)",
        "100 * len(histograms) * count / sum(map(sum, histograms))", "test_experiments::test_safety_loss_over_seeds"),
    Bug("one table of two counts as all comparisons", "experiments.table29_safety_loss:changes", "before, looked_at)", "before, looked_at // 2)",
        "test_experiments::test_safety_loss_over_seeds"),
    Bug("calibration pooled over seeds", "experiments.figure29_calibration:bins_over_seeds", "found.append((statistics.fmean(quality), scores,",
        "found.append((statistics.fmean(quality), [sum(s * n for s, n in zip(scores, counts)) / sum(counts)],", "test_experiments::test_bins_over_seeds"),
    Bug("changes with N not paired by seed", "experiments.overoptimisation:claims", "curve[-1][0] - curve[-3][0] for", "curve[-1][0] - curves[0][-3][0] for",
        "test_experiments::test_claims_of_curves"),
    Bug("marks are ignored", "experiments.common:load_result", "if found != value:", "if False:", "test_experiments::test_load_result_refuses_to_mix"),
    Bug("the version of a mark is ignored", "experiments.common:load_result", "if found != value:", 'if found != value and part != "version":',
        "test_experiments::test_load_result_refuses_to_mix"),
    Bug("the world of a mark is ignored", "experiments.common:load_result", "if found != value:", 'if found != value and part != "world":',
        "test_experiments::test_load_result_refuses_to_mix"),
    Bug("a file without a mark is read", "experiments.common:load_result", "raise InputError(f\"{file}: a result without its mark; {way_out}\")", "return content",
        "test_experiments::test_load_result_refuses_to_mix"),
]
