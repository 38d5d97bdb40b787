"""Weights in and out: reads a model from any layout in which Llama 2 is found, writes Meta's or
Hugging Face's.

    layout          files
    Meta, ours      params.json, consolidated.00.pth … consolidated.NN.pth (one per model-parallel
                    process)
    Hugging Face    config.json, model.safetensors or pytorch_model.bin, or several of them with an
                    index

with the tokenizer beside them (`data/tokenizer.py`). Names and shapes: Meta's `llama/model.py` and
transformers' `convert_llama_weights_to_hf.py`. What we cannot honour in a checkpoint is refused,
never ignored, and no code from a checkpoint is ever run (`weights_only`).

A folder of ours, or Meta's, becomes one for vLLM, llama.cpp, TRL or anything else that reads
Hugging Face's layout by

    python -m runtime out/rlhf-v4 exported
"""

import argparse
import itertools
import json
import os
import pickle
import re
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.tokenizer import Tokenizer
from data.tokenizer_json import write_tokenizer_json
from model import ModelArgs, Transformer
from runtime.checkpoint import atomic_write, check_zip, naming

# Model parallelism cuts each matrix along one dimension (Meta's ColumnParallelLinear 0,
# RowParallelLinear and ParallelEmbedding 1); norms are in every shard as they are.
SHARD_DIM = {
    "tok_embeddings": 1,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
}

# Meta's name -> Hugging Face's.
HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of a parameter.

    >>> hf_name("layers.3.attention.wq.weight"), hf_name("norm.weight")
    ('model.layers.3.self_attn.q_proj.weight', 'model.norm.weight')
    """
    layer, part = re.fullmatch(r"(layers\.\d+\.)?(.*)\.weight", name).groups()
    return ("model." + layer if layer else "") + HF_NAMES[part] + ".weight"


def to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of wq or wk, (heads · head_dim, dim), for Hugging Face's RoPE, which turns
    number j of a head with number j + head_dim/2 where Meta turns neighbours: of each head first
    the even rows, then the odd ones.

    >>> to_half_split(torch.arange(4.0)[:, None], head_dim=4).flatten()
    tensor([0., 2., 1., 3.])
    """
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Undoes `to_half_split`.

    >>> to_interleaved(torch.tensor([0.0, 2.0, 1.0, 3.0])[:, None], head_dim=4).flatten()
    tensor([0., 1., 2., 3.])
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


# ---- reading ----


def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> tuple[Transformer, Tokenizer]:
    """The model in `folder`, whatever its layout, and its tokenizer. dtype None: as stored.

    The files are mapped into memory, each tensor is copied straight to where it belongs, and after
    each layer they are unmapped: no more memory is needed than the model's own and about one
    layer's. Before any is taken, all settings, names and shapes have been compared. The checksums
    in .pth and .bin files are checked, which reads a file once more (about a second for each
    GB); .safetensors have none. The model is in eval mode. InputError, naming file and tensor, for
    anything missing, broken, of a wrong shape, unknown, quantised, sparse or not finite, for
    shards that are not of one model, and for settings that are not Llama 2's.
    """
    folder = Path(folder)
    meta = os.path.isfile(folder / "params.json")
    if not meta and not os.path.isfile(folder / "config.json"):
        raise InputError(f"{folder}: no model there (a folder with params.json or config.json)")
    beside = any(os.path.isfile(folder / name) for name in ("tokenizer.model", "tokenizer.json"))
    above = folder.resolve().parent  # Meta's download has it there
    if not beside and not any(
        os.path.isfile(above / name) for name in ("tokenizer.model", "tokenizer.json")
    ):
        raise InputError(
            f"{folder}: no tokenizer there or one folder up (tokenizer.model or tokenizer.json)"
        )
    tokenizer = Tokenizer(folder if beside else above)
    args = (
        read_params(folder / "params.json", tokenizer)
        if meta
        else read_config(folder / "config.json")
    )
    if args.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"{folder}: vocab_size is {args.vocab_size}, but the tokenizer has"
            f" {tokenizer.vocab_size} ids"
        )

    files = meta_files(folder) if meta else hf_files(folder)
    where = locate(files, args, meta)
    # On "meta" tensors have no memory; but the first nn.Embedding there costs a second of imports,
    # so not if small.
    small = sum(path.stat().st_size for path in files) < 2**24
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if small else "meta"):
        model = Transformer(args)
    for _, layer in itertools.groupby(where, lambda name: re.match(r"(layers\.\d+)?", name)[0]):
        keys = {name: name if meta else hf_name(name) for name in layer}
        tensors = {
            path: open_tensors(path, keys.values())
            for path in {path for name in keys for path in where[name]}
        }
        for name, key in keys.items():
            parts = [tensors[path][key] for path in where[name]]
            weight = torch.empty(
                model.get_parameter(name).shape, dtype=dtype or parts[0].dtype, device=device
            )
            check_shards(parts, name, where[name])
            fill(weight, parts, name, where[name], None if meta else args.head_size)
            model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(weight)
        del tensors, parts  # unmaps the files
    if args.tie_word_embeddings:
        if "output.weight" in where and not model.output.weight.equal(model.tok_embeddings.weight):
            raise InputError(
                f"{where['output.weight'][0]}: tie_word_embeddings is True, but the output matrix"
                " in the file is not the embedding matrix"
            )
        model.output.weight = model.tok_embeddings.weight
    return model.eval(), tokenizer


def read_json(path: Path) -> dict:
    """A JSON file that holds an object."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"{path}: not readable as JSON ({problem})") from None
    except RecursionError:
        raise InputError(f"{path}: not readable as JSON (nested too deeply)") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object, {{…}}")
    return content


# What we believe of a model. Sizes have one limit, from 1 to MOST: the longest context that anybody
# has published. More would only fill the memory.
MOST = 2**22
RANGES = {"norm_eps": (1e-20, 0.1), "rope_theta": (1.0, 1e12), "ffn_dim_multiplier": (0.001, 100.0)}


def model_args(path: Path, values: dict, names: dict[str, str] | None = None) -> ModelArgs:
    """ModelArgs from the fields of a file, None meaning the default; InputError for a value of the
    wrong kind, NaN, or one out of range.

    names: how the file calls the fields of ModelArgs (None: the same).
    """
    names = names or {}
    values = {name: value for name, value in values.items() if value is not None}
    for name in ("dim", "n_layers", "n_heads", "vocab_size"):
        if name not in values:
            raise InputError(f"{path}: {names.get(name, name)} is missing")
    for name, value in values.items():
        if name == "tie_word_embeddings":
            fits, expected = type(value) is bool, "true or false"
        elif name in RANGES:
            low, high = RANGES[name]
            fits = type(value) in (int, float) and low <= value <= high
            expected = f"a number from {low:g} to {high:g}"
        else:
            fits = type(value) is int and 1 <= value <= MOST
            expected = f"a whole number from 1 to {MOST}"
        if not fits:
            field = names.get(name, name)
            raise InputError(f"{path}: {field} is {value!r:.50}; expected {expected}")
    try:
        return ModelArgs(**values)
    except ValueError as problem:
        raise InputError(f"{path}: {problem}") from None


def read_params(path: Path, tokenizer: Tokenizer) -> ModelArgs:
    """Meta's params.json; ours has the further fields of ModelArgs where they are not the default.
    """
    params = read_json(path)
    unknown = params.keys() - {field.name for field in fields(ModelArgs)}
    if unknown:
        raise InputError(
            f"{path}: {', '.join(map(repr, sorted(unknown)))}: not a field of Llama 2, so it"
            " cannot be honoured"
        )
    if params.get("vocab_size") == -1:
        params["vocab_size"] = tokenizer.vocab_size
    return model_args(path, params)


# Hugging Face's names of ModelArgs' fields, and what the fields that we do not have must say.
CONFIG = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "ffn_dim": "intermediate_size",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
}
FIXED = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}


def read_config(path: Path) -> ModelArgs:
    """Hugging Face's config.json. What is not written there has transformers' default, not ours.
    RoPE's base may stand in three places; InputError unless all that have it agree.
    """
    config = {name: value for name, value in read_json(path).items() if value is not None}
    for name, only in FIXED.items():
        if config.get(name, only) != only:
            raise InputError(
                f"{path}: {name} is {config[name]!r:.200}; only {only!r} can be honoured"
            )
    thetas = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    for name in ("rope_scaling", "rope_parameters"):  # as transformers 4 and 5 call it
        given = config.get(name, {})
        plain = isinstance(given, dict) and given.get("rope_type", "default") == "default"
        if not plain or given.keys() - {"rope_type", "rope_theta"}:
            raise InputError(f"{path}: {name} is {given!r:.200}; only plain RoPE can be honoured")
        if given.get("rope_theta") is not None:
            thetas[f"{name}.rope_theta"] = given["rope_theta"]
    for place, theta in thetas.items():
        config.setdefault("rope_theta", theta)
        if theta != config["rope_theta"]:
            said = ", ".join(f"{place} is {theta!r:.50}" for place, theta in thetas.items())
            raise InputError(f"{path}: {said}; all must be the same number")
    config = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, **config}
    args = model_args(path, {ours: config.get(theirs) for ours, theirs in CONFIG.items()}, CONFIG)
    if args.ffn_dim is None:
        raise InputError(f"{path}: intermediate_size is missing")
    return args


def meta_files(folder: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth, … without gaps, and no other file of such a name.
    """
    shards = sorted(folder.glob("consolidated.*.pth"))
    for path in shards:
        number = path.name.split(".")[1]
        known = number.isdecimal() and path.name == f"consolidated.{int(number):02d}.pth"
        if not known or not path.is_file():
            raise InputError(
                f"{path}: not a file, or not called as a shard is (consolidated.00.pth, …01.pth)"
            )
    files = [folder / f"consolidated.{i:02d}.pth" for i in range(max(1, len(shards)))]
    for path in files:
        if path not in shards:
            raise InputError(f"{path}: this shard is missing")
    return files


def hf_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder, safetensors rather than bin; all that an index
    names must be there.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{index}: expected an object `weight_map`")
            for key, file in weight_map.items():
                if Path(str(file)).name != file or not os.path.isfile(folder / file):
                    raise InputError(
                        f"{index}: says that {key!r} is in {file!r:.200}, which is not there"
                    )
            return [folder / file for file in sorted(set(weight_map.values()))]
    raise InputError(
        f"{folder}: no weights there (model.safetensors or pytorch_model.bin, or their index)"
    )


def parameter_shapes(args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter of `Transformer(args)` in its order, without making one. A
    tied output matrix counts, too.

    >>> dict(parameter_shapes(ModelArgs()))["layers.31.attention.wq.weight"]
    (4096, 4096)
    """
    dim, hidden = args.dim, args.hidden_size
    queries, keys = args.n_heads * args.head_size, args.kv_heads * args.head_size
    yield "tok_embeddings.weight", (args.vocab_size, dim)
    for i in range(args.n_layers):
        yield f"layers.{i}.attention.wq.weight", (queries, dim)
        yield f"layers.{i}.attention.wk.weight", (keys, dim)
        yield f"layers.{i}.attention.wv.weight", (keys, dim)
        yield f"layers.{i}.attention.wo.weight", (dim, queries)
        yield f"layers.{i}.feed_forward.w1.weight", (hidden, dim)
        yield f"layers.{i}.feed_forward.w2.weight", (dim, hidden)
        yield f"layers.{i}.feed_forward.w3.weight", (hidden, dim)
        yield f"layers.{i}.attention_norm.weight", (dim,)
        yield f"layers.{i}.ffn_norm.weight", (dim,)
    yield "norm.weight", (dim,)
    yield "output.weight", (args.vocab_size, dim)


def locate(files: list[Path], args: ModelArgs, meta: bool) -> dict[str, list[Path]]:
    """Which files hold each parameter: all of Meta's hold a part of it, one of Hugging Face's holds
    it whole. InputError unless the tensors of the files are exactly those that the settings ask
    for; the first difference ends it, so absurd settings cost neither time nor memory.
    """
    stored: dict[str, dict[Path, Tensor]] = {}
    for path in files:
        for key, tensor in open_tensors(path).items():
            stored.setdefault(key, {})[path] = tensor
    where = {}
    for name, shape in parameter_shapes(args):
        key = name if meta else hf_name(name)
        parts = stored.pop(key, {})
        if name == "output.weight" and args.tie_word_embeddings and not parts:
            continue
        if not parts or (meta and len(parts) < len(files)):
            lacking = [path.name for path in files if path not in parts]
            raise InputError(
                f"{files[0].parent}: {key} is missing in {', '.join(lacking)} (a model of"
                f" {args.n_layers} layers)"
            )
        if not meta and len(parts) > 1:
            first, second, *_ = parts
            raise InputError(f"{first}: {key} is in {second.name}, too")
        for path, tensor in parts.items():
            check_part(tensor, shape, len(parts), name, f"{path}: {key}")
        where[name] = [*parts]
    for key, parts in stored.items():
        # tables of RoPE, which we compute
        if not re.fullmatch(r"rope\.freqs|.*\.rotary_emb\.inv_freq", key):
            raise InputError(
                f"{[*parts][0]}: {key!r} is not a parameter of this model ({args.n_layers} layers)"
            )
    return where


def check_part(part: Tensor, shape: tuple[int, ...], parts: int, name: str, place: str) -> None:
    """InputError, which begins with `place`, unless a tensor of a file is one of so many equal
    parts of a parameter of this shape, and plain numbers of 16 bits or more.
    """
    problem = None
    if part.layout != torch.strided or part.is_nested:
        problem = "sparse or nested"
    elif part.is_meta:
        problem = "without its numbers (on the meta device)"
    elif part.is_complex():
        problem = "complex"
    elif not part.is_floating_point() or part.element_size() < 2:
        problem = f"quantised ({part.dtype})"
    elif part.numel() * part.element_size() > part.untyped_storage().nbytes():
        problem = "larger than what is stored of it (an expanded view)"
    if problem:
        raise InputError(f"{place} is {problem}, which cannot be honoured")
    expected = list(shape)
    dim = SHARD_DIM.get(name.split(".")[-2])
    if dim is not None:
        expected[dim] //= parts
    uneven = dim is not None and shape[dim] % parts
    if uneven or list(part.shape) != expected:
        raise InputError(
            f"{place} has the shape {tuple(part.shape)}; expected {tuple(expected)}, of {shape} in"
            f" {parts} file(s)"
        )


def check_shards(parts: list[Tensor], name: str, paths: list[Path]) -> None:
    """InputError unless the parts of one parameter can be of one model. What every shard has whole
    (norms) is about the same in all; what is cut is not the same in two, as where a file was copied
    under a second name.
    """
    module = name.split(".")[-2]
    for (part, path), (other, other_path) in itertools.combinations(
        zip(parts, paths, strict=True), 2
    ):
        if part.dtype != other.dtype:
            problem = "has another dtype than"
        elif module == "tok_embeddings" and part.equal(other):
            problem = "is the same as"
        elif module not in SHARD_DIM and not part.allclose(
            other, rtol=0.1, atol=0.01, equal_nan=True
        ):
            problem = "differs from that"
        else:
            continue
        raise InputError(
            f"{path}: {name} {problem} in {other_path.name}: not two shards of one model"
        )


def open_tensors(path: Path, keys: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a weight file by name, mapped into memory: a page is read when somebody looks
    at it.

    keys: only these are needed (None: all; at this first look, checksums are checked). The mapping
    ends with the last of the tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {
                    key: file.get_tensor(key) for key in file.keys() if keys is None or key in keys
                }
        if keys is None:
            check_zip(path)
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: holds other things than tensors, or code, which is never run"
        ) from None
    except Exception as problem:  # OSError, RuntimeError, SafetensorError, …
        reason = str(problem).split("\n")[0]
        raise InputError(f"{path}: not a weight file, or cut short ({reason})") from None
    if not isinstance(tensors, dict):
        raise InputError(f"{path}: expected tensors by name, found a {type(tensors).__name__}")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: {key!r:.200} is not the name of a tensor")
    return {key: tensor.detach() for key, tensor in tensors.items()}


def fill(
    weight: Tensor, parts: list[Tensor], name: str, paths: list[Path], hf_head_dim: int | None
) -> None:
    """Copies the parts of one parameter, which fit (`check_part`), into `weight`, whose device and
    dtype it keeps. InputError unless all numbers are finite.
    """
    module = name.split(".")[-2]
    dim = SHARD_DIM.get(module)
    slices = [weight] * len(parts) if dim is None else weight.chunk(len(parts), dim)
    for part, slice_ in zip(parts, slices, strict=True):
        slice_.copy_(
            to_interleaved(part, hf_head_dim) if hf_head_dim and module in ("wq", "wk") else part
        )
    if not torch.stack(weight.aminmax()).isfinite().all():
        raise InputError(
            f"{paths[0]}: {name} holds NaN or infinite numbers (read as {weight.dtype})"
        )


# ---- writing ----


def save_model(folder: str | Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Writes Meta's layout: tokenizer, params.json, and last of all the weights. Each file is
    replaced in one step.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if extra := set(folder.glob("consolidated.*.pth")) - {folder / "consolidated.00.pth"}:
        raise InputError(
            f"{min(extra)}: a shard of another checkpoint; save into another folder, or delete it"
        )
    always = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps")
    defaults = {field.name: field.default for field in fields(ModelArgs)}
    params = {
        name: x for name, x in asdict(model.args).items() if name in always or x != defaults[name]
    }
    tokenizer.save(folder)
    with atomic_write(folder / "params.json") as file:
        file.write(json.dumps(params, indent=1).encode())
    with atomic_write(folder / "consolidated.00.pth") as file:
        torch.save(
            {name: weight.detach().cpu() for name, weight in model.state_dict().items()}, file
        )


# The chat format (`data/chat.py`) as Hugging Face wants it; the same as on the hub's
# Llama-2-7b-chat-hf.
CHAT_TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}\
{% set system, messages = messages[0]['content'], messages[1:] %}\
{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('user and assistant must take turns') }}\
{% endif %}\
{% set content = message['content'] %}\
{% if loop.first and system is defined %}\
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}\
{% endif %}\
{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% else %}\
{{ ' ' + content.strip() + ' ' + eos_token }}\
{% endif %}\
{% endfor %}"""


def export_hf(
    folder: str | Path, model: Transformer, tokenizer: Tokenizer, max_file_bytes: int = 4 * 2**30
) -> None:
    """Writes a folder that transformers' AutoModelForCausalLM and AutoTokenizer load, with equal
    logits and ids.

    `folder` must be new or empty; it is there either whole or not at all. Weights keep their dtype
    and go into files of at most max_file_bytes each; about as much memory is needed beside the
    model.
    """
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty; export into a new folder")
    args, vocabulary = model.args, tokenizer.vocabulary
    shape = asdict(args) | {
        "n_kv_heads": args.kv_heads,
        "head_dim": args.head_size,
        "ffn_dim": args.hidden_size,
    }
    config = {name: value for name, value in FIXED.items() if value is not None}
    config |= {theirs: shape[ours] for ours, theirs in CONFIG.items()}
    config["torch_dtype"] = str(model.norm.weight.dtype).removeprefix("torch.")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    tokenizer_config = {
        # LlamaTokenizer would build its own from tokenizer.model
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": (
            vocabulary.names[vocabulary.unknown_id] if vocabulary.unknown_id >= 0 else None
        ),
        "clean_up_tokenization_spaces": False,
        "model_max_length": args.max_seq_len,
        "chat_template": CHAT_TEMPLATE,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        write_safetensors(new, model, max_file_bytes)
        write_json(new / "config.json", config | ids)
        write_json(
            new / "generation_config.json",
            ids | {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        )
        write_json(new / "tokenizer_config.json", tokenizer_config)
        with naming(new / "tokenizer.json"):
            (new / "tokenizer.json").write_text(write_tokenizer_json(vocabulary), "utf-8")
        # SentencePiece's, which llama.cpp reads
        if vocabulary.names and tokenizer.file_name == "tokenizer.model":
            tokenizer.save(new)
        os.replace(new, folder)


def write_json(path: Path, content: dict) -> None:
    """A JSON file, one field per line."""
    with naming(path):
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def write_safetensors(folder: Path, model: Transformer, max_file_bytes: int) -> None:
    """Writes the parameters under Hugging Face's names and in its order, into one file or several
    with an index.
    """
    from safetensors.torch import save_file

    files: list[list[str]] = [[]]
    size = total = 0
    for name, weight in model.named_parameters():
        if files[-1] and size + weight.nbytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size, total = size + weight.nbytes, total + weight.nbytes
    weight_map = {}
    for number, names in enumerate(files, 1):
        file_name = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        tensors = {}
        for name in names:
            weight = model.get_parameter(name).detach()
            if name.endswith(("wq.weight", "wk.weight")):
                weight = to_half_split(weight, model.args.head_size)
            tensors[hf_name(name)] = weight.cpu().contiguous()
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        (folder / file_name).chmod(0o644)  # save_file hides it from others
        weight_map |= dict.fromkeys(tensors, file_name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def main(argv: list[str] | None = None) -> None:
    """The export command."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime",
        description=(
            "Exports a model to Hugging Face's layout, for transformers, vLLM, llama.cpp, TRL, …"
        ),
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="the model: our, Meta's or Hugging Face's layout"
    )
    parser.add_argument(
        "out", metavar="OUT_DIR", type=Path, help="the folder to make; must be new or empty"
    )
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    parser.add_argument(
        "--dtype", choices=dtypes, help="precision of the exported weights (default: as in DIR)"
    )
    arguments = parser.parse_args(argv)
    model, tokenizer = load_model(arguments.folder, dtype=dtypes.get(arguments.dtype))
    export_hf(arguments.out, model, tokenizer)
    print(
        f"{arguments.out}: written; AutoModelForCausalLM.from_pretrained({str(arguments.out)!r})"
        " loads it"
    )
