"""Batches of texts of like length, so that little is computed on padding.

N texts, T tokens of the longest one of a batch, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tdro_cli.data.tokenization import TokenIds

if TYPE_CHECKING:
    from tdro_cli.recipe import Encoder

CPU_TOKENS = 2048  # at once; a processor gains nothing from more, computes more padding, and its caches overflow
ACTIVATION_TOKENS = {"cpu": 12288, "cuda": 65536}  # more spares a CPU little: a long batch is beyond either
BUSY_TOKENS = 512  # what one CPU core needs at once; several need twice as many, a device with a larger budget more


class Packed(NamedTuple):
    """Embeddings [N, D] in the order of the texts, the tokens computed, and the padding beside them (in tokens)."""

    embedding_ND: Tensor
    tokens: int
    padded_tokens: int

    @property
    def padding_share(self) -> float:
        """Padding as a share of all tokens computed, in 0..1."""
        computed = self.tokens + self.padded_tokens
        return self.padded_tokens / computed if computed else 0.0


@dataclass(frozen=True)
class Budget:
    """Tokens, padding included: at once through the model, and whose activations may be kept at once."""

    micro_batch_tokens: int
    activation_tokens: int


def budget_on(device: Any, encoder: Encoder) -> Budget:
    """What the recipe's section says, and what is usual on the device where it says nothing."""
    kept = encoder.activation_tokens or ACTIVATION_TOKENS.get(device.type, ACTIVATION_TOKENS["cuda"])
    return Budget(tokens_at_once(encoder.micro_batch_tokens, device), kept)


def tokens_at_once(budget: int, device: Any) -> int:
    """What of the recipe's budget is used on the device: all of it, on a CPU 2,048 at most."""
    return min(budget, CPU_TOKENS) if device.type == "cpu" else budget


def token_budget_batches(lengths: Sequence[int], budget: int, busy: int | None = None) -> list[np.ndarray]:
    """Indices into `lengths`, longest first, in batches with count × longest length <= `budget`.

    A batch also ends before a text that is a sixteenth shorter than its longest, once it has enough tokens to keep a
    device busy (`busy`; by default more with several threads): then padding stays low whatever the budget. A text
    longer than the budget is a batch of its own. Equal lengths keep their order. Every index occurs once. Raises
    ValueError unless `budget` > 0.
    """
    if budget <= 0:
        raise ValueError(f"the token budget must be > 0, got {budget}")
    length = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-length, kind="stable")
    busy = busy or max(BUSY_TOKENS * min(torch.get_num_threads(), 2), budget // 32)
    batches, start = [], 0
    while start < len(order):
        longest = max(1, int(length[order[start]]))
        count = max(1, budget // longest)
        alike = int(
            np.searchsorted(-length[order[start:]], -longest * 15 // 16, side="right")
        )  # at least 15/16 as long
        count = min(count, max(alike, -(-busy // longest)))
        batches.append(order[start : start + count])
        start += count
    return batches


def unpadded_batches(lengths: Sequence[int], budget: int) -> list[np.ndarray]:
    """Indices into `lengths` in batches of at most `budget` tokens in all, for an encoder that computes no padding.

    Longest first, so that attention's work is alike in a batch. A text longer than the budget is a batch of its own.
    """
    length = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-length, kind="stable")
    batches, start = [], 0
    ends = np.cumsum(length[order])
    while start < len(order):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        batches.append(order[start:stop])
        start = stop
    return batches


def cut(lengths: Sequence[int], budget: int, *, unpadded: bool) -> tuple[list[np.ndarray], int]:
    """The texts in batches, and the tokens that will be computed for them, padding included."""
    batches = unpadded_batches(lengths, budget) if unpadded else token_budget_batches(lengths, budget)
    return batches, sum(chunk_tokens(batch, lengths, unpadded=unpadded) for batch in batches)


def chunk_tokens(batch: np.ndarray, lengths: Sequence[int], *, unpadded: bool) -> int:
    """Tokens computed for one batch, whose first text is its longest."""
    if unpadded or not len(batch):
        return int(sum(lengths[i] for i in batch))
    return len(batch) * int(lengths[batch[0]])


def embed_batch(
    forward: Callable[[Tensor, Tensor], Tensor], token_lists: Sequence[TokenIds], pad_id: int, device: Any
) -> Tensor:
    """One batch through `forward(input_ids_NT, attention_mask_NT)`, which gets it on `device`.

    An unpadded encoder gets it on the CPU: it knows the texts' lengths there without waiting for the device.
    """
    ids_NT, mask_NT = pad_batch(token_lists, pad_id)
    if is_unpadded(forward):
        return forward(ids_NT, mask_NT)
    return forward(ids_NT.to(device, non_blocking=True), mask_NT.to(device, non_blocking=True))


def is_unpadded(forward: Any) -> bool:
    """Whether `forward`, an encoder or an engine around one, computes nothing on padding."""
    return getattr(getattr(forward, "module", forward), "unpadded", False)


def repeats_itself(forward: Any) -> bool:
    """Whether `forward`, an encoder or an engine around one, gives equal texts equal embeddings: not under dropout."""
    model = getattr(forward, "module", forward)
    return not (getattr(model, "training", True) and getattr(model, "draws_at_random", True))


def distinct(token_lists: Sequence[TokenIds]) -> tuple[Sequence[TokenIds], np.ndarray]:
    """The texts, each once, in the order they first come, and which of them each one is: [N]."""
    keys = [np.asarray(tokens, dtype=np.int64).tobytes() for tokens in token_lists]
    number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    once = dict(zip(keys, token_lists, strict=True))  # in the same order
    return list(once.values()), np.array([number[key] for key in keys], dtype=np.int64)


def pad_batch(token_lists: Sequence[TokenIds], pad_id: int) -> tuple[Tensor, Tensor]:
    """Input ids [N, T] int64, padded on the right, and attention mask [N, T] int64 with 1 for the real tokens."""
    length_N = np.fromiter(map(len, token_lists), dtype=np.int64, count=len(token_lists))
    mask_NT = np.arange(length_N.max(initial=0)) < length_N[:, None]
    ids_NT = np.full(mask_NT.shape, pad_id, dtype=np.int64)
    ids_NT[mask_NT] = np.concatenate(token_lists) if len(token_lists) else ()
    return torch.from_numpy(ids_NT), torch.from_numpy(mask_NT.astype(np.int64))


def encode_token_lists(
    forward: Callable[[Tensor, Tensor], Tensor],
    token_lists: Sequence[TokenIds],
    *,
    pad_id: int,
    budget: int,
    device: Any,
) -> Packed:
    """Runs `forward(input_ids_NT, attention_mask_NT)` over batches of at most `budget` tokens, padding included.

    A text that stands there several times is computed once, but where dropout makes each time another. The graph is
    kept where gradients are enabled. Raises ValueError for no texts at all: their size is not known.
    """
    if not token_lists:
        raise ValueError("no texts to encode")
    once_N = np.arange(len(token_lists))
    if repeats_itself(forward):
        token_lists, once_N = distinct(token_lists)
    lengths = [len(tokens) for tokens in token_lists]
    batches, computed = cut(lengths, budget, unpadded=is_unpadded(forward))
    embedding_ND = torch.cat([embed_batch(forward, [token_lists[i] for i in rows], pad_id, device) for rows in batches])
    place_N = torch.from_numpy(np.argsort(np.concatenate(batches))[once_N]).to(embedding_ND.device)
    tokens = sum(lengths)
    return Packed(embedding_ND.index_select(0, place_N), tokens, computed - tokens)
