"""Attention without padding: the texts of a batch end to end, each attending to itself only (`attention: varlen`).

On a GPU torch's own flash attention for sequences of any length; elsewhere the same by a loop over the texts. T tokens
of all texts, H heads, K heads of keys and values, D size of a head.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdro_cli.errors import TdroError

NAME = "varlen"


def register() -> None:
    """Makes `varlen` known to transformers as an attention implementation that needs no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def bounds(length_N: Tensor) -> dict[str, Any]:
    """What `attend` must be told, as keyword arguments of the model: where each text begins, and the longest."""
    starts = F.pad(length_N.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(length_N.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [1, H, T, D], key and value [1, K, T, D] to [1, T, H, D].

    Raises TdroError for a model that needs what it cannot do, or keeps the bounds of the texts to itself.
    """
    dtype = _compute_dtype(query)
    if query.is_cuda and dtype == torch.float32:
        raise TdroError(f"attention {NAME} computes in half precision on a GPU", remedy="set backbone.dtype: bfloat16")
    reason = _obstacle(module, dropout, softcap, cu_seq_lens_q, len(query))
    if reason:
        raise TdroError(f"attention {NAME} can't serve {type(module).__name__}: {reason}", remedy="use attention: sdpa")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    query, key, value = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    left = -1 if sliding_window is None else sliding_window - 1
    window = (left, 0 if causal else left)
    run = _flash if query.is_cuda else _loop
    return run(query, key, value, cu_seq_lens_q, max_length_q, scaling, window)[None], None


def _obstacle(
    module: nn.Module, dropout: float, softcap: float | None, starts: Tensor | None, batch: int
) -> str | None:
    if softcap is not None:
        return "it caps attention scores"
    if dropout and module.training:
        return f"it drops {dropout:.0%} of the attention (attention_dropout in the model's config.json)"
    return "it does not pass on where the texts begin" if starts is None or batch != 1 else None


def _compute_dtype(query: Tensor) -> torch.dtype:
    """Rotary embeddings leave queries in float32 under autocast, which does not know this function."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float | None,
    window: tuple[int, int],
) -> Tensor:
    try:
        from torch.nn.attention.varlen import varlen_attn

        takes = set(inspect.signature(varlen_attn).parameters)
    except ImportError:  # before torch 2.10
        takes = set()
    if not {"scale", "window_size"} <= takes:
        raise TdroError(f"attention {NAME} needs a newer torch than {torch.__version__}", remedy="use attention: sdpa")
    options: dict[str, Any] = {"scale": scaling, "window_size": window}
    if "enable_gqa" in takes:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:  # torch 2.11: the kernel wants as many heads of keys and values as of queries
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    return varlen_attn(  # type: ignore[return-value]  # a tuple only where its return_aux is given
        *(query.contiguous(), key.contiguous(), value.contiguous(), starts, starts, longest, longest), **options
    )


def _loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float | None,
    window: tuple[int, int],
) -> Tensor:
    """The same, text by text."""
    lengths = starts.diff().tolist()
    texts = zip(*(part.transpose(0, 1).split(lengths, dim=1) for part in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for q, k, v in texts:
        whole = window[0] < 0 or window[0] >= q.shape[1] - 1
        mask = None if whole else _band(q.shape[1], window, q.device)
        causal = whole and window[1] == 0 and q.shape[1] > 1
        parts.append(
            F.scaled_dot_product_attention(
                *(q[None], k[None], v[None]), attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
            )[0]
        )
    return torch.cat(parts, dim=1).transpose(0, 1)


def _band(length: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """Which tokens each token sees: at most `window` to its left and right, itself included besides."""
    place = torch.arange(length, device=device)
    behind = place[:, None] - place[None]
    return (behind <= window[0]) & (-behind <= window[1])
