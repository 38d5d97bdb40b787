"""Planted bugs in `gatt`: see `tests/planted/__init__.py`."""
# ruff: noqa: E501 (a table is easier to read with one bug a row)

from tests.planted.bug import Bug

BUGS = [
    Bug("ghost: loss left on earlier turns", "gatt:ghost_loss_mask", "answer and turn == max(turns)", "answer", "test_gatt::test_ghost_loss_mask"),
    Bug("ghost: the wrong turn is trained on", "gatt:ghost_loss_mask", "max(turns)", "min(turns)", "test_gatt::test_ghost_loss_mask"),
    Bug("ghost rows train on all turns", "gatt:ghost_dialogs", '"train_on": "last"', '"train_on": "all"', "test_gatt::test_ghost_dialogs"),
    Bug("instruction left in later turns", "gatt:ghost_dialogs", ', "first")', ")", "test_gatt::test_ghost_dialogs"),
    Bug("instruction missing from the first turn", "gatt:instruct", "users[:1]", "users[1:]", "test_gatt::test_ghost_dialogs"),
    Bug("sampled without the instruction on every turn", "gatt:instruct", 'turns == "every"', 'turns == "always"', "test_gatt::test_instruct"),
    Bug("the check is ignored", "gatt:keep_answers", 'if check == "toy":', 'if check == "toys":', "test_gatt::test_keep_answers"),
    Bug("answers of another dialog are checked", "gatt:keep_answers", 'dialogs[row["index"]]["constraints"]', 'dialogs[0]["constraints"] * 0',
        "test_gatt::test_keep_answers"),
    Bug("the rewards are ignored", "gatt:keep_answers", "rewards = judges.rewards(prompts, rows)", "judges.rewards(prompts, rows)",
        "test_gatt::test_keep_answers_by_reward"),
    Bug("markers anywhere pass the check", "gatt:obeys_exactly", "answer.startswith(start)", "start in answer", "test_gatt::test_obeys_exactly"),
    Bug("a name is checked where nobody asked", "gatt:obeys_exactly", 'PROBED.get(c["kind"]) == prompt["family"]', 'c["kind"] in PROBED',
        "test_gatt::test_obeys_exactly"),
    Bug("replay without its sampled ids", "gatt:sample_ordinary", '"answer_ids": row["answer_ids"],', '"answer_ids": row["answer_ids"][:-1],',
        "test_gatt::test_sample_ordinary"),
    Bug("replay of cut answers", "gatt:is_stable", "not unusable(row) and", "", "test_gatt::test_is_stable"),
    Bug("an earlier answer to another question", "gatt:resample_earlier", "sampling_prompt(dialog, s.context, n)", "sampling_prompt(dialog, s.context)",
        "test_gatt::test_resample_earlier"),
    Bug("an answer of the wrong turn is trained on", "gatt:sampling_prompt", '["messages"][:end][-1:]', '["messages"][:1]', "test_gatt::test_sampling_prompt"),
    Bug("an earlier answer that saw what came after it", "gatt:sampling_prompt", 'dialog["messages"][:end] if', 'dialog["messages"] if',
        "test_gatt::test_sampling_prompt"),
    Bug("words of the test are trained on", "gatt:toy_constraints", 'toy.constraints("train")',
        'toy.constraints("test")', "test_gatt::test_sample_constraints"),
    Bug("room for the short form only", "gatt:leave_out_long", "(trained_on, in_full_too)",
        "(trained_on,)", "test_gatt::test_leave_out_long"),
    Bug("dialogs grown too long are kept", "gatt:main", "dialogs = leave_out_long(tokenizer, dialogs, s, model.args.max_seq_len)  #", "#",
        "test_gatt::test_main_leaves_out_what_grew_too_long"),
    Bug("no room for an answer", "gatt:leave_out_long", "length + s.max_new_tokens <= max_seq_len", "length <= max_seq_len",
        "test_gatt::test_leave_out_long"),
]
