"""Planted bugs in `sft`: see `tests/planted/__init__.py`."""

from tests.planted.bug import Bug

BUGS = [
    Bug(
        "loss mask one off",
        "sft:sft_loss",
        "loss_mask[:, 1:]",
        "loss_mask[:, :-1]",
        "test_sft::test_sft_loss",
    ),
    Bug(
        "loss on questions",
        "sft:sft_loss",
        "loss_mask[:, 1:]",
        "(loss_mask | True)[:, 1:]",
        "test_sft::test_sft_loss",
    ),
    Bug(
        "no shift",
        "sft:sft_loss",
        "features[:, :-1][trained]",
        "features[:, 1:][trained]",
        "test_sft::test_sft_loss",
    ),
    Bug(
        "a mean where a sum belongs",
        "sft:sft_loss",
        'reduction="sum"',
        'reduction="mean"',
        "test_sft::test_sft_loss",
    ),
    Bug(
        "all masked is quiet",
        "sft:sft_loss",
        "if count == 0:",
        "if False:",
        "test_sft::test_sft_loss_of_nothing",
    ),
    Bug(
        "padding is trained on",
        "sft:answer_loss",
        "dialog.loss_mask for dialog in dialogs], False",
        "dialog.loss_mask for dialog in dialogs], True",
        "test_sft::test_answer_loss",
    ),
    Bug(
        "held-out loss: mean of means",
        "sft:held_out_loss",
        "total += loss.item()\n        count += counted",
        "total += loss.item() / counted\n        count += 1",
        "test_sft::test_held_out_loss",
    ),
    Bug(
        "accumulation: mean of means",
        "sft:finetune",
        "return *answer_loss(model, [dialogs[row] for row in rows]), {}",
        "loss, count = answer_loss(model, [dialogs[row] for row in rows]); return loss / count,"
        " 1, {}",
        "test_sft::test_finetune_accumulates",
    ),
    Bug(
        "ids encoded again from text",
        "sft:encode_dialogs",
        "dialog.tokenizer, answer)",
        'dialog.tokenizer, "")',
        "test_sft::test_encode_dialogs",
    ),
    Bug(
        "mixed dialogs carry loss on all turns",
        "sft:encode_dialogs",
        "dialog.messages, dialog.train_on,",
        'dialog.messages, "all",',
        "test_rejection_sampling::test_mix_and_constrained_prompts",
    ),
    Bug(
        "control tokens in given ids",
        "data.chat:sampled_ids",
        "tokenizer.bos_id in ids or tokenizer.eos_id in ids[:-1]",
        "False",
        "test_sft::test_encode_dialogs",
    ),
    Bug(
        "weights that are no numbers are saved",
        "sft:optimise",
        "if not all(weight.isfinite().all() for weight in weights):",
        "if False:",
        "test_sft::test_finetune_refuses_to_diverge",
    ),
    Bug(
        "a gradient that is no number is applied",
        "sft:optimise",
        "if not math.isfinite(total) or not norm.isfinite():",
        "if False:",
        "test_sft::test_finetune_refuses_to_diverge",
    ),
    Bug(
        "loss over all positions, then masked",
        "sft:sft_loss",
        'return F.cross_entropy(logits, targets[trained], reduction="sum"), count',
        "losses = F.cross_entropy(output(features[:, :-1]).flatten(0, 1).float(), targets.clamp(0,"
        ' 2).flatten(), reduction="none"); return (losses * trained.flatten()).sum(), count',
        "test_sft::test_sft_loss",
    ),
    Bug(
        "ids of padding are looked up",
        "sft:sft_loss",
        'return F.cross_entropy(logits, targets[trained], reduction="sum"), count',
        "losses = F.cross_entropy(output(features[:, :-1]).flatten(0, 1).float(), "
        'targets.flatten(), reduction="none"); return losses[trained.flatten()].sum(), count',
        "test_sft::test_sft_loss",
    ),
    Bug(
        "too long dialogs are kept",
        "sft:encode_dialogs",
        "if length <= max_seq_len:",
        'if length <= max_seq_len or too_long == "skip":',
        "test_sft::test_encode_dialogs_leaves_out_what_is_too_long",
    ),
    Bug(
        "all dialogs are left out without an error",
        "sft:encode_dialogs",
        "if not encoded:",
        "if False:",
        "test_sft::test_encode_dialogs_leaves_out_what_is_too_long",
    ),
    Bug(
        "a safety share that leaves nothing",
        "sft:_keep_safety_share",
        "if not kept:",
        "if False:",
        "test_sft::test_safety_rows_can_be_taken_out_by_share",
    ),
]
