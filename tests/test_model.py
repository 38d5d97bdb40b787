"""Tests of model.py: against Hugging Face, against slow versions written by hand, against itself
(cache, batch).
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import model as llama
from model import (
    PRESETS,
    Attention,
    FeedForward,
    Generation,
    KVCache,
    ModelArgs,
    RMSNorm,
    Step,
    Transformer,
    TransformerBlock,
    apply_rope,
    generate,
    precompute_rope,
    sample_top_p,
    token_logprobs,
)

SMALL = ModelArgs(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=24,
    multiple_of=16,
    rope_theta=100.0,
    max_seq_len=64,
)
EOS = 1


def random_model(seed=0, **changes):
    """A small model with every weight random, norms too (a norm weight of one hides that it is not
    used).
    """
    model = Transformer(replace(SMALL, **changes))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
    return model


def random_ids(*shape, seed=0, vocab=24):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


PROMPTS = [random_ids(n, seed=n).tolist() for n in (3, 9, 1, 6, 9, 14)]  # ragged
KEYS = [(7, 0, i, 0) for i in range(len(PROMPTS))]


# ---- settings ----


def test_model_args():
    assert ModelArgs().kv_heads == 32 and ModelArgs(n_kv_heads=8).kv_heads == 8
    assert ModelArgs().head_size == 128 and ModelArgs(head_dim=64).head_size == 64
    widths = {name: args.hidden_size for name, args in PRESETS.items()}
    assert widths["llama-2-7b"] == 11008 and widths["llama-2-13b"] == 13824
    assert widths["llama-2-34b"] == 22016 and widths["llama-2-70b"] == 28672
    assert widths["toy"] == 256
    assert ModelArgs(dim=192).hidden_size == 512  # a multiple already: not rounded further
    assert ModelArgs(ffn_dim=123).hidden_size == 123
    for bad in (
        dict(n_heads=6, n_kv_heads=4, dim=96),
        dict(dim=100, n_heads=8),
        dict(dim=12, n_heads=4),
    ):
        with pytest.raises(ValueError):
            ModelArgs(**bad)


@pytest.mark.parametrize(
    "name, parameters, cache_bytes",
    [  # paper.md §1.1, from the released params.json
        ("llama-2-7b", 6_738_415_616, 524_288),
        ("llama-2-13b", 13_015_864_320, 819_200),
        ("llama-2-34b", 33_743_970_304, 196_608),
        ("llama-2-70b", 68_976_648_192, 327_680),
    ],
)
def test_parameter_counts(name, parameters, cache_bytes):
    args = PRESETS[name]
    with torch.device("meta"):
        model = Transformer(args)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert args.max_seq_len == 4096 and args.norm_eps == 1e-5 and args.rope_theta == 10000.0
    # half precision, one token
    cache = KVCache(args, batch_size=1, max_len=1, device="meta", dtype=torch.float16)
    assert sum(2 * t.numel() for t in cache.keys + cache.values) == cache_bytes


def test_presets_of_ours():
    def count(name):
        with torch.device("meta"):
            return sum(p.numel() for p in Transformer(PRESETS[name]).parameters())

    assert count("tiny") < 130_000 and count("toy") == 599_712 and 24e6 < count("small") < 28e6


def test_state_dict_has_metas_names():
    keys = {key.replace("layers.0.", "") for key in random_model(n_layers=1).state_dict()}
    attention = {f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")}
    feed_forward = {f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")}
    norms = {"attention_norm.weight", "ffn_norm.weight", "norm.weight"}
    assert keys == attention | feed_forward | norms | {"tok_embeddings.weight", "output.weight"}


# ---- the pieces ----


def test_rms_norm():
    norm = RMSNorm(4, eps=2.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, -1.0]))
    # mean of squares (1 + 1 + 1 + 25) / 4 = 7, plus eps 2 (inside the root): divided by 3
    out = norm(torch.tensor([[1.0, -1.0, 1.0, 5.0]]))
    torch.testing.assert_close(out, torch.tensor([[1 / 3, -2 / 3, 1.0, -5 / 3]]))
    # float32 inside: the square of 300 is infinite in half precision
    x = torch.tensor([[300.0, -300.0, 300.0, 300.0]], dtype=torch.float16)
    torch.testing.assert_close(
        norm.half()(x), torch.tensor([[1.0, -2.0, 3.0, -1.0]], dtype=torch.float16)
    )
    # cast back first, then the weight: two roundings, as in Meta's code
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm.bfloat16()
    rounded = (x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 2.0).sqrt()).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.37, 2.11, 0.77, -1.21]))
    assert torch.equal(norm(x), rounded * norm.weight) and norm(x).dtype == torch.bfloat16


def test_precompute_rope():
    rope = precompute_rope(head_dim=6, max_seq_len=40, theta=50.0)
    assert rope.shape == (40, 3) and rope.dtype == torch.complex64
    for position in (0, 1, 39):
        for pair in range(3):
            angle = position * 50.0 ** (-2 * pair / 6)
            number = rope[position, pair].item()
            assert number.real == pytest.approx(math.cos(angle), abs=1e-5)
            assert number.imag == pytest.approx(math.sin(angle), abs=1e-5)
    assert precompute_rope(4, 8, device="meta").device.type == "meta"


def test_apply_rope():
    rope = precompute_rope(head_dim=6, max_seq_len=10, theta=50.0)
    # (batch, seq, heads, head_dim)
    x = torch.randn(2, 4, 3, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3], [9, 2, 5, 5]])
    out = apply_rope(x, rope[positions])
    for b in range(2):
        for s in range(4):
            for h in range(3):
                for pair in range(3):  # neighbours, as one complex number, turned counter-clockwise
                    z = complex(*x[b, s, h, 2 * pair :][:2].tolist())
                    z *= np.exp(1j * positions[b, s].item() * 50.0 ** (-2 * pair / 6))
                    assert out[b, s, h, 2 * pair :][:2].tolist() == pytest.approx(
                        [z.real, z.imag], abs=1e-5
                    )
    # one table for the whole batch
    torch.testing.assert_close(apply_rope(x[:1], rope[:4]), out[:1])
    # bfloat16 is rounded once, at the end
    rough = apply_rope(x.bfloat16(), rope[:4])
    assert torch.equal(rough, apply_rope(x.bfloat16().float(), rope[:4]).bfloat16())


def test_apply_rope_is_relative():
    rope = precompute_rope(head_dim=8, max_seq_len=50, theta=100.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))

    def product(m, n):  # of a query at position m and a key at position n
        return (apply_rope(q, rope[[m]]) * apply_rope(k, rope[[n]])).sum().item()

    assert product(7, 3) == pytest.approx(product(44, 40), abs=1e-5)
    assert abs(product(7, 3) - product(3, 7)) > 1e-3  # before and after differ


def test_kv_cache():
    cache = KVCache(SMALL, batch_size=3, max_len=5)
    assert len(cache.keys) == len(cache.values) == 2 and cache.keys[0].shape == (3, 2, 5, 8)
    k, v = torch.randn(2, 3, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    rows, positions = torch.arange(3)[:, None], torch.tensor([[0], [3], [1]])
    keys, values = cache.update(1, k, v, (rows, positions), 4)
    assert keys.shape == values.shape == (3, 2, 4, 8)  # the live slots, not all five
    for row, position in enumerate([0, 3, 1]):
        assert torch.equal(keys[row, :, position], k[row, 0])
        assert torch.equal(values[row, :, position], v[row, 0])
    # nothing else, no other layer
    assert keys.count_nonzero() == k.numel() and not cache.keys[0].any()
    cache.select(torch.tensor([2, 2, 0, 1]))
    assert cache.keys[0].shape == cache.values[1].shape == (4, 2, 5, 8)
    assert torch.equal(cache.keys[1][1, :, 1], k[2, 0])
    assert torch.equal(cache.values[1][3, :, 3], v[1, 0])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention(kv_heads):
    attention = Attention(0, replace(SMALL, n_kv_heads=kv_heads))
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    rope = precompute_rope(8, 5, 100.0)
    q = apply_rope(attention.wq(x).view(1, 5, 4, 8), rope)[0]
    k = apply_rope(attention.wk(x).view(1, 5, kv_heads, 8), rope)[0]
    v = attention.wv(x).view(5, kv_heads, 8)
    heads = torch.zeros(5, 4, 8)
    for i in range(5):
        for h in range(4):
            g = h * kv_heads // 4  # neighbouring query heads share a key head
            scores = torch.stack([q[i, h] @ k[j, g] / math.sqrt(8) for j in range(i + 1)])
            heads[i, h] = sum(p * v[j, g] for j, p in enumerate(scores.softmax(0)))
    step = Step(rope, mask=None, cache=None, slots=(), length=5)
    torch.testing.assert_close(
        attention(x, step)[0], attention.wo(heads.view(5, 32)), atol=1e-5, rtol=1e-4
    )
    assert all(
        module.bias is None for module in (attention.wq, attention.wk, attention.wv, attention.wo)
    )


def test_feed_forward():
    layer = FeedForward(SMALL)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    gate = x @ layer.w1.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * (x @ layer.w3.weight.T)) @ layer.w2.weight.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    assert layer.w1.weight.shape == (96, 32)  # int(2/3 · 128) = 85, up to a multiple of 16


def test_transformer_block():
    block = random_model().layers[1]
    assert isinstance(block, TransformerBlock)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    step = Step(precompute_rope(8, 5), mask=None, cache=None, slots=(), length=5)
    h = x + block.attention(block.attention_norm(x), step)
    torch.testing.assert_close(block(x, step), h + block.feed_forward(block.ffn_norm(h)))


# ---- the whole ----


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_kv_heads=None),
        dict(n_kv_heads=2),
        dict(n_kv_heads=1, tie_word_embeddings=True),
        dict(n_kv_heads=2, head_dim=16, ffn_dim=40),
    ],
    ids=["MHA", "GQA", "MQA tied", "own sizes"],
)
def test_logits_equal_hugging_face(changes):
    transformers = pytest.importorskip("transformers")
    model = random_model(norm_eps=1e-2, **changes)
    args = model.args
    config = transformers.LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_size,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_size,
        max_position_embeddings=args.max_seq_len,
        rms_norm_eps=args.norm_eps,
        rope_theta=args.rope_theta,  # up to transformers 4
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},  # from 5 on
        tie_word_embeddings=args.tie_word_embeddings,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()

    def permute(weight, heads):  # neighbouring pairs -> halves (paper.md §1.4)
        return (
            weight.view(heads, args.head_size // 2, 2, args.dim)
            .transpose(1, 2)
            .reshape(weight.shape)
        )

    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "model.embed_tokens",
        "layers": "model.layers",
        "output": "lm_head",
    }
    state = {}
    for key, weight in model.state_dict().items():
        if "wq" in key or "wk" in key:
            weight = permute(weight, args.n_heads if "wq" in key else args.kv_heads)
        key = "model.norm.weight" if key == "norm.weight" else key
        for ours, hf in names.items():
            key = key.replace(ours, hf)
        state[key] = weight
    theirs.load_state_dict(state)
    tokens = random_ids(3, 50)
    with torch.no_grad():
        ours, hf = model(tokens), theirs(tokens).logits
    assert hf.std() > 0.1
    torch.testing.assert_close(ours, hf, atol=1e-4, rtol=0)


def test_transformer():
    model = random_model()
    tokens = random_ids(2, 10)
    features, logits = model.features(tokens), model(tokens)
    assert (
        features.shape == (2, 10, 32)
        and logits.shape == (2, 10, 24)
        and logits.dtype == torch.float32
    )
    torch.testing.assert_close(logits, features @ model.output.weight.T)
    # nothing sees the future, everything sees the past
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 24
    difference = (model(changed) - logits).abs().amax(-1)[0]
    assert difference[:6].max() == 0 and difference[6:].min() > 0
    # positions without a cache: only differences count
    shifted = model(tokens, positions=torch.arange(10).expand(2, 10) + 20)
    torch.testing.assert_close(shifted, logits, atol=1e-4, rtol=0)
    stretched = model(tokens, positions=torch.arange(10).expand(2, 10) * 2)
    assert (stretched - logits).abs().max() > 1e-2


def test_sequence_too_long():
    model = random_model()
    assert model(random_ids(1, 64)).shape == (1, 64, 24)
    with pytest.raises(ValueError, match="65.*64"):
        model(random_ids(1, 65))
    with pytest.raises(ValueError, match="65.*64"):
        model(random_ids(1, 1), positions=torch.tensor([[64]]), cache=KVCache(SMALL, 1, 70))


def test_tied_and_untied_output():
    untied, tied = random_model(), random_model(tie_word_embeddings=True)
    assert tied.output.weight is tied.tok_embeddings.weight
    assert untied.output.weight is not untied.tok_embeddings.weight
    assert untied.output.weight.data_ptr() != untied.tok_embeddings.weight.data_ptr()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_cached_equals_uncached(kv_heads):
    """Ragged prefill, then single tokens, then three at once, each row at its own positions."""
    model = random_model(n_kv_heads=kv_heads)
    tokens, lengths = random_ids(4, 20), torch.tensor([3, 7, 1, 5])
    full = model(tokens)  # (4, 20, vocab)
    cache = KVCache(model.args, batch_size=4, max_len=20)
    # what stands behind a row's length is garbage to be overwritten
    logits = model(tokens[:, :7], cache=cache)
    torch.testing.assert_close(logits, full[:, :7], atol=1e-5, rtol=0)
    rows = torch.arange(4)[:, None]
    live = torch.arange(20) < lengths[:, None]  # (4, 20)
    cache.keys = [torch.where(live[:, None, :, None], k, 1e3) for k in cache.keys]
    for width in (1, 1, 3, 1):
        positions = lengths[:, None] + torch.arange(width)
        logits = model(tokens[rows, positions], positions, cache)
        torch.testing.assert_close(logits, full[rows, positions], atol=1e-5, rtol=0)
        lengths = lengths + width


@torch.no_grad()
def test_batch_equals_single():
    model = random_model()
    batch = torch.zeros(len(PROMPTS), 14, dtype=torch.long)
    for i, prompt in enumerate(PROMPTS):
        batch[i, : len(prompt)] = torch.tensor(prompt)
    together = model(batch)
    for i, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([prompt]))[0]
        torch.testing.assert_close(together[i, : len(prompt)], alone, atol=1e-5, rtol=0)


def test_bfloat16():
    model = random_model()
    tokens = random_ids(2, 60)
    exact = model(tokens)
    model.bfloat16()
    rough = model(tokens)
    assert rough.dtype == torch.float32 and model.features(tokens).dtype == torch.bfloat16
    assert model.rope.dtype == torch.complex64  # position 60 would be blurred in bfloat16
    assert (rough - exact).abs().mean() < 0.03 * exact.std()
    assert len(generate(model, PROMPTS, KEYS, 5, 1.0, eos_id=99)[0].ids) == 5
    model.float()
    with torch.autocast("cpu", torch.bfloat16):  # float32 weights, bfloat16 products
        assert model(tokens).dtype == torch.float32
        assert len(generate(model, PROMPTS, KEYS, 5, 1.0, eos_id=99)[0].ids) == 5


def test_meta_device():
    with torch.device("meta"):
        model = Transformer(SMALL)
        assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 24)
    source = random_model()
    model.load_state_dict(source.state_dict(), assign=True)  # the weights are all it needs
    tokens = random_ids(2, 5)
    assert torch.equal(model(tokens), source(tokens))


def test_init_weights():
    args = replace(SMALL, dim=256, vocab_size=512, n_layers=3)
    model = Transformer(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    model.init_weights(0)
    embedding, output = model.tok_embeddings.weight, model.output.weight
    assert (
        embedding.std().item() == pytest.approx(0.3, rel=0.02)
        and abs(embedding.mean().item()) < 0.01
    )
    assert torch.equal(output, embedding / (0.3 * 16))
    assert output.norm(dim=-1).mean().item() == pytest.approx(1.0, rel=0.02)
    for name, weight in model.layers.named_parameters():
        if "norm" in name:
            assert (weight == 1).all()
        else:
            std = weight.shape[1] ** -0.5 * (6**-0.5 if "wo" in name or "w2" in name else 1)
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
    # a head starts by writing what it read: its columns of wo are its rows of wv, scaled
    for layer in model.layers:
        for head in range(args.n_heads):
            mine, size = head // (args.n_heads // args.kv_heads), args.head_size
            wrote = layer.attention.wo.weight[:, head * size : (head + 1) * size]
            assert torch.equal(
                wrote, 6**-0.5 * layer.attention.wv.weight[mine * size : (mine + 1) * size].T
            )
    assert (model.norm.weight == 1).all()
    tied = Transformer(replace(args, tie_word_embeddings=True))
    tied.init_weights(0)
    assert torch.equal(tied.output.weight, embedding)
    same, other = Transformer(args), Transformer(args)
    same.init_weights(torch.Generator().manual_seed(0))
    other.init_weights(1)
    for (name, a), b, c in zip(
        model.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b) and ("norm" in name or not torch.equal(a, c)), name
    # its own parameter from then on: a step moves it away from the embedding
    logits = model(random_ids(1, 5))
    logits.square().mean().backward()
    assert model.output.weight.grad is not None and embedding.grad is not None
    assert not torch.allclose(model.output.weight.grad, embedding.grad)


def test_overfits_one_batch():
    model = Transformer(SMALL)
    model.init_weights(0)
    generate(model, PROMPTS, KEYS, 2, 1.0, eos_id=EOS)  # sampling first must not spoil training
    tokens = random_ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(80):
        loss = -token_logprobs(model(tokens[:, :-1]), tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2 and losses[-1] < 0.1
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


# ---- log-probabilities and sampling ----


def test_token_logprobs():
    # probabilities 1/4, 3/4; 1/2, 1/2
    logits = torch.tensor([[[0.0, math.log(3.0)], [5.0, 5.0]]], requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([[1, 0]]))
    assert logprobs.shape == (1, 2)
    torch.testing.assert_close(logprobs, torch.tensor([[math.log(0.75), math.log(0.5)]]))
    logprobs[0, 0].backward()  # gradient: one-hot minus probabilities, on its own row only
    torch.testing.assert_close(logits.grad, torch.tensor([[[-0.25, 0.25], [0.0, 0.0]]]))
    logits, targets = torch.randn(4, 7, 24), random_ids(4, 7)
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_logprobs(logits, targets), expected)
    torch.testing.assert_close(token_logprobs(logits[0], targets[0]), expected[0])
    rounded = logits.bfloat16()
    assert token_logprobs(rounded, targets).dtype == torch.float32
    torch.testing.assert_close(
        token_logprobs(rounded, targets), token_logprobs(rounded.float(), targets)
    )


def draws(probs, top_p, uniforms):
    return sample_top_p(
        torch.tensor([probs] * len(uniforms)), top_p, torch.tensor(uniforms)
    ).tolist()


def test_sample_top_p():
    probs = [0.125, 0.5, 0.125, 0.25]  # fractions that are exact in binary
    grid = [(i + 0.5) / 64 for i in range(64)]
    # all: in proportion, in the order of the ids
    assert draws(probs, 1.0, grid) == [0] * 8 + [1] * 32 + [2] * 8 + [3] * 16
    # cumulative: strictly above
    assert draws(probs, 1.0, [0.0, 0.125, 0.624, 0.625]) == [0, 1, 1, 2]
    # top_p .5: the mass before the second token is .5, not above .5: kept. Then .5 : .25 is
    # renormalised
    assert draws(probs, 0.5, grid[:48]) == [1] * 43 + [3] * 5
    assert set(draws(probs, 0.5, grid)) == {1, 3} and set(draws(probs, 0.49, grid)) == {1}
    assert set(draws(probs, 0.74, grid)) == {1, 3}
    # the mass before the third is .75; the fourth is as likely as the third
    assert set(draws(probs, 0.75, grid)) == {0, 1, 2, 3}
    assert set(draws(probs, 0.0, grid)) == {1}
    # what has no probability is never drawn, not even at the ends (a float64 just below one rounds
    # to one)
    assert draws([0.0, 0.5, 0.0, 0.5, 0.0], 1.0, [0.0, 0.5, 1 - 1e-12, 1.0]) == [1, 3, 3, 3]
    assert draws([0.0, 0.5, 0.0, 0.5, 0.0], 0.9, [0.0, 1 - 1e-12]) == [1, 3]
    # rows are independent
    rows = sample_top_p(torch.eye(4)[[2, 0, 3]], 0.9, torch.tensor([0.9, 0.1, 0.5]))
    assert rows.tolist() == [2, 0, 3]


def test_sample_top_p_does_not_sort_without_need(monkeypatch):
    monkeypatch.setattr(llama, "_sort_descending", lambda *_: pytest.fail("sorted"))
    assert draws([0.5, 0.5], 1.0, [0.7]) == [1]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampled_frequencies(top_p):
    """Pearson's chi-square over 4,000 first tokens at temperature 0.7."""
    model = random_model(vocab_size=8)
    n, prompt = 4000, [2, 5, 3]
    generations = generate(
        model, [prompt] * n, [(0, i) for i in range(n)], 1, 0.7, top_p, eos_id=EOS
    )
    counts = np.bincount([g.ids[0] for g in generations], minlength=8)
    probs = (model(torch.tensor([prompt]))[0, -1] / 0.7).softmax(-1).detach().double().numpy()
    if top_p < 1:
        order = np.argsort(-probs)
        probs[order[np.cumsum(probs[order]) - probs[order] > top_p]] = 0
        probs /= probs.sum()
        assert (counts[probs == 0] == 0).all() and 1 < (probs > 0).sum() < 8
    kept = probs > 0
    # 7 degrees of freedom: p = .0005
    assert ((counts - n * probs)[kept] ** 2 / (n * probs[kept])).sum() < 26


def slow_generate(model, prompt, key, max_new_tokens, temperature, top_p, eos_id):
    """The definition of `generate`: one row, no cache, no batch, plain loops."""
    ids, logprobs, uniforms = [], [], np.random.default_rng(key).random(max_new_tokens)
    for step in range(min(max_new_tokens, model.args.max_seq_len - len(prompt))):
        logits = model(torch.tensor([prompt + ids]))[0, -1].double()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probs = (logits / temperature).softmax(-1).tolist()
            order = list(range(len(probs)))
            if top_p < 1:
                order.sort(key=lambda token: -probs[token])
                order = [
                    t for i, t in enumerate(order) if sum(probs[u] for u in order[:i]) <= top_p
                ]
                order.sort()  # drawn in the order of the ids
            left = uniforms[step] * sum(probs[t] for t in order)
            for token in order:
                left -= probs[token]
                if left < 0:
                    break
        ids.append(token)
        logprobs.append(logits.log_softmax(-1)[token].item())
        if token == eos_id:
            return Generation(ids, logprobs, "eos")
    return Generation(ids, logprobs, "length")


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 1.0), (1.4, 0.8)])
@torch.no_grad()
def test_generate(temperature, top_p, kv_heads):
    """Ragged prompts, two of them equal, rows that end at different steps: each as if it were alone
    and uncached.
    """
    model = random_model(n_kv_heads=kv_heads)
    prompts, keys = [*PROMPTS, PROMPTS[1]], [*KEYS, (7, 0, 1, 1)]
    generations = generate(model, prompts, keys, 12, temperature, top_p, eos_id=EOS)
    assert len(generations) == 7
    for generation, prompt, key in zip(generations, prompts, keys, strict=True):
        expected = slow_generate(model, prompt, key, 12, temperature, top_p, EOS)
        assert generation.ids == expected.ids and generation.finish_reason == expected.finish_reason
        # the model's own: temperature 1
        assert generation.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert all(type(token) is int for token in generation.ids)
    if temperature == 1:
        # or the test shows little
        assert {g.finish_reason for g in generations} == {"eos", "length"}
        assert generations[1].ids != generations[6].ids  # same prompt, other key


def test_generate_stops_at_eos_and_stops_paying(monkeypatch):
    model = random_model()
    shapes, features = [], model.features
    monkeypatch.setattr(
        model, "features", lambda t, *a, **k: shapes.append(tuple(t.shape)) or features(t, *a, **k)
    )
    n = 40
    prompts = [PROMPTS[i % 2] for i in range(n)]
    generations = generate(model, prompts, [(i,) for i in range(n)], 50, 1.0, eos_id=EOS)
    for g in generations:
        assert (g.ids[-1] == EOS) == (g.finish_reason == "eos") and EOS not in g.ids[:-1]
        assert len(g.ids) == len(g.logprobs) <= 50
        assert g.finish_reason == "eos" or len(g.ids) == 50
    assert shapes[0] == (2, 9)  # two distinct prompts are read once each
    steps = shapes[1:]
    lengths = [len(g.ids) for g in generations]
    assert len(steps) == max(lengths) - 1 and all(seq == 1 for _, seq in steps)
    for step, (rows, _) in enumerate(steps, 1):  # at most a fifth of the batch has ended
        assert 0.8 * rows <= sum(length > step for length in lengths) <= rows


def test_generate_row_does_not_depend_on_its_neighbours():
    model = random_model()
    together = generate(model, PROMPTS, KEYS, 20, 1.0, eos_id=EOS)
    for prompt, key, generation in zip(PROMPTS, KEYS, together, strict=True):
        [alone] = generate(model, [prompt], [key], 20, 1.0, eos_id=EOS)
        assert alone.ids == generation.ids
        assert alone.logprobs == pytest.approx(generation.logprobs, abs=1e-5)
        [shorter] = generate(model, [prompt], [key], 4, 1.0, eos_id=EOS)
        assert shorter.ids == generation.ids[:4]  # the budget does not change the numbers drawn
    backwards = generate(model, PROMPTS[::-1], KEYS[::-1], 20, 1.0, eos_id=EOS)
    assert [g.ids for g in backwards[::-1]] == [g.ids for g in together]


def test_generate_reads_equal_prompts_once():
    """Equal prompts share a prefill; the samples are those of separate calls, and differ by key."""
    model = random_model()
    keys = [(1, sample) for sample in range(6)]
    shared = generate(model, [PROMPTS[1]] * 6, keys, 12, 1.0, eos_id=99)
    separate = [generate(model, [PROMPTS[1]], [key], 12, 1.0, eos_id=99)[0] for key in keys]
    assert [g.ids for g in shared] == [g.ids for g in separate]
    for a, b in zip(shared, separate, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert len({tuple(g.ids) for g in shared}) == 6


def test_generate_never_reads_padding(monkeypatch):
    model = random_model()
    expected = generate(model, PROMPTS, KEYS, 20, 1.0, eos_id=EOS)
    pad = torch.nn.utils.rnn.pad_sequence
    for padding in (EOS, 7, 23):
        monkeypatch.setattr(
            torch.nn.utils.rnn,
            "pad_sequence",
            lambda s, p=padding, **k: pad(s, padding_value=p, **k),
        )
        assert generate(model, PROMPTS, KEYS, 20, 1.0, eos_id=EOS) == expected  # to the last bit


def test_generate_on_token():
    model, seen = random_model(), {}
    generations = generate(
        model,
        PROMPTS,
        KEYS,
        30,
        1.0,
        eos_id=EOS,
        on_token=lambda row, token: seen.setdefault(row, []).append(token),
    )
    assert seen == {row: g.ids for row, g in enumerate(generations)}


def test_generate_at_the_end_of_the_context():
    model = random_model()  # max_seq_len 64
    long, short = random_ids(63).tolist(), random_ids(60).tolist()
    generations = generate(model, [long, short, PROMPTS[0]], KEYS[:3], 10, 1.0, eos_id=99)
    assert [len(g.ids) for g in generations] == [1, 4, 10]
    assert all(g.finish_reason == "length" for g in generations)
    for prompt, key, g in zip([long, short, PROMPTS[0]], KEYS, generations, strict=False):
        assert g.ids == generate(model, [prompt], [key], 10, 1.0, eos_id=99)[0].ids
    # rows whose context is full wait in the batch for others to end; what is sampled for them there
    # is not theirs
    prompts = [*(random_ids(63, seed=i).tolist() for i in range(10)), *[[3]] * 90]
    keys = [(i,) for i in range(100)]
    generations = generate(model, prompts, keys, 12, 3.0, eos_id=EOS)
    assert sum(g.finish_reason == "length" for g in generations[:10]) > 5
    for prompt, key, g in zip(prompts[:10], keys, generations, strict=False):
        [alone] = generate(model, [prompt], [key], 1, 3.0, eos_id=EOS)
        assert g.ids == alone.ids and g.finish_reason == alone.finish_reason
    with pytest.raises(ValueError, match="prompt 1 has 64 tokens"):
        generate(model, [short, random_ids(64).tolist()], KEYS[:2], 10, 1.0, eos_id=EOS)
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        generate(model, [[]], KEYS[:1], 10, 1.0, eos_id=EOS)
    with pytest.raises(ValueError):  # a key for each row
        generate(model, PROMPTS, KEYS[:2], 10, 1.0, eos_id=EOS)
    assert generate(model, [], [], 10, 1.0, eos_id=EOS) == []


@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_the_model_as_it_was(training):
    model = random_model().train(training)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    generate(model, PROMPTS, KEYS, 5, 1.0, 0.9, eos_id=EOS)
    assert model.training == training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    loss = model(random_ids(2, 5)).sum()
    loss.backward()
