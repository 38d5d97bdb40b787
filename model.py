"""The Llama 2 transformer (paper §2.2): token ids in, token ids out.

The paper: pre-norm blocks with RMSNorm, SwiGLU feed-forward, rotary positions (RoPE), no biases
anywhere, an output matrix of its own, and grouped-query attention (GQA) in the 34B and 70B models.
The names are those of Meta's `model.py`, so the weights of a released checkpoint drop in as they
are.

Ours:
- The KV cache is an object of its own.
- A batch is padded on the right. That leaves one rule about positions: a cache slot's index is its
  position, and a query at position p sees slots 0..p. Padding stands behind every real token, so
  nobody ever reads it.

Deleted: model parallelism (fairscale), the cache inside each attention layer, left padding.

Below the network stand log-probabilities and sampling. To talk to a model:
`python -m play chat out/sft`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- settings ----


@dataclass
class ModelArgs:
    """The shape of a model: the fields of Meta's params.json, below them ours. None: a rule
    decides.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    # None: as many as query heads (MHA); fewer: GQA, one for each group of them
    n_kv_heads: int | None = None
    vocab_size: int = 32000
    # the hidden size of the feed-forward layer is rounded up to a multiple of this
    multiple_of: int = 256
    # 1.3 in the 70B model, to pay back what GQA saves (paper, Table 18)
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 4096  # paper §2.2: doubled from Llama 1's 2048
    head_dim: int | None = None  # None: dim / n_heads
    ffn_dim: int | None = None  # None: Meta's rule; set for checkpoints that do not follow it
    # True: the output matrix is the embedding matrix (never so in Llama 2)
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.kv_heads}"
            )
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim={self.dim} is not a multiple of n_heads={self.n_heads}")
        if self.head_size % 2:
            raise ValueError(
                f"the head size is {self.head_size}, but RoPE turns pairs: it must be even"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def hidden_size(self) -> int:
        """Width of the feed-forward layer. Meta's rule: 2/3 of 4·dim, times the multiplier, up to a
        multiple.

        >>> PRESETS["llama-2-7b"].hidden_size, PRESETS["llama-2-70b"].hidden_size
        (11008, 28672)
        """
        if self.ffn_dim is not None:
            return self.ffn_dim
        # SwiGLU has three matrices instead of two: 2/3 keeps their total size
        hidden = int(2 * (4 * self.dim) / 3)
        hidden = int((self.ffn_dim_multiplier or 1.0) * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of  # rounded up


TOY = ModelArgs(dim=96, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=1536, max_seq_len=2048)

# The first four are ours (their vocabulary is set from the tokenizer); the others are the paper's.
PRESETS = {
    # learns nothing: to see whether a command runs
    "tiny": replace(TOY, dim=32, n_layers=2, multiple_of=32),
    "class": TOY,  # as toy, on fewer examples: the main chain in about a minute
    "toy": TOY,  # 0.6M parameters
    "small": replace(TOY, dim=512, n_layers=8, n_heads=8, n_kv_heads=4),  # 26M
    "llama-2-7b": ModelArgs(dim=4096, n_layers=32, n_heads=32),
    "llama-2-13b": ModelArgs(dim=5120, n_layers=40, n_heads=40),
    # never released; as Code Llama 34B
    "llama-2-34b": ModelArgs(dim=8192, n_layers=48, n_heads=64, n_kv_heads=8),
    "llama-2-70b": ModelArgs(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3
    ),
}


# ---- the network ----


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean over the last dimension (Zhang & Sennrich 2019;
    paper §2.2).

    Computed in float32, cast back, then multiplied by the weight, in this order as in Meta's code.

    >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, 4.0]))  # mean of squares 12.5
    tensor([0.8485, 1.1314], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim), same dtype."""
        x32 = x.float()  # (..., dim)
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)  # (..., dim)
        return x32.type_as(x) * self.weight  # (..., dim)


def precompute_rope(
    head_dim: int, max_seq_len: int, theta: float = 10000.0, device=None
) -> Tensor:
    """The table of RoPE (Su et al. 2021): (max_seq_len, head_dim/2), complex64.

    Entry (p, j) is e^(i · angle) with the angle p · theta^(-2j/head_dim), in radians: by so much
    pair j of a head is turned at position p.

    >>> precompute_rope(head_dim=2, max_seq_len=2)[1]  # position 1: one radian
    tensor([0.5403+0.8415j])
    """
    # (head_dim/2)
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    # (max_seq_len, head_dim/2)
    angles = torch.outer(torch.arange(max_seq_len, device=device).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Turns each pair (x0, x1) of neighbours by its angle a, computed in float32:
    (x0 cos a - x1 sin a, x1 cos a + x0 sin a).

    That is the complex number x0 + i x1 times e^(ia): one operation, as in Meta's code. (On Apple's
    GPUs complex numbers need macOS 14.)

    x (batch, seq, heads, head_dim); rope (seq, head_dim/2) or (batch, seq, head_dim/2): rows of
    `precompute_rope` at the positions of x -> same shape and dtype as x. Meta pairs neighbouring
    numbers; Hugging Face pairs number j with number j + head_dim/2, and permutes wq and wk to make
    up for it.

    >>> rope = precompute_rope(head_dim=2, max_seq_len=2)
    >>> apply_rope(torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), rope[1:]).flatten()
    tensor([0.5403, 0.8415])
    """
    # (batch, seq, heads, head_dim/2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * rope.unsqueeze(-2)  # the same for all heads
    return torch.view_as_real(turned).flatten(-2).type_as(x)  # (batch, seq, heads, head_dim)


class KVCache:
    """Keys and values of every layer for the positions seen so far, each (batch, kv_heads, max_len,
    head_dim): all that one head reads lies together.

    Slot s of a row holds the token at position s. Slots behind a row's last token may hold padding
    or nothing; they are overwritten before any query is allowed to see them.
    """

    def __init__(self, args: ModelArgs, batch_size: int, max_len: int, device=None, dtype=None):
        self.max_len = max_len
        shape = (batch_size, args.kv_heads, max_len, args.head_size)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(args.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(args.n_layers)]

    def update(
        self, layer: int, k: Tensor, v: Tensor, slots: tuple, length: int
    ) -> tuple[Tensor, Tensor]:
        """Writes k and v (batch, seq, kv_heads, head_dim) at `slots` (an index of batch and
        position) of one layer.

        Returns that layer's first `length` slots: keys and values, each (batch, kv_heads, length,
        head_dim).
        """
        keys, values = self.keys[layer], self.values[layer]
        keys.transpose(1, 2)[slots] = k
        values.transpose(1, 2)[slots] = v
        return keys[:, :, :length], values[:, :, :length]

    def select(self, rows: Tensor) -> None:
        """Makes the batch consist of `rows` (n,) of the present one: drops the others, repeats
        those named twice.
        """
        for layer in range(len(self.keys)):  # only one layer stands in memory twice
            self.keys[layer] = self.keys[layer][rows]
            self.values[layer] = self.values[layer][rows]


@dataclass
class Step:
    """What all layers share during one forward pass: where its tokens stand and what they may see.
    """

    rope: Tensor  # (seq, head_dim/2) or (batch, seq, head_dim/2)
    mask: Tensor | None  # (batch, 1, group*seq, length), True: may be seen; None: plain causal
    cache: KVCache | None
    slots: tuple  # where in the cache this pass writes
    length: int  # how many slots it may read


class Attention(nn.Module):
    """Causal self-attention; each group of n_heads / kv_heads query heads shares a key and value
    head (§2.2, GQA).
    """

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.layer_id, self.head_dim = layer_id, args.head_size
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_size, bias=False)
        self.wk = nn.Linear(args.dim, args.kv_heads * args.head_size, bias=False)
        self.wv = nn.Linear(args.dim, args.kv_heads * args.head_size, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_size, args.dim, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x (batch, seq, dim) -> (batch, seq, dim)."""
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (batch, seq, n_heads, head_dim)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (batch, seq, kv_heads, head_dim)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (batch, seq, kv_heads, head_dim)
        q, k = apply_rope(q, step.rope), apply_rope(k, step.rope)
        if step.cache is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (batch, kv_heads, seq, head_dim)
        else:
            # (batch, kv_heads, length, head_dim)
            k, v = step.cache.update(self.layer_id, k, v, step.slots, step.length)
        q = q.transpose(1, 2)  # (batch, n_heads, seq, head_dim)
        if step.mask is None:
            # (batch, n_heads, seq, head_dim)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            # the query heads of a group queue up as further queries of their key head: nothing of
            # k and v is repeated
            queries = q.reshape(*k.shape[:2], -1, self.head_dim)
            y = F.scaled_dot_product_attention(queries, k, v, attn_mask=step.mask)
            y = y.reshape(q.shape)  # (batch, n_heads, seq, head_dim)
        return self.wo(y.transpose(1, 2).flatten(2))  # (batch, seq, dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020; §2.2): w2(silu(w1 x) · w3 x)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_size, bias=False)
        self.w2 = nn.Linear(args.hidden_size, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seq, dim) -> (batch, seq, dim)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): "pre-norm", the residual path itself
    is never normed.
    """

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.attention = Attention(layer_id, args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x (batch, seq, dim) -> (batch, seq, dim)."""
        x = x + self.attention(self.attention_norm(x), step)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Token ids in, logits of each next token out. One forward serves training, batched prefill and
    cached decoding.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, args) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.rope: Tensor | None = None  # see rope_table

    def rope_table(self, device: torch.device) -> Tensor:
        """`precompute_rope` of this model's sizes, made at first use on a device.

        It is neither a parameter nor a buffer: so it stays exact in a bfloat16 model, and a model
        that was built on the `meta` device needs nothing but its weights.
        """
        if self.rope is None or self.rope.device != device:
            # a table first made while sampling must serve training, too
            with torch.inference_mode(False):
                self.rope = precompute_rope(
                    self.args.head_size, self.args.max_seq_len, self.args.rope_theta, device
                )
        return self.rope

    def features(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        length: int | None = None,
    ) -> Tensor:
        """tokens (batch, seq) -> what the output matrix (or a reward head) reads: (batch, seq,
        dim), normed.

        No positions: tokens stand at 0, 1, 2, …; each sees itself and all before it (training; with
        a cache, prefill). With positions (batch, seq) and a cache: each token is written at its own
        slot and sees the slots up to it (decoding, where rows have different lengths). Without a
        cache, positions only set the rotation.

        length: of positions, how many slots of the cache may be read, more than any position. None:
        it is looked up, which on a GPU waits for all that is under way.

        Raises ValueError if a sequence is longer than max_seq_len.
        """
        if positions is None:
            length = tokens.shape[1]
        elif length is None:
            length = int(positions.max()) + 1
        if length > self.args.max_seq_len:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_seq_len, {self.args.max_seq_len}"
            )
        rope = self.rope_table(tokens.device)
        if positions is None:
            step = Step(rope[:length], None, cache, np.s_[:, :length], length)
        else:
            rows = torch.arange(len(tokens), device=tokens.device)[:, None]  # (batch, 1)
            mask = None
            if cache is not None:
                # (batch, seq, length)
                mask = torch.arange(length, device=tokens.device) <= positions[:, :, None]
                # (…, 1, group*seq, length)
                mask = mask.repeat(1, self.args.n_heads // self.args.kv_heads, 1)[:, None]
            step = Step(rope[positions], mask, cache, (rows, positions), length)
        x = self.tok_embeddings(tokens)  # (batch, seq, dim)
        for layer in self.layers:
            x = layer(x, step)  # (batch, seq, dim)
        return self.norm(x)  # (batch, seq, dim)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """tokens (batch, seq) -> logits (batch, seq, vocab_size), float32; arguments as in
        `features`.
        """
        return self.output(self.features(tokens, positions, cache)).float()

    def decode(self, ids: Tensor, positions: Tensor, cache: KVCache, length: int) -> Tensor:
        """One token further: ids (batch) at positions (batch), all below `length` -> logits of
        what comes next, (batch, vocab_size), float32.
        """
        features = self.features(ids[:, None], positions[:, None], cache, length)
        return self.output(features[:, 0]).float()

    @torch.no_grad()
    def init_weights(self, seed: int | torch.Generator) -> None:
        """Random weights for training from scratch, equal for equal seeds on every device. Our
        choice, not the paper's.

        Two starts make it cheap to learn to copy, so that a small model soon repeats words that it
        never had to say in training. Each output row starts as its token's embedding (scaled to
        unit length). And each attention head starts by writing about what it read: its part of wo
        is the transpose of its wv (after Trockman & Kolter 2023, "Mimetic initialization"). Both
        are from then on parameters of their own. The other linear layers keep the size of their
        input, N(0, 1/sqrt(fan_in)); wo and w2, which write into the residual path, are scaled down
        by 1/sqrt(2 n_layers), since 2 n_layers of them add up there.
        """
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed

        def normal(weight: Tensor, std: float) -> None:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)

        embedding_std, residual = 0.3, (2 * self.args.n_layers) ** -0.5
        normal(self.tok_embeddings.weight, embedding_std)
        for name, module in self.layers.named_modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Linear):
                normal(
                    module.weight,
                    module.in_features**-0.5 * (residual if name.endswith("w2") else 1),
                )
        group = self.args.n_heads // self.args.kv_heads
        for layer in self.layers:
            # (kv_heads, head_dim, dim)
            read = layer.attention.wv.weight.unflatten(0, (self.args.kv_heads, -1))
            layer.attention.wo.weight.copy_(
                residual * read.repeat_interleave(group, 0).flatten(0, 1).T
            )
        self.norm.weight.fill_(1.0)
        if not self.args.tie_word_embeddings:
            self.output.weight.copy_(
                self.tok_embeddings.weight / (embedding_std * self.args.dim**0.5)
            )


# ---- log-probabilities and sampling ----


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target): logits (..., vocab), targets (...) long in [0, vocab) -> (...), float32.

    >>> token_logprobs(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))  # log(1/2)
    tensor([-0.6931])
    """
    # (tokens)
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return -losses.view(targets.shape)  # (...)


def sample_top_p(probs: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Draws one id per row: probs (batch, vocab), uniform (batch) in [0, 1) -> ids (batch).

    Nucleus sampling by Meta's rule: of the tokens sorted by probability, one is kept if the mass
    *before* it is at most top_p; so is one that is as likely as the last kept. The draw is the
    inverse of the cumulative distribution, tokens in the order of their ids, at one uniform number
    per row, so that equal numbers give equal samples.

    >>> probs = torch.tensor([[0.2, 0.5, 0.3]])
    >>> # all are kept
    >>> [sample_top_p(probs, 1.0, torch.tensor([u])).item() for u in (0.1, 0.6, 0.9)]
    [0, 1, 2]
    >>> # .5 and .3 are kept
    >>> [sample_top_p(probs, 0.6, torch.tensor([u])).item() for u in (0.1, 0.6, 0.9)]
    [1, 1, 2]
    """
    if top_p < 1:
        largest = _sort_descending(probs)  # (batch, vocab)
        before = largest.cumsum(-1) - largest  # (batch, vocab) mass before each
        n_kept = (before <= top_p).sum(-1, keepdim=True).clamp(min=1)  # (batch, 1)
        smallest = largest.gather(-1, n_kept - 1)  # (batch, 1) that is kept
        probs = probs.masked_fill(probs < smallest, 0.0)
    # (batch, vocab); in float64 a GPU's parallel sum does not rise where a token has no probability
    cumulative = probs.cumsum(-1, dtype=torch.float64 if probs.is_cuda else None)
    total = cumulative[:, -1:]  # (batch, 1): 1, or the mass that was kept
    # stays below the total
    threshold = torch.minimum(uniform[:, None].type_as(total) * total, total * (1 - 1e-6))
    # the first with cumulative > threshold
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)  # (batch)


def _sort_descending(probs: Tensor) -> Tensor:
    """Each row's numbers, the largest first. On a CPU NumPy sorts much faster than torch."""
    if probs.device.type == "cpu" and probs.dtype != torch.bfloat16:  # which NumPy does not know
        return torch.from_numpy(np.sort(probs.detach().numpy(), axis=-1)).flip(-1)
    return probs.sort(-1, descending=True).values


@dataclass
class Generation:
    """One sampled answer."""

    ids: list[int]  # with the EOS, if it came
    logprobs: list[float]  # of each id under the model itself: temperature 1, no top-p
    finish_reason: str  # "eos" | "length"


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    *,
    eos_id: int,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Samples one answer per prompt, all in one batch; returned in the order given.

    temperature 0 takes the likeliest token. keys: one per row, ints such as (seed, version, prompt,
    sample); a row's randomness is `default_rng(key)`, whatever stands beside it in the batch.
    on_token(row, id) sees each token as it comes. Equal prompts are read once, their cache is then
    repeated; rows that have ended leave the batch. A row ends after max_new_tokens, or earlier
    where prompt and answer fill max_seq_len ("length"). Raises ValueError for a prompt that is
    empty or leaves no room for an answer, and for a temperature between 0 and 0.01.
    """
    if not prompts:
        return []
    args, device = model.args, model.tok_embeddings.weight.device
    for i, (prompt, _) in enumerate(zip(prompts, keys, strict=True)):
        if not 0 < len(prompt) < args.max_seq_len:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; possible are 1 to {args.max_seq_len - 1}"
            )
    limits = [min(max_new_tokens, args.max_seq_len - len(prompt)) for prompt in prompts]
    if 0 < temperature < 0.01:  # the products would overflow
        raise ValueError(
            f"temperature {temperature} is possible from 0.01 upwards, or 0 for the likeliest token"
        )
    uniforms = np.stack([np.random.default_rng(key).random(max(limits)) for key in keys]).astype(
        np.float32
    )
    uniforms = torch.from_numpy(uniforms).to(device)  # (batch, max(limits))

    # 1. prefill: each distinct prompt once, padded on the right with anything
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    number = {prompt: i for i, prompt in enumerate(distinct)}
    owner = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)  # (batch)
    lengths = torch.tensor([len(prompt) for prompt in distinct], device=device)  # (distinct)
    tokens = nn.utils.rnn.pad_sequence(
        [torch.tensor(prompt) for prompt in distinct], batch_first=True
    ).to(device)
    slots = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.tok_embeddings.weight.dtype
    cache = KVCache(args, len(distinct), slots, device, dtype)
    hidden = model.features(tokens, cache=cache)  # (distinct, longest prompt, dim)
    last = hidden[torch.arange(len(distinct), device=device), lengths - 1]  # (distinct, dim)
    logits = model.output(last).float()[owner]  # (batch, vocab)
    cache.select(owner)

    # 2. decode: one token a step for all rows that still run
    rows = torch.arange(len(prompts), device=device)  # (live) which answers the batch holds
    positions = lengths[owner]  # (live) where their next token goes
    ends = torch.tensor(limits, device=device)  # (live)
    running = torch.ones_like(rows, dtype=torch.bool)  # (live)
    # (batch, steps)
    all_ids = torch.zeros(len(prompts), max(limits), dtype=torch.long, device=device)
    all_logprobs = torch.zeros(len(prompts), max(limits), device=device)  # (batch, steps)
    length = tokens.shape[1]  # how many slots are in use, known without asking the device
    for step in range(max(limits)):
        if temperature == 0:
            ids = logits.argmax(-1)  # (live)
        else:
            probs = (logits / temperature).softmax(-1)  # (live, vocab)
            ids = sample_top_p(probs, top_p, uniforms[rows, step])  # (live)
        all_ids[rows, step] = ids
        all_logprobs[rows, step] = token_logprobs(logits, ids)
        if on_token is not None:
            for row, token in zip(rows[running].tolist(), ids[running].tolist(), strict=True):
                on_token(row, token)
        running &= (ids != eos_id) & (step + 1 < ends)
        # have rows ended? On a GPU, whoever looks has to wait: only now and then
        if device.type == "cpu" or step % 16 == 15:
            n_running = int(running.sum())
            if n_running == 0:
                break
            # closing the ranks copies the cache: not for every single row
            if n_running < 0.8 * len(rows):
                live = running.nonzero().squeeze(-1)  # (live)
                rows, positions, ends = rows[live], positions[live], ends[live]
                ids, running = ids[live], running[live]
                cache.select(live)
                length = int(positions.max())
        length = min(length + 1, slots)
        logits = model.decode(ids, positions, cache, length)  # (live, vocab)
        # an ended row still in the batch stays inside the cache
        positions = (positions + 1).clamp(max=slots - 1)

    # 3. cut each row at its end
    generations = []
    for row_ids, row_logprobs, limit in zip(
        all_ids.tolist(), all_logprobs.tolist(), limits, strict=True
    ):
        ended = eos_id in row_ids[:limit]
        end = row_ids.index(eos_id) + 1 if ended else limit
        generations.append(
            Generation(row_ids[:end], row_logprobs[:end], "eos" if ended else "length")
        )
    return generations
