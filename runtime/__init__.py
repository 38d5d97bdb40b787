"""The plumbing under the stages: machine, settings and folders, checkpoints, weights, sampling and
log.

No equation of the paper lives here. Public names come from the package: `from runtime import
load_model, open_stage`.
"""

from runtime.checkpoint import (
    append_rows,
    atomic_write,
    load_checkpoint,
    plain_json,
    restore_checkpoint,
    resume_rows,
    save_checkpoint,
)
from runtime.machine import choose_device, choose_dtype, hold, set_seed, set_threads
from runtime.metrics import Metrics
from runtime.sampling import (
    as_answer,
    as_numbers,
    cached_answers,
    encode_prompts,
    in_batches,
    kept_rows,
    made_by,
    sample_answers,
    sample_planned,
    unusable,
)
from runtime.settings import StageSettings, check_between, check_positive, parse_settings, run
from runtime.stage import (
    Stage,
    check_same_prompts,
    fingerprint,
    finish_stage,
    is_finished,
    kept_settings,
    newest_reward_models,
    open_stage,
    require,
)
from runtime.weights import export_hf, load_model, save_model

__all__ = [
    "as_answer",
    "as_numbers",
    "sample_planned",
    "Stage",
    "StageSettings",
    "Metrics",
    "append_rows",
    "atomic_write",
    "cached_answers",
    "check_between",
    "check_positive",
    "check_same_prompts",
    "choose_device",
    "choose_dtype",
    "encode_prompts",
    "export_hf",
    "fingerprint",
    "finish_stage",
    "hold",
    "in_batches",
    "is_finished",
    "kept_rows",
    "kept_settings",
    "load_checkpoint",
    "load_model",
    "made_by",
    "newest_reward_models",
    "open_stage",
    "parse_settings",
    "plain_json",
    "require",
    "restore_checkpoint",
    "resume_rows",
    "run",
    "sample_answers",
    "save_checkpoint",
    "save_model",
    "set_seed",
    "set_threads",
    "unusable",
]
