"""The models that are measured, and how many operations their matrix products need."""

from dataclasses import dataclass, replace

import torch

from data import Tokenizer, world
from model import ModelArgs, Transformer


@dataclass(frozen=True)
class Size:
    """A model's shape."""

    name: str
    args: ModelArgs

    def model(self, dtype: torch.dtype = torch.float32) -> Transformer:
        """A model with random weights."""
        model = Transformer(self.args)
        model.init_weights(0)
        return model.to(dtype).eval()

    def with_words(self) -> "Size":
        """The same with the toy world's vocabulary, for work on its texts."""
        vocab_size = Tokenizer(world.TOKENIZER).vocab_size
        return replace(self, args=replace(self.args, vocab_size=vocab_size))


S = Size(
    name="S",
    args=ModelArgs(
        dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=352, vocab_size=1024, max_seq_len=512
    ),
)
M = Size(
    name="M",
    args=ModelArgs(
        dim=512, n_layers=8, n_heads=8, n_kv_heads=4, ffn_dim=1376, vocab_size=4096, max_seq_len=512
    ),
)
# tiny, for --tiny
T = Size(
    name="T",
    args=ModelArgs(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=96, max_seq_len=512
    ),
)


def layer_weights(args: ModelArgs) -> int:
    """Numbers in the matrices of one layer."""
    queries = args.n_heads * args.head_size
    keys = args.kv_heads * args.head_size
    attention = 2 * args.dim * queries + 2 * args.dim * keys
    return attention + 3 * args.dim * args.hidden_size


def flops(args: ModelArgs, lengths: list[int], outputs: int) -> float:
    """Operations of the matrix products of one forward pass; a backward pass has twice as many.

    Args:
        lengths: tokens of each row; padding is no work that has to be done.
        outputs: how many tokens the output matrix is asked for.
    """
    tokens = sum(lengths)
    seen = sum(length * (length + 1) / 2 for length in lengths)  # (query, key) pairs
    products = 2 * args.n_layers * layer_weights(args) * tokens
    attention = 4 * args.n_layers * args.n_heads * args.head_size * seen
    return products + attention + 2 * args.dim * args.vocab_size * outputs


def weight_bytes(args: ModelArgs, dtype: torch.dtype) -> int:
    """What a decode step must read of the weights: all matrices but the embedding's."""
    numbers = args.n_layers * layer_weights(args) + args.dim * args.vocab_size
    return numbers * dtype.itemsize
