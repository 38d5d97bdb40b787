"""Weights from and to every layout: the same model everywhere, and one clear line for whatever
cannot be loaded.
"""

import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.chat import encode_prompt
from data.errors import InputError
from data.tokenizer import Tokenizer
from model import ModelArgs, Transformer, generate
from runtime.checkpoint import check_zip, load_checkpoint, save_checkpoint
from runtime.weights import (
    export_hf,
    hf_name,
    load_model,
    main,
    parameter_shapes,
    save_model,
    to_half_split,
    to_interleaved,
)

ROOT = Path(__file__).parent.parent
TOY = Tokenizer(ROOT / "data" / "world" / "toy.tiktoken")
# may be larger than the tokenizer's, as in many checkpoints on the hub
VOCAB = -(-TOY.vocab_size // 8) * 8
MHA = ModelArgs(dim=64, n_layers=2, n_heads=8, vocab_size=VOCAB, multiple_of=32, max_seq_len=64)
SHAPES = {
    "mha": MHA,
    "gqa": replace(MHA, n_kv_heads=2),
    "gqa, a KV head per shard": replace(MHA, n_heads=16, n_kv_heads=8),
    "tied": replace(MHA, n_kv_heads=4, tie_word_embeddings=True),
    "odd": replace(MHA, head_dim=16, ffn_dim=88, rope_theta=1e6, norm_eps=1e-3),
}
TOKENS = torch.tensor([[7, 300, 41, 5, 99, 300, 2, 64]])


def random_model(args: ModelArgs = MHA, seed: int = 0) -> Transformer:
    """A model of random weights, norms included."""
    model = Transformer(args)
    model.init_weights(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


def write_meta(folder: Path, model: Transformer, shards: int) -> Path:
    """Meta's layout, cut for `shards` model-parallel processes as in the paper's code, written from
    the outside.
    """
    folder.mkdir()
    save_model(folder, model, TOY)
    cut = {
        "tok_embeddings": 1,
        "output": 0,
        "wq": 0,
        "wk": 0,
        "wv": 0,
        "wo": 1,
        "w1": 0,
        "w2": 1,
        "w3": 0,
    }
    for shard in range(shards):
        state = {"rope.freqs": torch.zeros(4)}
        for name, weight in model.state_dict().items():
            dim = cut.get(name.split(".")[-2])
            state[name] = weight if dim is None else weight.chunk(shards, dim)[shard].clone()
        torch.save(state, folder / f"consolidated.{shard:02d}.pth")
    return folder


def hf_state(model: Transformer) -> dict[str, torch.Tensor]:
    """Hugging Face's names and orders."""
    state = {}
    for name, weight in model.named_parameters():
        weight = weight.detach().clone()
        if name.endswith(("wq.weight", "wk.weight")):
            heads, (rows, dim) = weight.shape[0] // model.args.head_size, weight.shape
            weight = (
                weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)
            )
        state[hf_name(name)] = weight
    return state


def write_hf(folder: Path, model: Transformer, kind: str, files: int = 1) -> Path:
    """Hugging Face's layout, kind "safetensors" or "bin", in one file or several with an index."""
    from safetensors.torch import save_file

    export_hf(folder, model, TOY)
    (folder / "model.safetensors").unlink()
    state, weight_map = hf_state(model), {}
    # old conversions have it
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    for i in range(files):
        name = f"{stem}.{suffix}" if files == 1 else f"{stem}-{i + 1:05d}-of-{files:05d}.{suffix}"
        part = {key: state[key] for n, key in enumerate(state) if n % files == i}
        save_file(part, folder / name) if kind == "safetensors" else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if files > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_same_weights(one: Transformer, other: Transformer):
    state, other_state = one.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name in state:
        assert torch.equal(state[name], other_state[name]), name


def llama_for_causal_lm(folder: Path):
    """transformers' own reading of a folder."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# ---- every layout ----


@pytest.mark.parametrize("shape", SHAPES)
def test_load_model_from_every_layout(tmp_path, shape):
    model = random_model(SHAPES[shape])
    folders = [
        write_meta(tmp_path / f"meta{n}", model, n)
        for n in (1, 2, 8)
        if model.args.kv_heads % n == 0
    ]
    folders += [
        write_hf(tmp_path / f"{kind}{n}", model, kind, n)
        for kind in ("safetensors", "bin")
        for n in (1, 3)
    ]
    for folder in folders:
        loaded, tokenizer = load_model(folder)
        assert_same_weights(loaded, model)
        assert tokenizer.fingerprint == TOY.fingerprint
        assert (
            loaded.output.weight is loaded.tok_embeddings.weight
        ) == model.args.tie_word_embeddings
        assert torch.equal(loaded(TOKENS), model(TOKENS)), folder.name


@pytest.mark.parametrize("shape", SHAPES)
def test_load_model_equals_transformers(tmp_path, shape):
    # The other way round: a folder that transformers made from its own random weights.
    transformers = pytest.importorskip("transformers")
    args = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden_size,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_size,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        rope_theta=args.rope_theta,
        max_position_embeddings=args.max_seq_len,
        tie_word_embeddings=args.tie_word_embeddings,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(5)  # their initial weights are so small that a wrong RoPE would hardly show
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    TOY.save(tmp_path)
    ours, _ = load_model(tmp_path)
    assert ours.args.rope_theta == args.rope_theta
    assert ours.args.hidden_size == args.hidden_size
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


def test_stories_from_every_layout(assets, tmp_path):
    reference = llama_for_causal_lm(assets / "stories260K" / "hf")
    folders = [assets / "stories260K" / name for name in ("meta", "meta_mp2", "hf")]
    first, tokenizer = load_model(folders[0])
    for name, files in (("safetensors", 2), ("bin", 1), ("bin", 4)):
        folders.append(write_hf(tmp_path / f"{name}{files}", first, name, files))
        shutil.copy(folders[0] / "tokenizer.model", folders[-1] / "tokenizer.model")
    folders.append(write_meta(tmp_path / "meta4", first, 4))
    tokenizer.save(folders[-1])
    save_model(tmp_path / "saved", first, tokenizer)
    export_hf(tmp_path / "exported", first, tokenizer)
    prompt = tokenizer.encode("Once upon a time", bos=True)
    stories = set()
    for folder in [*folders, tmp_path / "saved", tmp_path / "exported"]:
        model, tokenizer = load_model(folder)
        assert_same_weights(model, first)
        logits = model(torch.tensor([prompt]))
        torch.testing.assert_close(
            logits, reference(torch.tensor([prompt])).logits, atol=1e-4, rtol=0
        )
        generation = generate(model, [prompt], [(0,)], 40, temperature=0, eos_id=tokenizer.eos_id)[
            0
        ]
        stories.add(tokenizer.decode(generation.ids))
    (story,) = stories
    assert "little girl" in story
    theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[
        0, len(prompt) :
    ]
    assert tokenizer.decode(theirs.tolist()) == story


def test_load_model_dtype(tmp_path):
    model = random_model().to(torch.bfloat16)
    save_model(tmp_path, model, TOY)
    assert_same_weights(load_model(tmp_path, dtype=None)[0], model)
    assert load_model(tmp_path, dtype=torch.float16)[0].norm.weight.dtype == torch.float16
    loaded, _ = load_model(tmp_path)
    assert loaded.norm.weight.dtype == torch.float32
    assert_same_weights(loaded, model.float())
    assert all(weight.requires_grad for weight in loaded.parameters())


def test_load_model_leaves_the_random_state_alone(tmp_path):
    save_model(tmp_path, random_model(), TOY)
    before = torch.random.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_params_of_meta(tmp_path):
    model = random_model()
    folder = write_meta(tmp_path / "llama-2-7b", model, 1)
    params = {
        "dim": 64,
        "multiple_of": 32,
        "n_heads": 8,
        "n_layers": 2,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(params))
    # Meta's download has it one folder up
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    if TOY.vocab_size != VOCAB:
        with pytest.raises(InputError, match="tok_embeddings.weight has the shape"):
            load_model(folder)
        params["vocab_size"] = VOCAB
        (folder / "params.json").write_text(json.dumps(params))
    loaded, _ = load_model(folder)
    assert loaded.args == replace(MHA, max_seq_len=ModelArgs.max_seq_len)


PEAK_PROGRAM = """
import sys, torch
from runtime.weights import load_model
torch.set_num_threads(1)
def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
def peak(folder):
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
    model, _ = load_model(folder, dtype=torch.bfloat16)
    return status("VmHWM") - before
torch.nn.Embedding(2, 2, device="meta")
peaks = [peak(folder) for folder in sys.argv[1:]]
print(*peaks[-2:])
"""


def test_peak_memory(tmp_path):
    # VmHWM is the peak of anonymous memory and mapped pages of files together. What counts is by
    # how much it rises, in a process that has done its imports (by loading a small model first) and
    # in which malloc hands back what is freed. The model: 24 layers of 6.4 MB each, and small
    # embeddings.
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux")
    args = ModelArgs(dim=512, n_layers=24, n_heads=8, vocab_size=VOCAB, max_seq_len=64)
    for name, model in ("small", random_model()), ("big", Transformer(args).to(torch.bfloat16)):
        save_model(tmp_path / f"{name}-meta", model, TOY)
        export_hf(tmp_path / f"{name}-hf", model, TOY)
    folders = [str(tmp_path / name) for name in ("small-meta", "small-hf", "big-meta", "big-hf")]
    command = [sys.executable, "-c", PEAK_PROGRAM, *folders]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = subprocess.check_output(command, cwd=ROOT, text=True, env=environment).split()
    size = sum(weight.nbytes for weight in model.parameters())
    for peak in map(int, peaks):
        assert size < peak < 1.1 * size, peak / size


# ---- writing ----


def test_save_model(tmp_path):
    model = random_model(SHAPES["odd"])
    save_model(tmp_path / "new" / "folder", model, TOY)
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    loaded, _ = load_model(tmp_path / "new" / "folder")
    assert loaded.args == model.args
    assert_same_weights(loaded, model)
    params = json.loads((tmp_path / "new" / "folder" / "params.json").read_text())
    assert {"dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps"} <= params.keys()


def test_save_model_replaces_files_in_one_step(tmp_path, monkeypatch):
    save_model(tmp_path, random_model(), TOY)

    def killed(state, file):
        file.write(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path, random_model(seed=2), TOY)
    assert_same_weights(load_model(tmp_path)[0], random_model())


def test_save_model_beside_other_shards(tmp_path):
    folder = write_meta(tmp_path / "meta", random_model(), 2)
    with pytest.raises(InputError, match="consolidated.01.pth: a shard of another checkpoint"):
        save_model(folder, random_model(), TOY)


def test_to_half_split_and_to_interleaved():
    weight = torch.arange(24.0).view(8, 3)
    assert torch.equal(to_interleaved(to_half_split(weight, 4), 4), weight)
    assert to_half_split(weight, 4)[:, 0].tolist() == [0, 6, 3, 9, 12, 18, 15, 21]


@pytest.mark.parametrize("shape", SHAPES)
def test_export_hf(tmp_path, shape):
    model = random_model(SHAPES[shape])
    export_hf(
        tmp_path / "exported", model, TOY, max_file_bytes=200_000 if shape == "gqa" else 2**30
    )
    files = list((tmp_path / "exported").glob("*.safetensors"))
    assert (len(files) > 1) == (shape == "gqa")
    theirs = llama_for_causal_lm(tmp_path / "exported")
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), atol=1e-4, rtol=0)
    again, tokenizer = load_model(tmp_path / "exported")
    assert_same_weights(again, model)
    assert tokenizer.fingerprint == TOY.fingerprint


DIALOGS = [
    [{"role": "user", "content": " Hello there!  "}],
    [{"role": "system", "content": "Be kind.\n"}, {"role": "user", "content": "What is 2+2?"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello. "},
        {"role": "user", "content": "And  now? é 日本"},
    ],
]


@pytest.mark.parametrize("name", ["toy", "llama2", "stories260K/hf"])
def test_export_hf_tokenizer(request, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    tokenizer = TOY if name == "toy" else Tokenizer(request.getfixturevalue("assets") / name)
    model = Transformer(ModelArgs(dim=8, n_layers=1, n_heads=1, vocab_size=tokenizer.vocab_size))
    export_hf(tmp_path / "exported", model, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in (
        "Hello world",
        "  two  spaces ",
        "1 + 1 = 2\n\tnew é日本😀",
        "",
        "▁x",
        "don't [INST]",
    ):
        ids = tokenizer.encode(text, bos=True)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), text
    for messages in DIALOGS:
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert theirs(text, add_special_tokens=False)["input_ids"] == encode_prompt(
            tokenizer, messages
        )


def test_export_hf_is_whole_or_not_there(tmp_path, monkeypatch):
    model = random_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export_hf(tmp_path / "full", model, TOY)
    monkeypatch.setattr("runtime.weights.write_tokenizer_json", lambda vocabulary: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_hf(tmp_path / "exported", model, TOY)
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_main(tmp_path, capsys):
    save_model(tmp_path / "model", random_model(), TOY)
    main([str(tmp_path / "model"), str(tmp_path / "exported"), "--dtype", "bfloat16"])
    assert "written" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "exported" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    )
    loaded, _ = load_model(tmp_path / "exported", dtype=None)
    assert_same_weights(loaded, random_model().to(torch.bfloat16))
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Hugging Face" in capsys.readouterr().out


# ---- what cannot be loaded ----


def fails_with_one_line(folder: Path, *parts: str):
    """load_model raises InputError, one line that holds all of `parts`."""
    with pytest.raises(InputError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "mistral"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("quantization_config", {"quant_method": "gptq"}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"rope_theta": 10000.0, "rope_type": "yarn"}),
        # the base of RoPE, which stands in `rope_theta`, once more
        ("rope_parameters", {"rope_theta": 500000.0, "rope_type": "default"}),
        ("rope_parameters", {"rope_theta": math.nan}),
        ("rope_scaling", {"rope_theta": 500000.0, "rope_type": "default"}),
        ("rope_theta", math.inf),
        ("rope_theta", 0.5),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", 5),
        ("max_position_embeddings", 10**12),
        ("num_hidden_layers", 10**400),
        ("hidden_size", [[]]),
        ("num_attention_heads", 7),
        ("num_key_value_heads", 3),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("num_hidden_layers", -2),
        ("rms_norm_eps", 0),
        ("intermediate_size", None),
        ("vocab_size", None),
        ("vocab_size", 100),
    ],
)
def test_refused_config(tmp_path, field, value):
    export_hf(tmp_path / "hf", random_model(), TOY)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    if value == 100:
        fails_with_one_line(tmp_path / "hf", "vocab_size is 100, but the tokenizer has")
    else:
        ours = {7: "n_heads", 3: "n_kv_heads"}  # rules that stand in ModelArgs
        named = ours[value] if value in (7, 3) else field
        fails_with_one_line(tmp_path / "hf", "config.json", named)


def test_refused_params(tmp_path):
    save_model(tmp_path, random_model(), TOY)
    path = tmp_path / "params.json"
    params = json.loads(path.read_text())
    for change, message in [
        ({"use_scaled_rope": True}, "use_scaled_rope"),
        ({"dim": 60}, "n_heads=8"),
        ({"n_layers": None}, "n_layers is missing"),
        ({"norm_eps": "small"}, "'small'"),
        ({"norm_eps": math.nan}, "norm_eps is nan; expected a number from 1e-20 to 0.1"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier is 1e+300"),
        ({"max_seq_len": 10**9}, "max_seq_len is 1000000000; expected a whole number from 1"),
        ({"n_layers": 10**400}, "n_layers is 1000"),
        ({"n\x1b[2J\n": 1}, r"'n\x1b[2J\n'"),
    ]:
        path.write_text(json.dumps(params | change))
        fails_with_one_line(tmp_path, "params.json", message)
    for text in ("{", "[]", '{"dim": ' + "9" * 5000 + "}", "[" * 100_000):
        path.write_text(text)
        fails_with_one_line(tmp_path, "params.json")


def test_deep_json(tmp_path):
    deep = '{"deep": ' + "[" * 100_000
    folder = write_hf(tmp_path / "hf", random_model(), "bin", files=2)
    for name in ("tokenizer.json", "pytorch_model.bin.index.json", "config.json"):
        whole = (folder / name).read_text()
        (folder / name).write_text(deep)
        fails_with_one_line(folder, name)
        (folder / name).write_text(whole)
    load_model(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_shapes(shape):
    args = SHAPES[shape]
    shapes = {
        name: tuple(weight.shape)
        for name, weight in Transformer(args).named_parameters(remove_duplicate=False)
    }
    assert [*parameter_shapes(args)] == [*shapes.items()]


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 10**6},
        {"n_layers": 1},
        {"dim": 2**21},
        {"vocab_size": 2**21},
        {"multiple_of": 2**21},
        {"n_heads": 2, "head_dim": 2**21},
    ],
)
def test_sizes_are_compared_before_anything_is_allocated(tmp_path, monkeypatch, change):
    save_model(tmp_path, random_model(), TOY)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    monkeypatch.setattr("runtime.weights.Transformer", lambda args: 1 / 0)
    fails_with_one_line(tmp_path, "consolidated.00.pth")


@pytest.mark.parametrize("how", ["missing", "null"])
def test_config_defaults_are_those_of_transformers(tmp_path, how):
    export_hf(tmp_path / "hf", random_model(), TOY)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    for name in (
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_theta",
        "tie_word_embeddings",
        "num_key_value_heads",
    ):
        config[name] = None
        if how == "missing":
            del config[name]
    path.write_text(json.dumps(config))
    args = load_model(tmp_path / "hf")[0].args
    assert (args.norm_eps, args.max_seq_len, args.rope_theta, args.kv_heads) == (
        1e-6,
        2048,
        10000.0,
        8,
    )


def test_no_model_there(tmp_path):
    fails_with_one_line(tmp_path / "nowhere", "nowhere: no model there")
    fails_with_one_line(tmp_path / ("n" * 5000), "no model there")
    fails_with_one_line(tmp_path, "no model there")
    # the parent, where Meta's download has the tokenizer, holds none either
    folder = tmp_path / "parent" / "model"
    save_model(folder, random_model(), TOY)
    (folder / "tokenizer.model").unlink()
    fails_with_one_line(folder, "no tokenizer there")


@pytest.fixture
def state() -> dict:
    """The weights of a small model by Meta's names."""
    return {name: weight.detach().clone() for name, weight in random_model().named_parameters()}


WQ = "layers.1.attention.wq.weight"
CHANGES = {
    "wrong shape": (lambda s: s.update({WQ: s[WQ][:-8]}), "(56, 64); expected (64, 64)"),
    "missing key": (lambda s: s.pop(WQ), "is missing"),
    "NaN": (lambda s: s[WQ].view(-1)[5].fill_(float("nan")), "holds NaN"),
    "infinite": (lambda s: s[WQ].view(-1)[5].fill_(float("-inf")), "infinite"),
    "quantised": (lambda s: s.update({WQ: s[WQ].to(torch.int8)}), "quantised"),
    "float8": (lambda s: s.update({WQ: s[WQ].to(torch.float8_e4m3fn)}), "quantised"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["meta", "bin", "safetensors"])
def test_broken_tensor(tmp_path, state, kind, change):
    alter, message = CHANGES[change]
    alter(state)
    if kind == "meta":
        save_model(tmp_path / "model", random_model(), TOY)
        torch.save(state, tmp_path / "model" / "consolidated.00.pth")
        fails_with_one_line(tmp_path / "model", "consolidated.00.pth", WQ, message)
        return
    from safetensors.torch import save_file

    folder = write_hf(tmp_path / "model", random_model(), kind)
    file = folder / ("pytorch_model.bin" if kind == "bin" else "model.safetensors")
    state = {hf_name(name): weight.contiguous() for name, weight in state.items()}
    torch.save(state, file) if kind == "bin" else save_file(state, file)
    in_file = change not in ("NaN", "infinite")  # what is no number is found later, in the model
    fails_with_one_line(folder, hf_name(WQ) if in_file else WQ, message)


NO_WEIGHTS = {
    "sparse": (lambda weight: weight.to_sparse(), "sparse"),
    "nested": (lambda weight: torch.nested.nested_tensor([weight, weight]), "nested"),
    "meta": (lambda weight: weight.to("meta"), "without its numbers"),
    "complex": (lambda weight: weight.to(torch.complex64), "complex"),
    "expanded": (lambda weight: weight[:1].clone().expand(64, 64), "expanded view"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensor_that_is_no_weight(tmp_path, state):
    save_model(tmp_path, random_model(), TOY)
    for alter, message in NO_WEIGHTS.values():
        torch.save(state | {WQ: alter(state[WQ])}, tmp_path / "consolidated.00.pth")
        fails_with_one_line(tmp_path, "consolidated.00.pth", WQ, message)


def test_weights_that_require_grad_or_stand_in_another_order(tmp_path, state):
    save_model(tmp_path, random_model(), TOY)
    state[WQ] = state[WQ].T.contiguous().T
    for stored in (state, {name: torch.nn.Parameter(w) for name, w in state.items()}):
        torch.save(stored, tmp_path / "consolidated.00.pth")
        assert_same_weights(load_model(tmp_path)[0], random_model())


@pytest.mark.parametrize("name", ["consolidated.00.pth", "pytorch_model.bin"])
def test_flipped_bits(tmp_path, name):
    model = random_model(replace(MHA, dim=16))
    folder = tmp_path / "model"
    write_meta(folder, model, 1) if name.startswith("cons") else write_hf(folder, model, "bin")
    path = folder / name
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(30):
        broken = bytearray(whole)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            assert_same_weights(load_model(folder)[0], model)  # a bit of padding
        except InputError as problem:
            assert name in str(problem)
            refused += 1
    assert refused > 20


def rewrite_zip(path: Path, deflated: bool, twice: bool):
    """The same records once more, compressed, or with the last one there twice."""
    with zipfile.ZipFile(path) as file:
        records = {record.filename: file.read(record) for record in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else 0) as file:
        for name, content in records.items():
            file.writestr(name, content)
        if twice:
            file.writestr(name, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_check_zip(tmp_path):
    path = tmp_path / "consolidated.00.pth"
    for change in ((True, False), (False, True)):
        save_model(tmp_path, random_model(), TOY)
        check_zip(path)
        rewrite_zip(path, *change)
        with pytest.raises(zipfile.BadZipFile):
            check_zip(path)
        fails_with_one_line(tmp_path, "consolidated.00.pth")
    # torch can be told to write no checksums
    with torch.utils.serialization.config.patch({"save.compute_crc32": False}):
        save_model(tmp_path, random_model(), TOY)
    check_zip(path)


def test_checkpoint_that_is_none_of_ours(tmp_path):
    path = tmp_path / "checkpoint.pth"
    weight = torch.ones(3)
    deep = []
    for _ in range(5000):
        deep = [deep]
    for state, message in [
        ([weight], "state is a list, not a dict"),
        ({"w": {"head": weight.to_sparse()}}, r"state['w']['head'] is a tensor that is sparse"),
        ({"w": weight.to("meta")}, "meta"),
        ({"w": weight.requires_grad_()}, "requires grad"),
        ({"w": [1, {2}]}, r"state['w'][1] is a set"),
        ({"w": deep}, "nested too deeply"),
    ]:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(100_000)
        torch.save(state, path)
        sys.setrecursionlimit(limit)
        with pytest.raises(InputError, match=re.escape(message)):
            load_checkpoint(path)
    with pytest.raises(TypeError, match="requires grad"):
        save_checkpoint(path, {"w": weight})
    save_checkpoint(path, {"w": torch.full((100,), math.pi)})
    broken = bytearray(path.read_bytes())
    broken[broken.index(struct.pack("<f", math.pi))] ^= 1
    path.write_bytes(broken)
    with pytest.raises(InputError, match="checkpoint.pth is not a readable checkpoint"):
        load_checkpoint(path)


def test_tied_matrix_that_is_another(tmp_path):
    model = random_model(SHAPES["tied"])
    for folder in (write_meta(tmp_path / "m", model, 2), write_hf(tmp_path / "h", model, "bin")):
        path = sorted([*folder.glob("*.pth"), *folder.glob("*.bin")])[-1]
        name = "output.weight" if path.suffix == ".pth" else "lm_head.weight"
        state = torch.load(path)
        torch.save(state | {name: state.get(name, torch.zeros(VOCAB, 64)) + 1}, path)
        fails_with_one_line(folder, "tie_word_embeddings is True")


def test_unknown_key(tmp_path, state):
    save_model(tmp_path, random_model(), TOY)
    torch.save(
        state | {"layers.1.attention.wq.bias": torch.zeros(64)}, tmp_path / "consolidated.00.pth"
    )
    fails_with_one_line(
        tmp_path, "consolidated.00.pth", "'layers.1.attention.wq.bias' is not a parameter"
    )
    torch.save(state | {"lm_head.weight": state["output.weight"]}, tmp_path / "consolidated.00.pth")
    fails_with_one_line(tmp_path, "'lm_head.weight' is not a parameter")
    torch.save(state | {"step": 5}, tmp_path / "consolidated.00.pth")
    fails_with_one_line(tmp_path, "consolidated.00.pth", "'step' is not the name of a tensor")
    torch.save([1, 2], tmp_path / "consolidated.00.pth")
    fails_with_one_line(tmp_path, "consolidated.00.pth", "found a list")


def test_missing_shard(tmp_path):
    folder = write_meta(tmp_path / "meta", random_model(), 8)
    (folder / "consolidated.03.pth").unlink()
    fails_with_one_line(folder, "consolidated.03.pth: this shard is missing")
    # now the last one is: seven of eight
    (folder / "consolidated.07.pth").rename(folder / "consolidated.03.pth")
    fails_with_one_line(
        folder, "consolidated.00.pth", "tok_embeddings.weight has the shape", "in 7 file(s)"
    )
    for path in folder.glob("consolidated.*"):
        path.unlink()
    fails_with_one_line(folder, "consolidated.00.pth: this shard is missing")


def test_files_that_are_no_shards(tmp_path):
    folder = write_meta(tmp_path / "meta", random_model(), 2)
    for name in ("consolidated.1.pth", "consolidated.001.pth", "consolidated.00.copy.pth"):
        shutil.copy(folder / "consolidated.01.pth", folder / name)
        fails_with_one_line(folder, name, "not called as a shard is")
        (folder / name).unlink()
    shard = folder / "consolidated.01.pth"
    shard.unlink()
    pipe = getattr(os, "mkfifo", Path.mkdir)  # nobody writes to it: whoever opens it waits
    for make in (Path.mkdir, pipe):
        make(shard)
        fails_with_one_line(folder, "consolidated.01.pth", "not a file")
        shard.rmdir() if shard.is_dir() else shard.unlink()


def test_shards_that_differ(tmp_path):
    folder = write_meta(tmp_path / "meta", random_model(), 2)
    path = folder / "consolidated.01.pth"
    state = torch.load(path)
    torch.save({name: weight for name, weight in state.items() if name != WQ}, path)
    fails_with_one_line(folder, f"{WQ} is missing in consolidated.01.pth")
    torch.save({name: weight.half() for name, weight in state.items()}, path)
    fails_with_one_line(folder, "has another dtype than in consolidated.01.pth")
    norm = "layers.1.ffn_norm.weight"
    torch.save(state | {norm: state[norm] * 1.001}, path)
    load_model(folder)  # rounding differs among the processes that wrote them
    torch.save(state | {norm: state[norm] + 0.5}, path)
    fails_with_one_line(folder, norm, "differs from that in consolidated.01.pth")
    shutil.copy(folder / "consolidated.00.pth", path)
    fails_with_one_line(folder, "tok_embeddings.weight is the same as in consolidated.01.pth")


@pytest.mark.parametrize("kind", ["meta", "bin", "safetensors"])
def test_truncated_file(tmp_path, kind):
    model = random_model()
    folder = (
        write_meta(tmp_path / "m", model, 1)
        if kind == "meta"
        else write_hf(tmp_path / "m", model, kind)
    )
    (path,) = [*folder.glob("*.pth"), *folder.glob("*.bin"), *folder.glob("model.safetensors")]
    content = path.read_bytes()
    for length in (0, 5, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        fails_with_one_line(folder, path.name)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=re.escape(str(folder))):
        load_model(folder)


def test_tensor_that_is_there_twice(tmp_path):
    folder = write_hf(tmp_path / "hf", random_model(), "bin", files=2)
    path = folder / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(path) | {"model.embed_tokens.weight": torch.zeros(VOCAB, 64)}, path)
    fails_with_one_line(folder, "pytorch_model-00001", "model.embed_tokens.weight", path.name)


def test_index_that_points_nowhere(tmp_path):
    folder = write_hf(tmp_path / "hf", random_model(), "safetensors", files=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = "model-00002-of-00003.safetensors"
    (folder / name).rename(folder / "away")
    fails_with_one_line(folder, "model.safetensors.index.json", name, "not there")
    (folder / "away").rename(folder / name)
    for value in ("../hf/" + name, 5, None):
        index["weight_map"]["lm_head.weight"] = value
        path.write_text(json.dumps(index))
        fails_with_one_line(folder, "lm_head.weight")
    for content in ("{}", '{"weight_map": []}', "nonsense"):
        path.write_text(content)
        fails_with_one_line(folder, "model.safetensors.index.json")
    path.unlink()
    fails_with_one_line(folder, "no weights there")


class Code:
    """Runs a command when somebody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_pickle(tmp_path, state, name, plain_pickle):
    folder, model = tmp_path / "model", random_model()
    write_meta(folder, model, 1) if name.startswith("cons") else write_hf(folder, model, "bin")
    state |= {WQ: Code(tmp_path / "executed")}
    if plain_pickle:
        (folder / name).write_bytes(pickle.dumps(state))
    else:
        torch.save(state, folder / name)
    fails_with_one_line(folder, name)
    assert not (tmp_path / "executed").exists()
