"""The peers: what people would use instead, with our weights in them.

    pip install -r experiments/speed/requirements.txt

A peer that is not installed is skipped, and the table says so.
"""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from model import Transformer
from runtime.weights import hf_name, to_half_split


def missing(*modules: str) -> str:
    """Why a peer that needs these modules cannot run; "": it can."""
    for module in modules:
        try:
            found = find_spec(module)
        except ModuleNotFoundError:  # of the package that it is in
            found = None
        if found is None:
            return f"{module} is not installed"
    return ""


def quieten() -> None:
    """No bars, no warnings: their printing is not what is measured."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not missing("datasets"):
        import datasets

        datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def config(model: Transformer, **changes):
    """Our settings as transformers' configuration."""
    import transformers

    args = model.args
    return transformers.LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_size,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_size,
        max_position_embeddings=args.max_seq_len,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=args.tie_word_embeddings,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names, in its order of RoPE's numbers."""
    renamed = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("wq.weight", "wk.weight")):
            weight = to_half_split(weight, model.args.head_size)
        renamed[hf_name(name)] = weight
    return renamed


def llama(model: Transformer):
    """transformers' LlamaForCausalLM with the weights of our model."""
    import transformers

    quieten()
    theirs = transformers.LlamaForCausalLM(config(model, pad_token_id=0))
    theirs.load_state_dict(weights(model))
    return theirs.to(model.tok_embeddings.weight.dtype).eval()


def scorer(body: Transformer, head: torch.Tensor):
    """transformers' LlamaForSequenceClassification with our body and our scalar head."""
    import transformers

    quieten()
    settings = config(body, num_labels=1, pad_token_id=0)
    theirs = transformers.LlamaForSequenceClassification(settings)
    renamed = weights(body)
    renamed.pop("lm_head.weight")
    theirs.load_state_dict(renamed | {"score.weight": head})
    return theirs.eval()


def tokenizer(vocab_size: int, pad_id: int):
    """As much of a tokenizer as TRL's trainers ask for: their rows are ids already."""
    import tokenizers
    import transformers

    words = {f"w{i}": i for i in range(vocab_size)}
    words |= {"<pad>": pad_id, "<s>": 1, "</s>": 2}
    by_id = {number: word for word, number in words.items()}  # the special ones won
    of_words = tokenizers.models.WordLevel({word: i for i, word in by_id.items()}, "<pad>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(of_words),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def trainer_settings(folder: Path, rows: int, **changes) -> dict:
    """What all trainers of TRL have in common: float32, no recomputation, nothing saved."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return settings | changes


def silence(trainer):
    """The trainer without the callback that prints its logs."""
    import transformers

    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
