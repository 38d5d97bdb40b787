"""Planted bugs in `runtime`: see `tests/planted/__init__.py`."""
# ruff: noqa: E501 (a table is easier to read with one bug a row)

from tests.planted.bug import Bug

BUGS = [
    Bug("divided by micro-batches", "sft:optimise", "if weight.grad is not None], count)",
        "if weight.grad is not None], len(plan[step]))", "test_sft::test_finetune_accumulates"),
    Bug("optimiser forgotten on resume", "sft:optimise", 'optimizer.load_state_dict(state["optimizer"])', "pass",
        "test_sft::test_finetune_goes_on_after_a_kill"),
    Bug("resumed a step late", "sft:optimise", 'first = state["step"]', 'first = state["step"] + 1',
        "test_sft::test_finetune_goes_on_after_a_kill"),
    Bug("samples share their random numbers", "runtime.sampling:sample_answers", "(*key, i, k) for", "(*key, i, 0) for",
        "test_sampling::test_sample_answers"),
    Bug("a cut batch is kept", "runtime.sampling:sample_answers", "len(batch) * samples for batch in plan]",
        "1 for batch in plan for _ in range(len(batch) * samples)]", "test_sampling::test_sample_answers_goes_on_where_it_was"),
    Bug("results in the order of batches", "runtime.sampling:in_batches", "result[batch] =", "result[[*range(len(batch))]] =",
        "test_sampling::test_in_batches"),
    Bug("the rule that keeps cut answers", "runtime.sampling:unusable", 'if row["finish_reason"] != "eos":', "if False:",
        "test_sampling::test_unusable"),
    Bug("the first reward models for ever", "runtime.stage:newest_reward_models", "refreshed[-1] if refreshed else", "",
        "test_reward_data::test_newest_reward_models"),
    Bug("scores are not written with the answers", "runtime.sampling:sample_answers", "finish(fresh)", "finish([dict(row) for row in fresh])",
        "test_sampling::test_sample_answers_finishes_each_batch"),
    Bug("prompts in no order", "runtime.sampling:sample_answers", "key=lambda i: lengths[i])", "key=lambda i: -i)",
        "test_sampling::test_sample_answers_wastes_nothing"),
    Bug("versions sorted as words", "runtime.stage:newest_reward_models", '(int(path.name[6:].removesuffix("-ppo")), path.name)', "path.name",
        "test_reward_data::test_newest_reward_models"),
    Bug("sides not swapped back", "runtime.terminal:unswap", "grade - 4 if swapped else 4 - grade", "4 - grade", "test_report::test_ask_grades"),
    Bug("a person's ties are dropped", "runtime.terminal:ask_grades", "append_rows(path, [row])\n", "if not row['grade']: continue\n        append_rows(path, [row])\n",
        "test_report::test_ask_grades"),
    Bug("a person is asked again", "runtime.terminal:ask_grades", 'if (first["index"], first["sample"]) in done:', "if False:", "test_report::test_ask_grades"),
    Bug("kept answers are counted only", "runtime.sampling:sample_answers",
        "there != planned[: len(there)] and sorted(there) != sorted(planned)", "False",
        "test_sampling::test_sample_answers_goes_on_where_it_was"),
    Bug("grades of other models count", "runtime.terminal:ask_grades", 'if row.get("made_by") == mark}', "}", "test_report::test_ask_grades"),
    Bug("stale answers", "runtime.sampling:kept_rows", "any(row.get(\"made_by\") != mark for row in rows)", "False", "test_report::test_cached_answers"),
    Bug("mark without the model", "runtime.sampling:made_by", "fingerprint(folder), *settings", "*settings", "test_report::test_cached_answers"),
]
