"""Training on batches of any size with bounded memory: arXiv:2101.06983 (Gao et al.), around DeepSpeed's engine.

Embeddings first, then the loss and its gradient at the embeddings, then each chunk once more, with its share of that
gradient. Chunks whose activations fit are not forwarded twice; equal texts are computed once. N texts, D embedding
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tdro_cli.data.tokenization import TokenIds
from tdro_cli.model.packing import Budget, chunk_tokens, cut, distinct, embed_batch, is_unpadded, repeats_itself
from tdro_cli.run.engine import Engine


@dataclass(eq=False)
class ForwardPass:
    """Embeddings [N, D] in the order of the texts, and what the backward pass needs.

    `token_lists`: the texts that are computed, of which `chunks` are indices; `place_N` says which one each text is.
    `parts`: the chunks' embeddings, the first `kept` of them with their graphs; the others are computed again.
    `tokens` and `computed`: real ones of the texts computed, and with padding; forwards only.
    """

    embedding_ND: Tensor
    place_N: Tensor
    chunks: list[np.ndarray]
    token_lists: Sequence[TokenIds]
    pad_id: int
    parts: list[Tensor]
    kept: int
    random_states: list[dict[str, Tensor]]
    tokens: int
    computed: int


def forward(engine: Engine, token_lists: Sequence[TokenIds], *, pad_id: int, budget: Budget) -> ForwardPass:
    """Embeds the texts of this rank: [N, D] float32, without a graph to the outside.

    A text that stands there several times is computed once, but where dropout makes each time another.
    """
    world = engine.world
    place_N = np.arange(len(token_lists))
    if repeats_itself(engine):
        token_lists, place_N = distinct(token_lists)
    lengths = [len(tokens) for tokens in token_lists]
    unpadded = is_unpadded(engine)
    chunks, computed = cut(lengths, budget.micro_batch_tokens, unpadded=unpadded)
    # every rank runs as many chunks: ZeRO 2 and 3 communicate in each
    chunks += [np.empty(0, dtype=np.int64)] * (world.most(len(chunks)) - len(chunks))
    kept = _chunks_to_keep(engine, [chunk_tokens(chunk, lengths, unpadded=unpadded) for chunk in chunks], budget)
    parts, random_states = [], []
    for number, chunk in enumerate(chunks):
        random_states.append({} if number < kept else _random_state(world.device))
        with torch.set_grad_enabled(number < kept):
            parts.append(_embed(engine, token_lists, chunk, pad_id))
    joined = torch.cat([part[: len(chunk)] for part, chunk in zip(parts, chunks, strict=True)])
    position = np.argsort(np.concatenate(chunks))
    return ForwardPass(
        embedding_ND=joined.detach().index_select(0, torch.from_numpy(position[place_N]).to(joined.device)),
        place_N=torch.from_numpy(place_N).to(joined.device),
        chunks=chunks,
        token_lists=token_lists,
        pad_id=pad_id,
        parts=parts,
        kept=kept,
        random_states=random_states,
        tokens=sum(lengths),
        computed=computed,
    )


def _chunks_to_keep(engine: Engine, tokens: Sequence[int], budget: Budget) -> int:
    """How many chunks, from the first, keep their graphs: as many on every rank."""
    if engine.zero_stage == 3:  # a graph must not outlive the next forward: its parameters are scattered again
        return 0
    fitting = int((np.cumsum(tokens) <= budget.activation_tokens).sum())
    return len(tokens) - engine.world.most(len(tokens) - fitting)


def backward(engine: Engine, passed: ForwardPass, gradient_ND: Tensor, *, last: bool = True) -> None:
    """Carries the gradient of the loss at the embeddings on into the model; with `last`, a step may follow.

    Dropout does again what it did in `forward`.
    """
    chunks, kept = passed.chunks, passed.kept
    if len(passed.token_lists) < len(gradient_ND):
        of_distinct = gradient_ND.new_zeros(len(passed.token_lists), gradient_ND.shape[1])
        gradient_ND = of_distinct.index_add_(0, passed.place_N, gradient_ND)
    if kept:
        whole = kept == len(chunks)
        parts = zip(passed.parts[:kept], chunks[:kept], strict=True)
        surrogates = [_surrogate(part, gradient_ND, chunk) for part, chunk in parts]
        engine.backward(sum(surrogates[1:], start=surrogates[0]), last=last and whole)
        passed.parts.clear()  # and with them the activations, before more are made
        if whole:
            return
    device = engine.world.device
    after = _random_state(device)
    for number in range(kept, len(chunks)):
        _set_random_state(passed.random_states[number], device)
        part = _embed(engine, passed.token_lists, chunks[number], passed.pad_id)
        engine.backward(_surrogate(part, gradient_ND, chunks[number]), last=last and number == len(chunks) - 1)
    _set_random_state(after, device)


def _embed(engine: Engine, token_lists: Sequence[TokenIds], chunk: np.ndarray, pad_id: int) -> Tensor:
    """The chunk's embeddings; of one padding token where the chunk is empty."""
    texts = [token_lists[i] for i in chunk] if len(chunk) else [[pad_id]]
    return embed_batch(engine, texts, pad_id, engine.world.device)


def _surrogate(part_ND: Tensor, gradient_ND: Tensor, chunk: np.ndarray) -> Tensor:
    """A scalar whose gradient at the chunk's embeddings is the cached one."""
    if not len(chunk):
        return part_ND.sum() * 0.0
    return (part_ND * gradient_ND[torch.from_numpy(chunk).to(gradient_ND.device)]).sum()


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
