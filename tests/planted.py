"""Planted bugs: is every silent mistake that others shipped caught by the test that is there for it?

    python -m tests.planted              plants all of them, one after the other (a minute or two)
    python -m tests.planted NAME ...     some of them
    python -m tests.planted --list

A row is (name, function, its right line, the wrong one, the test that must fail). The function's code is exchanged in
place, so that every module that imported it has the wrong version. Each named test must pass before the bug is planted.
"""
# ruff: noqa: E501 (a table is easier to read with one bug a row)

import ast
import contextlib
import importlib
import inspect
import io
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import NamedTuple

import pytest


class Bug(NamedTuple):
    name: str
    function: str  # module:function or module:Class.method
    right: str  # a piece of its source, there exactly once
    wrong: str
    test: str  # file::test, without tests/ and .py


BUGS = [
    # the loss of SFT
    Bug("loss mask one off", "sft:sft_loss", "loss_mask[:, 1:]", "loss_mask[:, :-1]", "test_sft::test_sft_loss"),
    Bug("loss on questions", "sft:sft_loss", "loss_mask[:, 1:]", "(loss_mask | True)[:, 1:]", "test_sft::test_sft_loss"),
    Bug("no shift", "sft:sft_loss", "logits[:, :-1][counts]", "logits[:, 1:][counts]", "test_sft::test_sft_loss"),
    Bug("a mean where a sum belongs", "sft:sft_loss", 'reduction="sum"', 'reduction="mean"', "test_sft::test_sft_loss"),
    Bug("all masked is quiet", "sft:sft_loss", "if count == 0:", "if False:", "test_sft::test_sft_loss_of_nothing"),
    Bug("no EOS in the loss", "data.chat:encode_dialog", '[train_on == "all" or turn == last] * len(answer)',
        '([train_on == "all" or turn == last] * len(answer))[:-1] + [False] * bool(answer)', "test_data::test_encode_dialog_by_hand"),
    Bug("padding is trained on", "sft:answer_loss", "dialog.loss_mask for dialog in dialogs], False",
        "dialog.loss_mask for dialog in dialogs], True", "test_sft::test_answer_loss"),
    Bug("train_on is ignored", "data.chat:encode_dialog", 'train_on == "all" or turn == last', "True",
        "test_data::test_encode_dialog_train_on_last"),
    Bug("held-out loss: mean of means", "sft:held_out_loss", "sum(loss.item() for loss, _ in losses) / sum(count for _, count in losses)",
        "sum(loss.item() / count for loss, count in losses) / len(losses)", "test_sft::test_held_out_loss"),
    Bug("accumulation: mean of means", "sft:finetune", "return *answer_loss(model, [dialogs[row] for row in rows]), {}",
        "loss, count = answer_loss(model, [dialogs[row] for row in rows]); return loss / count, 1, {}",
        "test_sft::test_finetune_accumulates"),
    Bug("divided by micro-batches", "runtime.train:optimise", "if weight.grad is not None], count)",
        "if weight.grad is not None], len(plan[step]))", "test_sft::test_finetune_accumulates"),
    Bug("optimiser forgotten on resume", "runtime.train:optimise", 'optimizer.load_state_dict(state["optimizer"])', "pass",
        "test_sft::test_finetune_goes_on_after_a_kill"),
    Bug("resumed a step late", "runtime.train:optimise", 'first = state["step"]', 'first = state["step"] + 1',
        "test_sft::test_finetune_goes_on_after_a_kill"),
    Bug("ids encoded again from text", "sft:encode_rows", 'row.get("answer_ids") if', "None if", "test_sft::test_encode_rows"),
    Bug("ids of another tokenizer", "sft:encode_rows", 'row.get("tokenizer") == tokenizer.fingerprint', "True",
        "test_sft::test_encode_rows"),
    # the chat format
    Bug("double BOS", "data.chat:encode_turn", "ids = tokenizer.encode(prompt, bos=True)",
        "ids = [tokenizer.bos_id, *tokenizer.encode(prompt, bos=True)]", "test_data::test_encode_prompt"),
    Bug("no BOS in later turns", "data.chat:encode_dialog", "dialog.ids.extend(prompt + answer)",
        "prompt = prompt[turn > 0:]; dialog.ids.extend(prompt + answer)", "test_data::test_encode_dialog"),
    Bug("boundary by text", "data.chat:encode_turn", 'tokenizer.encode(f"{prompt} {answer.strip()} ", bos=True, eos=True)',
        'ids + tokenizer.encode(f" {answer.strip()} ", eos=True)', "test_data::test_encode_dialog"),
    Bug("no space before EOS", "data.chat:encode_turn", "{answer.strip()} ", "{answer.strip()}", "test_data::test_encode_dialog"),
    Bug("tags pass", "data.chat:has_tag", "any(tag in text for tag in TAGS)", "False", "test_data::test_has_tag"),
    # sampling
    Bug("log-probabilities at the sampling temperature", "model:generate", "token_logprobs(logits, ids)",
        "token_logprobs(logits / (temperature or 1), ids)", "test_sampling::test_sample_answers_logprob_is_the_models_own"),
    Bug("samples share their random numbers", "runtime.sampling:sample_answers", "(*key, i, k) for", "(*key, i, 0) for",
        "test_sampling::test_sample_answers"),
    Bug("a cut batch is kept", "runtime.sampling:sample_answers", "len(batch) * samples for batch in plan]",
        "1 for batch in plan for _ in range(len(batch) * samples)]", "test_sampling::test_sample_answers_goes_on_where_it_was"),
    Bug("results in the order of batches", "runtime.sampling:in_batches", "result[batch] =", "result[[*range(len(batch))]] =",
        "test_sampling::test_in_batches"),
    # reward models
    Bug("margin broadcasts", "reward:ranking_loss", "if not chosen.ndim == 1 or", "if False and",
        "test_reward::test_ranking_loss_refuses_to_broadcast"),
    Bug("margin's sign", "reward:ranking_loss", "rejected - margins)", "rejected + margins)", "test_reward::test_ranking_loss"),
    Bug("no margin", "reward:ranking_loss", "rejected - margins)", "rejected)", "test_reward::test_ranking_loss"),
    Bug("safety label the wrong way", "reward:safety_loss", "is_safe.float()", "1 - is_safe.float()", "test_reward::test_safety_loss"),
    Bug("gate on the raw logit", "reward:combine_rewards", "safety.sigmoid() <", "safety <", "test_reward::test_combine_rewards"),
    Bug("gate on helpfulness", "reward:combine_rewards", "safety.sigmoid() <", "helpfulness.sigmoid() <",
        "test_reward::test_combine_rewards"),
    Bug("no tag in the gate", "reward:combine_rewards", "is_safety | (", "(", "test_reward::test_combine_rewards"),
    Bug("score one slot off", "reward:RewardModel.forward", "lengths - 1]", "(lengths - 2).clamp(min=0)]",
        "test_reward::test_reward_model"),
    Bug("score read at the padding", "reward:RewardModel.forward", "lengths - 1]", "-1]", "test_reward::test_score"),
    Bug("shift added", "reward:RewardModel.forward", "- self.shift", "+ self.shift", "test_reward::test_reward_model"),
    Bug("chosen and rejected exchanged in training", "reward:train_reward_model", "chosen, rejected = scores.chunk(2)",
        "rejected, chosen = scores.chunk(2)", "test_reward::test_train_reward_model"),
    Bug("safety labels exchanged in training", "reward:train_reward_model", 'for side in ("chosen", "rejected") for i in picked]',
        'for side in ("rejected", "chosen") for i in picked]', "test_reward::test_train_reward_model_learns_what_is_safe"),
    Bug("labels pair by pair, scores side by side", "reward:train_reward_model",
        'for side in ("chosen", "rejected") for i in picked]', 'for i in picked for side in ("chosen", "rejected")]',
        "test_reward::test_train_reward_model_loss"),
    Bug("a pair's labels count twice", "reward:train_reward_model", "is_safe).sum() / 2", "is_safe).sum()",
        "test_reward::test_train_reward_model_loss"),
    Bug("margins of the wrong table", "reward:train_reward_model", "MARGINS[margin]", 'MARGINS["small"]',
        "test_reward::test_train_reward_model_loss"),
    Bug("chosen and rejected exchanged in pairs", "reward:collect_preferences", 'sides[found["chosen"]][i], sides[1 - found["chosen"]][i]',
        'sides[1 - found["chosen"]][i], sides[found["chosen"]][i]', "test_reward::test_collect_preferences"),
    Bug("safety labels exchanged in pairs", "reward:collect_preferences", '"chosen_is_safe": found["safe"][found["chosen"]]',
        '"chosen_is_safe": found["safe"][0]', "test_reward::test_collect_preferences"),
    Bug("unsafe answers chosen before safe ones stay", "reward:collect_preferences", 'if axis == "safety" and', "if False and",
        "test_reward::test_collect_preferences"),
    Bug("pairs scored by their text", "reward:encode_pairs", 'row.get(f"{side}_ids") if same else None', "None",
        "test_reward::test_encode_pairs"),
    Bug("annotator prefers the worse", "data.annotators:annotate_toy", "0 if first else 1", "1 if first else 0",
        "test_data::test_annotate_toy"),
    Bug("ties count as right", "reward:accuracy_by_rating", "0.5 * (chosen == rejected)", "1.0 * (chosen == rejected)",
        "test_reward::test_accuracy_by_rating"),
    # rejection sampling
    Bug("the worst is kept", "rejection_sampling:best_of", "reward > rewards", "reward < rewards", "test_rejection_sampling::test_best_of"),
    Bug("best across prompts", "rejection_sampling:best_of", "reward > rewards[best[owner]]", "reward > max(rewards[i] for i in best.values())",
        "test_rejection_sampling::test_best_of"),
    Bug("the last of equals", "rejection_sampling:best_of", "reward > rewards", "reward >= rewards", "test_rejection_sampling::test_best_of"),
    Bug("answers at the length limit stay", "rejection_sampling:SamplePool.add", 'row["finish_reason"] != "eos"', "False",
        "test_rejection_sampling::test_sample_pool_leaves_out"),
    Bug("answers with tags stay", "rejection_sampling:SamplePool.add", 'row["has_tag"] or', "",
        "test_rejection_sampling::test_sample_pool_leaves_out"),
    Bug("old rewards are believed", "rejection_sampling:SamplePool.best", "judges.rewards(self.prompts, self.rows)",
        "__import__('torch').tensor([row.get('reward', r) for row, r in zip(map(dict, self.rows), judges.rewards(self.prompts, "
        "[dict(row) for row in self.rows]).tolist())])",
        "test_rejection_sampling::test_sample_pool_takes_older_answers_and_scores_them_again"),
    Bug("answers scored under another prompt", "rejection_sampling:Judges.rewards", 'encoded[row["index"]] +', "encoded[min(encoded)] +",
        "test_rejection_sampling::test_judges"),
    Bug("temperature by the mean of all", "rejection_sampling:search_temperature", "rewards[list(picked.values())].mean()",
        "rewards.mean()", "test_rejection_sampling::test_search_temperature"),
    Bug("the pool forgets", "rejection_sampling:run_round", 'range(1, version) if s.pool == "all" else ()', "()",
        "test_chain::test_killed_and_run_again[rejection_sampling-1.0]"),
    # measures
    Bug("ties are losses", "eval:win_rate", "0.0 if d < -tie - 1e-9 else 0.5", "0.0", "test_eval::test_win_rate"),
    Bug("no band of ties", "eval:win_rate", "d > tie + 1e-9", "d > 0", "test_eval::test_win_rate"),
    Bug("baseline and model exchanged", "eval:win_rate", "a - b for a, b", "b - a for a, b", "test_eval::test_win_rate"),
    Bug("interval: clusters ignored", "eval:interval", "clusters[i] if clusters else i", "i", "test_eval::test_interval_clustered"),
    Bug("interval: n for n - 1", "eval:interval", "n / (n - 1) *", "1 *", "test_eval::test_interval"),
    Bug("interval: 1.96 for few", "eval:interval", "T975[n - 2] if n <= 31 else", "1.96 if n <= 31 else", "test_eval::test_interval"),
    Bug("safety judged on harmless prompts", "eval:axis_of", '"safety" if', '"helpfulness" if', "test_eval::test_axis_of"),
    Bug("answers judged under another prompt", "eval:judge", 'prompts[row["index"]]', "prompts[0]", "test_eval::test_judge"),
    # the toy world
    Bug("test units in training", "data.toy:questions", "== split)", '!= "dev")', "test_toy::test_questions"),
    Bug("held out by wording alone", "data.toy:unit", "if family.composes else", "if False else", "test_toy::test_unit"),
    Bug("held-out words in training", "data.toy:made_up_words", "if w not in set(held_out))", ")", "test_toy::test_constraints"),
    Bug("safety by helpfulness", "data.toy:is_safe", ">= 0.5", "<= 0.5", "test_toy::test_is_safe"),
    Bug("repetition is free", "data.toy:helpfulness", "- 0.15 * seen.repeats", "", "test_toy::test_helpfulness"),
    Bug("a refusal is always right", "data.toy:helpfulness", 'score = 0.25 if prompt["kind"] == "unsafe" else 0.05', "score = 0.25",
        "test_toy::test_helpfulness"),
]

SAMPLE = ["loss mask one off", "no EOS in the loss", "accumulation: mean of means", "double BOS", "boundary by text",
          "log-probabilities at the sampling temperature", "margin broadcasts", "margin's sign", "gate on the raw logit",
          "score one slot off", "safety labels exchanged in training", "best across prompts", "answers at the length limit stay",
          "ties are losses", "interval: clusters ignored", "held out by wording alone"]


def function_of(bug: Bug) -> types.FunctionType:
    module, _, path = bug.function.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return inspect.unwrap(found)


@contextlib.contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The wrong version in the function's place, until the block ends."""
    function = function_of(bug)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(bug.right) != 1:
        raise LookupError(f"{bug.name}: {bug.function} holds {bug.right!r} {source.count(bug.right)} times, not once: mend the row")
    tree = ast.parse(source.replace(bug.right, bug.wrong))
    tree.body[0].decorator_list = []
    scope: dict = {}
    exec(compile(tree, f"<{bug.name}>", "exec"), function.__globals__, scope)
    right, function.__code__ = function.__code__, scope[function.__name__].__code__
    caches = [c for c in vars(inspect.getmodule(function)).values() if hasattr(c, "cache_clear")]
    try:
        for cached in caches:
            cached.cache_clear()
        yield
    finally:
        function.__code__ = right
        for cached in caches:
            cached.cache_clear()


class Outcome:
    """A pytest plugin that keeps what happened, and with which kind of exception tests failed."""

    def __init__(self):
        self.passed, self.failed, self.kinds = set(), set(), set()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            (self.failed if report.failed else self.passed if report.passed else set()).add(report.nodeid)

    def pytest_exception_interact(self, call):
        self.kinds.add(call.excinfo.type.__name__)


def run_tests(tests: list[str]) -> Outcome:
    outcome = Outcome()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(["-q", "-x", "-p", "no:cacheprovider", *(f"tests/{test.replace('::', '.py::', 1)}" for test in tests)], [outcome])
    return outcome


def main(names: list[str]) -> int:
    """Plant the bugs of these names (all: none named); 0 if every one is caught."""
    if "--list" in names:
        print("\n".join(f"{bug.name:<48}{bug.function:<40}{bug.test}" for bug in BUGS))
        return 0
    bugs = [bug for bug in BUGS if bug.name in (names or [bug.name])]
    if missing := set(names) - {bug.name for bug in bugs}:
        print(f"no such bug: {', '.join(sorted(missing))}; --list shows them")
        return 2
    clean = {test: run_tests([test]) for test in dict.fromkeys(bug.test for bug in bugs)}
    bad = 0
    for bug in bugs:
        if clean[bug.test].failed or not clean[bug.test].passed:
            verdict = f"CANNOT TELL: {bug.test} does not pass without the bug ({', '.join(clean[bug.test].kinds) or 'skipped'})"
        else:
            try:
                with planted(bug):
                    outcome = run_tests([bug.test])
            except LookupError as error:
                outcome, verdict = None, f"CANNOT PLANT: {error}"
            if outcome:
                clumsy = outcome.kinds & {"NameError", "SyntaxError", "UnboundLocalError", "AttributeError", "ImportError"}
                verdict = ("NOT CAUGHT" if not outcome.failed else f"CLUMSY ({', '.join(clumsy)})" if clumsy else
                           f"caught by {bug.test}")
        bad += not verdict.startswith("caught")
        print(f"{bug.name:<48}{verdict}", flush=True)
    print(f"{len(bugs) - bad} of {len(bugs)} planted bugs caught")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
