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
    Bug("ids encoded again from text", "sft:encode_rows", 'row["messages"][-1]["content"])', '"")', "test_sft::test_encode_rows"),
    Bug("ids of another tokenizer", "data.chat:sampled_ids", 'row.get("tokenizer") != tokenizer.fingerprint', "False",
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
    Bug("pairs scored by their text", "reward:encode_pairs", 'sampled_ids(tokenizer, row, f"{side}_ids", row[side])', "None",
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
    Bug("answers at the length limit stay", "rejection_sampling:SamplePool.add", "reason := unusable(row)",
        'reason := unusable(row | {"finish_reason": "eos"})', "test_rejection_sampling::test_sample_pool_leaves_out"),
    Bug("answers with tags stay", "rejection_sampling:SamplePool.add", "reason := unusable(row)",
        'reason := unusable(row | {"has_tag": False})', "test_rejection_sampling::test_sample_pool_leaves_out"),
    Bug("old rewards are believed", "rejection_sampling:SamplePool.rescore", "judges.rewards(self.prompts, batch)",
        "judges.rewards(self.prompts, [dict(row) for row in batch])",
        "test_rejection_sampling::test_sample_pool_takes_older_answers_and_scores_them_again"),
    Bug("answers scored under another prompt", "rejection_sampling:Judges.sequences", 'encoded[row["index"]] +', "encoded[min(encoded)] +",
        "test_rejection_sampling::test_judges"),
    Bug("temperature by the mean of all", "rejection_sampling:search_temperature", 'rows[i]["reward"] for',
        'statistics.fmean(row["reward"] for row in rows if row["index"] == index) for', "test_rejection_sampling::test_search_temperature"),
    Bug("tagged prompts count as gated", "rejection_sampling:share_gated", 'if not prompts[row["index"]]["is_safety"]', "",
        "test_rejection_sampling::test_share_gated"),
    Bug("the pool forgets", "rejection_sampling:run_round", 'before[1:] if s.pool == "all" else []', "[]",
        "test_chain::test_killed_and_run_again[rejection_sampling-1.0]"),
    # measures
    Bug("ties are losses", "eval:win_rate", "0.0 if d < -tie - 1e-9 else 0.5", "0.0", "test_eval::test_win_rate"),
    Bug("no band of ties", "eval:win_rate", "d > tie + 1e-9", "d > 0", "test_eval::test_win_rate"),
    Bug("baseline and model exchanged", "eval:win_rate", "a - b for a, b", "b - a for a, b", "test_eval::test_win_rate"),
    Bug("interval: clusters ignored", "eval:interval", "clusters[i] if clusters else i", "i", "test_eval::test_interval_clustered"),
    Bug("interval: n for n - 1", "eval:interval", "n / (n - 1) *", "1 *", "test_eval::test_interval"),
    Bug("interval: 1.96 for few", "eval:interval", "student_quantile(1 - 0.025 / comparisons, n - 1)", "1.96", "test_eval::test_interval"),
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
    # measures of families, violations and reward models
    Bug("ties count as wins", "eval:win_rate", "1.0 if d > tie + 1e-9 else", "1.0 if d >= -tie - 1e-9 else", "test_eval::test_win_rate"),
    Bug("quantile: 97.5 % for 95 %", "eval:student_quantile", "2 * probability - 1", "probability", "test_eval::test_student_quantile_by_hand"),
    Bug("quantile: odd and even degrees alike", "eval:student_quantile", "if odd else math.sin(angle) * total", "if True else 0",
        "test_eval::test_student_quantile_by_hand"),
    Bug("many families, no correction", "eval:interval", "0.025 / comparisons", "0.025", "test_eval::test_interval_of_many_comparisons"),
    Bug("unpaired instead of paired", "eval:difference", "interval([a - b for a, b in zip(first, second, strict=True)], clusters, comparisons)",
        "Interval(interval(first).mean - interval(second).mean, interval(first).low - interval(second).high, "
        "interval(first).high - interval(second).low)", "test_eval::test_difference"),
    Bug("difference: the wrong way round", "eval:difference", "a - b for", "b - a for", "test_eval::test_difference"),
    Bug("difference: clusters ignored", "eval:difference", "clusters, comparisons)", "None, comparisons)", "test_eval::test_difference"),
    Bug("families: paired with no correction", "eval:compare_families", "clusters, len(groups))", "clusters)",
        "test_eval::test_compare_families"),
    Bug("not worse: by the upper end", "eval:verdict", '"not worse" if low > NOT_WORSE', '"not worse" if high > NOT_WORSE',
        "test_eval::test_verdict"),
    Bug("false refusals over all prompts", "eval:summary", 'lambda p: p.get("kind") == "borderline"', 'lambda p: not p["is_safety"]',
        "test_eval::test_summary"),
    Bug("violations: safe answers counted", "eval:summary", "lambda safe: not safe", "lambda safe: safe", "test_eval::test_summary_violations"),
    Bug("violations over all prompts", "eval:summary", '"violations": (lambda p: p["is_safety"]', '"violations": (lambda p: True',
        "test_eval::test_summary_violations"),
    Bug("accuracy: ties are right", "eval:accuracy_intervals", "0.5 * ((c > r) + (c >= r))", "float(c >= r)", "test_eval::test_accuracy_intervals"),
    Bug("accuracy: clusters of other pairs", "eval:accuracy_intervals", "clusters and [clusters[i] for i in picked]",
        "clusters and clusters[:len(picked)]", "test_eval::test_accuracy_intervals"),
    Bug("threshold on the raw score", "eval:share_below", "sigmoid(score) < threshold", "score < threshold", "test_eval::test_share_below"),
    Bug("recall at the gate's threshold", "eval:unsafe_recall", "unsafe], threshold,", "unsafe], 0.15,", "test_eval::test_unsafe_recall"),
    Bug("recall over all answers", "eval:unsafe_recall", "if not safe]", "]", "test_eval::test_unsafe_recall"),
    Bug("the share under the gate reads helpfulness", "eval:wrongly_gated", "[safety_scores[i] for", "[quality[i] for",
        "test_eval::test_wrongly_gated"),
    Bug("the share under the gate counts tagged prompts", "eval:wrongly_gated", " and not tagged", "", "test_eval::test_wrongly_gated"),
    Bug("bins off by one", "eval:binned", "* bins + 1e-9)", "* bins + 1)", "test_eval::test_binned"),
    Bug("bins: the last end alone", "eval:binned", "min(bins - 1, ", "min(bins, ", "test_eval::test_binned"),
    Bug("calibration: axes exchanged", "eval:calibration", "binned(quality, [sigmoid(score) for score in scores], bins)",
        "binned([sigmoid(score) for score in scores], quality, bins)", "test_eval::test_calibration"),
    Bug("pairs are always right", "eval:pair_calibration", "0.5 * ((gap > 0) + (gap >= 0))", "1.0", "test_eval::test_pair_calibration"),
    Bug("calibration error: a mean of bins", "eval:pair_calibration", "one.count * abs(one.x - one.y) for one in found) / len(gaps)",
        "abs(one.x - one.y) for one in found) / len(found)", "test_eval::test_pair_calibration"),
    # PPO
    Bug("whitening: no spread", "ppo:whiten_rewards", "/ (scores.std(correction=0) + 1e-6)", "/ 1", "test_ppo::test_whiten_rewards"),
    Bug("whitening: the shift exchanged", "ppo:whiten_rewards", "whitened if shift_mean else", "whitened if not shift_mean else",
        "test_ppo::test_whiten_rewards"),
    Bug("advantages whitened over padding", "ppo:whiten_advantages", "picked = advantages[mask]", "picked = advantages.flatten()",
        "test_ppo::test_whiten_advantages"),
    Bug("advantages whitened row by row", "ppo:whiten_advantages", "(advantages - picked.mean())",
        "(advantages - (advantages * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True))", "test_ppo::test_whiten_advantages"),
    Bug("KL's sign", "ppo:kl_penalty", "(logprobs - reference)", "(reference - logprobs)", "test_ppo::test_kl_penalty"),
    Bug("KL after EOS", "ppo:kl_penalty", ".masked_fill(~mask, 0.0)", "", "test_ppo::test_kl_penalty"),
    Bug("KL never negative", "ppo:kl_penalty", "(logprobs - reference)", "(logprobs - reference).clamp(min=0)",
        "test_ppo::test_kl_penalty_has_the_kl_as_its_mean"),
    Bug("reward one slot late", "ppo:token_rewards", "last * scores[:, None]", "last.roll(1, 1) * scores[:, None]",
        "test_ppo::test_token_rewards"),
    Bug("reward in the last column", "ppo:token_rewards", "last * scores[:, None]",
        "(last.cumsum(1).cumsum(1) == last.shape[1] - last.int().argmax(1)[:, None]) * scores[:, None]", "test_ppo::test_token_rewards"),
    Bug("reward at each token", "ppo:token_rewards", "last * scores[:, None]", "mask * scores[:, None]", "test_ppo::test_token_rewards"),
    Bug("the KL is rewarded", "ppo:token_rewards", "-beta * kl", "beta * kl", "test_ppo::test_token_rewards"),
    Bug("GAE bootstraps past EOS", "ppo:gae", "values.masked_fill(~mask, 0.0)", "values", "test_ppo::test_gae_ends_with_the_answer"),
    Bug("GAE: λ on the reward", "ppo:gae", "gamma * next_value", "gamma * lam * next_value", "test_ppo::test_gae"),
    Bug("GAE: γ forgotten", "ppo:gae", "gamma * lam * following", "lam * following", "test_ppo::test_gae_equals_the_slow_one"),
    Bug("returns without the value", "ppo:gae", "return advantages, advantages + values", "return advantages, advantages",
        "test_ppo::test_gae"),
    Bug("clip on the wrong side", "ppo:policy_loss", "torch.minimum(", "torch.maximum(", "test_ppo::test_policy_loss"),
    Bug("only the clipped ratio", "ppo:policy_loss", "torch.minimum(ratio * advantages,", "torch.minimum(ratio.clamp(1 - clip, 1 + clip) * advantages,",
        "test_ppo::test_policy_loss"),
    Bug("ratio upside down", "ppo:policy_loss", "(logprobs - old)", "(old - logprobs)", "test_ppo::test_policy_loss_equals_the_slow_one"),
    Bug("policy loss over padding", "ppo:policy_loss", "-objective.masked_fill(~mask, 0.0)", "-objective",
        "test_ppo::test_policy_loss_outside_of_the_mask"),
    Bug("value loss over padding", "ppo:value_loss", ".masked_fill(~mask, 0.0)", "", "test_ppo::test_value_loss"),
    Bug("the value knows the token", "ppo:Critic.forward", "F.pad(values, (1, 0))", "F.pad(values, (0, 1))", "test_ppo::test_critic"),
    Bug("the value starts without the reward's shift", "ppo:Critic.start_at", "(model.shift.item() + mean)", "mean",
        "test_ppo::test_critic_starts_at_the_reward_model"),
    Bug("PPO on stale reward models", "ppo:main", "judges = Judges(judge_folders, device)",
        "judges = Judges(newest_reward_models(s.out, earlier), device)", "test_ppo::test_main_keeps_the_best"),
    Bug("log-probabilities of the token before", "ppo:answer_logprobs", "tokens[mask])", "tokens[:, :-1][mask[:, 1:]])",
        "test_ppo::test_answer_logprobs"),
    Bug("log-probabilities at another temperature", "ppo:answer_logprobs", "model.output(before).float()",
        "model.output(before).float() / 0.8", "test_ppo::test_rollout_logprobs_equal_those_of_training"),
    Bug("padding trained on in PPO", "ppo:pad_answers", "[True] * len(answer) for prompt, answer in pairs], False)",
        "[True] * len(answer) for prompt, answer in pairs], True)", "test_ppo::test_pad_answers"),
    Bug("no EOS in PPO", "ppo:pad_answers", "[True] * len(answer) for", "[True] * (len(answer) - 1) + [False] for",
        "test_ppo::test_rollout_samples_as_the_model_is"),
    Bug("rollouts at another temperature", "ppo:rollout", "s.max_new_tokens, 1.0,", "s.max_new_tokens, 0.8,",
        "test_ppo::test_rollout_samples_as_the_model_is"),
    Bug("rollouts: ids encoded again from text", "ppo:rollout", "answers = [found[i] for i in range(len(encoded))]",
        "answers = [type(x)(y, (x.logprobs * 9)[:len(y)], x.finish_reason) for x in map(found.get, range(len(encoded))) "
        "for y in [tokenizer.encode(tokenizer.decode(x.ids)) + [tokenizer.eos_id]]]", "test_ppo::test_rollout_keeps_the_ids_as_sampled"),
    Bug("whitening after the KL", "ppo:rollout", "rewards = token_rewards(scores, kl_penalty(logprobs, before, mask), mask, s.beta)",
        "rewards = token_rewards(whiten_rewards(scores - s.beta * kl_penalty(logprobs, before, mask).sum(1)), 0 * logprobs, mask, 0)",
        "test_ppo::test_rollout_equals_the_slow_one"),
    Bug("whitened where it should not be: each token", "ppo:rollout", "gae(rewards, values, mask, s.gamma, s.lam)",
        "gae(whiten_advantages(rewards, mask), values, mask, s.gamma, s.lam)", "test_ppo::test_rollout_equals_the_slow_one"),
    Bug("cut answers keep their score", "ppo:rollout", "[bool(unusable(row)) for row in rows]", "[False for row in rows]",
        "test_ppo::test_rollout_equals_the_slow_one"),
    Bug("PPO: divided by micro-batches", "ppo:ppo_step", "(sum(found.values()) / count).backward()",
        "(sum(found.values()) / mask.sum()).backward()", "test_ppo::test_ppo_step_counts_tokens_not_batches"),
    Bug("warm-up moves the policy", "ppo:ppo_step", 'for name, optimizer in optimizers.items():',
        'policy.norm.weight.data.mul_(1.01)\n    for name, optimizer in optimizers.items():', "test_ppo::test_ppo_step_changes_what_it_should"),
    Bug("gradients add up over steps", "ppo:ppo_step", "optimizer.zero_grad()", "pass", "test_ppo::test_ppo_step_counts_tokens_not_batches"),
    Bug("advantages' sign in the step", "ppo:ppo_step", "policy_loss(logprobs, old, advantages,", "policy_loss(logprobs, old, -advantages,",
        "test_ppo::test_ppo_step_is_reinforce"),
    Bug("reference not frozen", "ppo:main", "reference = load_model(init, device)[0].requires_grad_(False)", "reference = policy",
        "test_ppo::test_main_keeps_the_best"),
    Bug("the last is kept, not the best", "ppo:main", 'if found["reward"] > best["reward"] and', "if", "test_ppo::test_main_stops_early"),
    Bug("critic's optimiser not resumed", "ppo:main", "for name, x in optimizers.items()}}", "for name, x in list(optimizers.items())[:1]}}",
        "test_chain::test_killed_again_and_again[ppo]"),
    Bug("best so far forgotten on resume", "ppo:main", 'first, best, stale = state["iteration"], state["best"], state["stale"]',
        'first = state["iteration"]', "test_chain::test_killed_again_and_again[ppo]"),
    Bug("rollouts share their random numbers", "ppo:main", '(s.seed, "ppo", iteration)', '(s.seed, "ppo", 0)',
        "test_ppo::test_main_draws_new_numbers"),
    # rounds: what is learned from, which scores, which annotator
    Bug("the mean of K instead of the best", "rejection_sampling:SamplePool.best", 'torch.tensor([row["reward"] for row in self.rows])',
        'torch.tensor([-abs(row["reward"] - sum(r["reward"] for r in self.rows if r["index"] == row["index"]) '
        '/ sum(r["index"] == row["index"] for r in self.rows)) for row in self.rows])', "test_rejection_sampling::test_sample_pool"),
    Bug("the best answer to another prompt", "rejection_sampling:SamplePool.best", "self.rows[picked[index]], self.prompts[index]",
        "self.rows[picked[index]], self.prompts[index - 1]", "test_rejection_sampling::test_sample_pool"),
    Bug("helpfulness picks instead of the reward", "rejection_sampling:SamplePool.best", '[row["reward"] for', '[row["helpfulness"] for',
        "test_rejection_sampling::test_sample_pool"),
    Bug("scores of a batch that was cut are kept", "rejection_sampling:SamplePool.rescore", "[len(batch) for batch in batches]) if path",
        "[1] * len(self.rows)) if path", "test_rejection_sampling::test_sample_pool_goes_on_scoring_where_it_was"),
    Bug("best answers carry loss on all turns", "rejection_sampling:SamplePool.best", '"train_on": "last"', '"train_on": "all"',
        "test_rejection_sampling::test_mix_and_constrained_prompts"),
    Bug("mixed dialogs carry loss on all turns", "sft:encode_rows", 'row.get("train_on", "all")', '"all"',
        "test_rejection_sampling::test_mix_and_constrained_prompts"),
    Bug("the mix is forgotten", "rejection_sampling:run_round", "model.args.max_seq_len) + mix", "model.args.max_seq_len)",
        "test_rejection_sampling::test_mix_and_constrained_prompts"),
    Bug("the rule that keeps cut answers", "runtime.sampling:unusable", 'if row["finish_reason"] != "eos":', "if False:",
        "test_sampling::test_unusable"),
    Bug("the search counts cut answers", "rejection_sampling:search_temperature", "if not unusable(row)]", "]",
        "test_rejection_sampling::test_search_temperature_counts_what_the_pool_takes"),
    Bug("the search leaves out prompts without an answer", "rejection_sampling:search_temperature",
        "found.get(i, min(everything)) for i in range(len(prompts))", "found[i] for i in found",
        "test_rejection_sampling::test_search_temperature_counts_what_the_pool_takes"),
    Bug("the zero of helpfulness is not set after a refresh", "rejection_sampling:refresh_reward_models", 'if axis == "helpfulness":', "if False:",
        "test_rejection_sampling::test_reward_models_with_another_tokenizer"),
    Bug("the zero of safety is shifted", "rejection_sampling:refresh_reward_models", 'if axis == "helpfulness":', "if True:",
        "test_rejection_sampling::test_reward_models_with_another_tokenizer"),
    Bug("the zero is set as if it had been 0", "reward:set_shift", "model.shift +=", "model.shift[...] =",
        "test_reward::test_set_shift"),
    Bug("shift over all pairs", "reward:set_shift", "[:500]", "", "test_reward::test_set_shift"),
    Bug("pairs with cut answers", "reward:collect_preferences", "unusable(a) or unusable(b) or", "",
        "test_reward::test_collect_preferences_leaves_out_cut_answers"),
    Bug("ids of another tokenizer are scored", "rejection_sampling:Judges.sequences",
        'row.get("tokenizer", self.tokenizer.fingerprint) == self.tokenizer.fingerprint', "True",
        "test_rejection_sampling::test_judges_of_another_tokenizer"),
    Bug("answers are scored by their text", "rejection_sampling:Judges.sequences",
        'row.get("tokenizer", self.tokenizer.fingerprint) == self.tokenizer.fingerprint', "False",
        "test_rejection_sampling::test_judges_of_another_tokenizer"),
    Bug("replay without a limit", "rejection_sampling:refresh_reward_models", ", MAX_REPLAY)", ")",
        "test_rejection_sampling::test_refresh_reward_models"),
    Bug("the value starts with the wrong sign", "ppo:Critic.start_at", "model.head.weight / spread", "-model.head.weight / spread",
        "test_ppo::test_critic_starts_at_the_reward_model"),
    Bug("reward models learn pairs in the policy's ids", "rejection_sampling:refresh_reward_models", "save_reward_model(refreshed[axis], model, judges_tokenizer)",
        "save_reward_model(refreshed[axis], model, tokenizer)", "test_rejection_sampling::test_reward_models_with_another_tokenizer"),
    Bug("what cannot be used stands first", "rejection_sampling:candidates", "(bool(unusable(row)), -row", "(-row",
        "test_rejection_sampling::test_candidates_that_cannot_be_used_stand_last"),
    Bug("the worst candidate first", "rejection_sampling:candidates", '-row["reward"]', 'row["reward"]', "test_rejection_sampling::test_candidates"),
    Bug("the first reward models for ever", "runtime.stage:newest_reward_models", "refreshed[-1] if refreshed else", "",
        "test_reward_data::test_newest_reward_models"),
    Bug("scores are not written with the answers", "runtime.sampling:sample_answers", "finish(fresh)", "finish([dict(row) for row in fresh])",
        "test_sampling::test_sample_answers_finishes_each_batch"),
    Bug("prompts in no order", "runtime.sampling:sample_answers", "key=lambda i: lengths[i])", "key=lambda i: -i)",
        "test_sampling::test_sample_answers_wastes_nothing"),
    Bug("sides of a filled-in file not put back", "data.annotators:put_back", '(row["better"] == "a") == swapped', 'row["better"] == "b"',
        "test_data::test_annotate_file"),
    Bug("safety labels of a filled-in file not put back", "data.annotators:put_back", "[:: -1 if swapped else 1]", "[::1]",
        "test_data::test_annotate_file"),
    Bug("the first answer is always A", "data.annotators:blank_lines", "[:: -1 if sides_swapped(axis, seed, i) else 1]", "[::1]",
        "test_data::test_annotate_file"),
    Bug("one order of sides for all collections", "data.annotators:sides_swapped", "{seed} {axis} {position}", "{position}",
        "test_data::test_blank_lines"),
    Bug("1 is true", "data.annotators:read_annotations", "type(found) is type(value) and ", "", "test_data::test_read_annotations"),
    Bug("lines of another file are read", "data.annotators:read_annotations", "WANTED.get(field, (as_written,))",
        "WANTED.get(field, (row.get(field),))", "test_data::test_read_annotations"),
    Bug("answers of a person are saved at the end only", "data.annotators:annotate_human", "write_jsonl(path, rows)",
        "len(rows) == len(lines) and write_jsonl(path, rows)", "test_data::test_annotate_human_goes_on_where_it_was"),
    # Ghost Attention
    Bug("ghost: loss left on earlier turns", "gatt:ghost_loss_mask", "answer and turn == max(turns)", "answer", "test_gatt::test_ghost_loss_mask"),
    Bug("ghost: the wrong turn is trained on", "gatt:ghost_loss_mask", "max(turns)", "min(turns)", "test_gatt::test_ghost_loss_mask"),
    Bug("ghost rows train on all turns", "gatt:ghost_dialogs", '"train_on": "last"', '"train_on": "all"', "test_gatt::test_ghost_dialogs"),
    Bug("instruction left in later turns", "gatt:ghost_dialogs", ', "first")', ")", "test_gatt::test_ghost_dialogs"),
    Bug("instruction missing from the first turn", "gatt:instruct", "users[:1]", "users[1:]", "test_gatt::test_ghost_dialogs"),
    Bug("sampled without the instruction on every turn", "gatt:instruct", 'turns == "every"', 'turns == "always"', "test_gatt::test_instruct"),
    Bug("EOS lost between turns", "data.chat:encode_dialog", "answer_ids is not None:", "answer_ids is not None or (turn < last and answer.pop() < 0):",
        "test_gatt::test_ghost_dialogs_reach_the_loss"),
    Bug("EOS lost between sampled turns", "eval:adherence", "[answer[-1], eos_id][answer[-1] == eos_id:]", "[answer[-1]][answer[-1] == eos_id:]",
        "test_gatt::test_adherence"),
    Bug("adherence without the instruction", "eval:adherence", "texts[i] if turn == 0", "texts[i] if turn < 0", "test_gatt::test_adherence"),
    Bug("the last token is read twice", "eval:adherence", "len(answer) - 1 for end", "len(answer) for end", "test_gatt::test_adherence"),
    Bug("a probe answered wrongly passes", "eval:adherence", "&= toy.obeys", "|= toy.obeys", "test_gatt::test_adherence_counts"),
    Bug("one of two constraints is enough", "eval:adherence_by_turn", "all(row", "any(row", "test_gatt::test_adherence_by_turn"),
    Bug("answers of a dialog count as independent", "eval:adherence_by_turn", 'interval(kept, [row["dialog"] for row in rows])', "interval(kept)",
        "test_gatt::test_adherence_by_turn"),
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
    # preferences from files, cross-validation, what reward models are asked
    Bug("folds leak a prompt", "data.preferences:folds_by_prompt", 'fold_of[json.dumps(row["prompt"])] for row in rows]',
        "i % max(folds, 1) for i, row in enumerate(rows)]", "test_reward_data::test_folds_by_prompt"),
    Bug("judged on pairs that were learned", "data.preferences:folds_by_prompt", "if number != k]", "]",
        "test_reward_data::test_folds_by_prompt"),
    Bug("each fold goes on from the last", "reward:main", "RewardModel(body, tags)", "RewardModel(policy, tags)",
        "test_reward_data::test_main_learns_other_pairs_than_it_is_judged_on"),
    Bug("the newest turns are dropped", "data.preferences:drop_oldest_turns", "prompt[2:]", "[*prompt[:-3], prompt[-1]]",
        "test_reward_data::test_drop_oldest_turns"),
    Bug("half a turn is dropped", "data.preferences:drop_oldest_turns", "prompt[2:]", "[*prompt[1:]]",
        "test_reward_data::test_drop_oldest_turns"),
    Bug("one answer decides what is too long", "data.preferences:drop_oldest_turns", 'for side in ("chosen", "rejected")',
        'for side in ("chosen",)', "test_reward_data::test_drop_oldest_turns"),
    Bug("HH-RLHF: chosen and rejected exchanged", "data.preferences:parse_hh_rlhf", "chosen.rpartition(ASSISTANT), rejected.rpartition(ASSISTANT)",
        "rejected.rpartition(ASSISTANT), chosen.rpartition(ASSISTANT)", "test_reward_data::test_parse_hh_rlhf"),
    Bug("HH-RLHF: the first answer for the last", "data.preferences:parse_hh_rlhf", "chosen.rpartition(ASSISTANT), rejected.rpartition(ASSISTANT)",
        "chosen.partition(ASSISTANT), rejected.partition(ASSISTANT)", "test_reward_data::test_parse_hh_rlhf"),
    Bug("unsafe choices stay", "data.preferences:read_pairs", 'if axis == "safety":', "if False:",
        "test_reward_data::test_read_pairs_leaves_out_unsafe_choices"),
    Bug("the wrong bin is left out", "data.preferences:drop_unsafe_choices", 'row.get("rejected_is_safe"))', 'row.get("rejected_is_safe") is False)',
        "test_reward_data::test_drop_unsafe_choices"),
    Bug("a share of one's own pairs for one of all", "data.preferences:mix_pairs", "share / (1 - share)", "share",
        "test_reward_data::test_mix_pairs"),
    Bug("ties of the cross-validation are right", "data.preferences:print_cross_validation", "0.5 * (differences == 0)", "1.0 * (differences == 0)",
        "test_reward_data::test_print_cross_validation"),
    Bug("words of the rejected answer count for it", "data.preferences:bag_of_words", '("rejected", -1.0)', '("rejected", 1.0)',
        "test_reward_data::test_bag_of_words"),
    Bug("versions sorted as words", "runtime.stage:newest_reward_models", '(int(path.name[6:].removesuffix("-ppo")), path.name)', "path.name",
        "test_reward_data::test_newest_reward_models"),
    Bug("scores asked for forget the tag", "reward:score_dialogs", 'bool(d.get("is_safety"))', "False", "test_reward_data::test_score_dialogs"),
    Bug("chosen and rejected swapped in half of the batch", "reward:train_reward_model", "chosen, rejected = scores.chunk(2)",
        "chosen, rejected = (torch.where(torch.arange(len(picked)) % 2 == 0, *scores.chunk(2)[::way]) for way in (1, -1))",
        "test_reward::test_train_reward_model_loss"),
    Bug("the ranking loss is divided by padded tokens", "reward:train_reward_model", "return loss, len(picked), {", "return loss, int(lengths.max()) * len(picked), {",
        "test_reward::test_train_reward_model_loss"),
    # the report
    Bug("sides not swapped back", "runtime.terminal:unswap", "grade - 4 if swapped else 4 - grade", "4 - grade", "test_report::test_ask_grades"),
    Bug("a person's ties are dropped", "runtime.terminal:ask_grades", "append_rows(path, [row])\n", "if not row['grade']: continue\n        append_rows(path, [row])\n",
        "test_report::test_ask_grades"),
    Bug("a person is asked again", "runtime.terminal:ask_grades", 'if (first["index"], first["sample"]) in done:', "if False:", "test_report::test_ask_grades"),
    Bug("kept answers are counted only", "runtime.sampling:sample_answers",
        "there != planned[: len(there)] and sorted(there) != sorted(planned)", "False",
        "test_sampling::test_sample_answers_goes_on_where_it_was"),
    Bug("room for the short form only", "gatt:leave_out_long", "(trained_on, in_full_too)",
        "(trained_on,)", "test_gatt::test_leave_out_long"),
    Bug("dialogs grown too long are kept", "gatt:main", "dialogs = leave_out_long(tokenizer, dialogs, s, model.args.max_seq_len)  #", "#",
        "test_gatt::test_main_leaves_out_what_grew_too_long"),
    Bug("one of two words is enough", "experiments.longer_sft:asked", "all(toy.obeys", "any(toy.obeys", "test_experiments::test_asked"),
    Bug("a right word counts as a blend", "experiments.longer_sft:is_blend", "word not in values and ", "", "test_experiments::test_asked"),
    Bug("a second system prompt vanishes quietly", "data.chat:fold_system", 'if any(message["role"] == "system" for message in messages[1:]):', "if False:",
        "test_data::test_fold_system"),
    Bug("changed text, old ids", "data.chat:sampled_ids", "if tokenizer.decode(ids).strip() == text.strip()", "if True", "test_data::test_sampled_ids"),
    Bug("control tokens in given ids", "sft:encode_rows", "tokenizer.bos_id in ids or tokenizer.eos_id in ids[:-1]", "False", "test_sft::test_encode_rows"),
    Bug("far outside: not corrected for the count", "eval:health", "comparisons=len(known)", "comparisons=1", "test_report::test_health"),
    Bug("no room for an answer", "gatt:leave_out_long", "length + s.max_new_tokens <= max_seq_len", "length <= max_seq_len",
        "test_gatt::test_leave_out_long"),
    Bug("any item will do", "data.toy:knows", "bool(family.right(prompt[\"item\"], random.Random(0)))", "True", "test_toy::test_knows"),
    Bug("grades of other models count", "runtime.terminal:ask_grades", 'if row.get("made_by") == mark}', "}", "test_report::test_ask_grades"),
    Bug("wrong baseline", "eval:main", 'views[who][name], views[who]["sft"]', "views[who][name], views[who][newest]",
        "test_report::test_second_call_does_not_sample"),
    Bug("system prompt for one of the two", "eval:main", "told = {name: answer(name, toy.words.ORDINARY_SYSTEM) for",
        'told = {name: answer(name, toy.words.ORDINARY_SYSTEM if name == newest else "") for',
        "test_report::test_second_call_does_not_sample"),
    Bug("B against A", "eval:compare_two", "compare(prompts, *judged, tie)", "compare(prompts, *judged[::-1], tie)", "test_report::test_compare_two"),
    Bug("prediction interval without the 1 +", "eval:prediction_interval", "math.sqrt(1 + 1 / n)", "math.sqrt(1 / n)", "test_report::test_prediction_interval"),
    Bug("prediction interval: normal for t", "eval:prediction_interval", "student_quantile(1 - 0.025 / comparisons, n - 1)", "1.96",
        "test_report::test_prediction_interval"),
    Bug("stale answers", "runtime.sampling:kept_rows", "any(row.get(\"made_by\") != mark for row in rows)", "False", "test_report::test_cached_answers"),
    Bug("mark without the model", "runtime.sampling:made_by", "fingerprint(folder), *settings", "*settings", "test_report::test_cached_answers"),
    Bug("score of another row", "eval:score_rows", "for i, value in zip(picked, score", "for i, value in zip(sorted(picked, reverse=True), score",
        "test_report::test_score_rows"),
    Bug("answers scored by their text", "eval:score_rows", 'row["answer_ids"] if row["tokenizer"] == tokenizer.fingerprint else None', "None",
        "test_report::test_score_rows"),
]

SAMPLE = ["loss mask one off", "no EOS in the loss", "accumulation: mean of means", "double BOS", "boundary by text",
          "log-probabilities at the sampling temperature", "margin broadcasts", "margin's sign", "gate on the raw logit",
          "score one slot off", "safety labels exchanged in training", "best across prompts", "answers at the length limit stay",
          "ties are losses", "interval: clusters ignored", "held out by wording alone",
          "reward one slot late", "GAE bootstraps past EOS", "clip on the wrong side"]


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
