"""InfoNCE, per query and in batch.

B queries, N passages per query, M candidates, D embedding size, R rows of the global batch, P known positives of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus


def per_query_infonce(
    query_BD: Tensor, passage_BND: Tensor, temperature: float, *, mask_BN: Tensor | None = None
) -> Tensor:
    """InfoNCE of each query over its own passages, in nats: [B], float32.

    Passage 0 is the positive. `mask_BN` is False where a passage is only padding; a query without negatives has loss 0.
    arXiv:2408.10613, equation 2. Raises ValueError unless `temperature` > 0 and the shapes agree.
    """
    _check(query_BD, passage_BND, temperature, mask_BN)
    # float32 before the product: at temperature 0.002 a bfloat16 logit moves in steps of 2
    with torch.autocast(query_BD.device.type, enabled=False):
        score_BN = torch.einsum("bd,bnd->bn", query_BD.float(), passage_BND.float()) / temperature
    positive_B = score_BN.new_zeros(len(score_BN), dtype=torch.int64)
    return _negative_log_share(score_BN, positive_B, mask_BN)


def in_batch_infonce(
    query_BD: Tensor,
    passage_BND: Tensor,
    temperature: float,
    *,
    mask_BN: Tensor | None = None,
    mask_BM: Tensor | None = None,
) -> Tensor:
    """InfoNCE of each query over every passage of the batch, in nats: [B], float32.

    Passage 0 of a query is its positive. `mask_BN` is False where a passage is only padding, for all queries; `mask_BM`
    (M = B·N, a query's passages side by side) where one query must not meet one candidate: see `candidate_mask`.
    Raises ValueError unless `temperature` > 0 and the shapes agree.
    """
    _check(query_BD, passage_BND, temperature, mask_BN)
    num_queries, num_passages = passage_BND.shape[:2]
    if mask_BN is not None:
        mask_BM = (mask_BN.flatten() & (True if mask_BM is None else mask_BM)).expand(num_queries, -1)
    positive_B = torch.arange(num_queries, device=query_BD.device) * num_passages
    return infonce(query_BD, passage_BND.flatten(0, 1), positive_B, temperature, mask_BM)


def infonce(
    query_BD: Tensor, candidate_MD: Tensor, positive_B: Tensor, temperature: float, mask_BM: Tensor | None = None
) -> Tensor:
    """InfoNCE of each query over shared candidates, in nats: [B], float32.

    `positive_B` is the index in M of each query's positive, which takes part whatever `mask_BM` says; the other
    candidates take part where the mask is True. One rank's queries can so meet the passages of all ranks.
    Raises ValueError unless `temperature` > 0 and the shapes agree.
    """
    _check_temperature(temperature)
    if query_BD.ndim != 2 or candidate_MD.ndim != 2 or query_BD.shape[1] != candidate_MD.shape[1]:
        raise ValueError(
            f"queries [B, D] and candidates [M, D] needed, got {list(query_BD.shape)} and {list(candidate_MD.shape)}"
        )
    if positive_B.shape != query_BD.shape[:1]:
        raise ValueError(f"one positive for each of {len(query_BD)} queries needed, got {list(positive_B.shape)}")
    if mask_BM is not None and mask_BM.shape != (len(query_BD), len(candidate_MD)):
        raise ValueError(f"mask {list(mask_BM.shape)}, but {len(query_BD)} queries and {len(candidate_MD)} candidates")
    with torch.autocast(query_BD.device.type, enabled=False):
        score_BM = query_BD.float() @ candidate_MD.float().T / temperature
    return _negative_log_share(score_BM, positive_B, mask_BM)


def cosine(query_BD: Tensor, candidate_MD: Tensor) -> Tensor:
    """Cosine similarities [B, M], float32, whether the embeddings are normalised or not."""
    with torch.autocast(query_BD.device.type, enabled=False):
        return normalize(query_BD.float()) @ normalize(candidate_MD.float()).T


def candidate_mask(
    query_text_id_R: Tensor,
    positive_text_id_RP: Tensor,
    candidate_text_id_M: Tensor,
    candidate_row_M: Tensor,
    *,
    row_B: Tensor | None = None,
    in_batch: bool = True,
) -> Tensor:
    """Which candidates each query may meet as negatives: [B, M], True = allowed.

    Equal int64 ids mean equal texts; negative ids are padding (of `positive_text_id_RP` and `candidate_text_id_M`). R
    runs over the rows of the global batch, `row_B` names the rows of this rank's queries (None: all of them, in order),
    and `candidate_row_M` the row that brought a candidate. Refused are texts known as a positive of the row, or of a
    row with the same query text, and with `in_batch=False` whatever another row brought. The row's own positive is
    refused too: `infonce` lets it in.
    """
    row_B = torch.arange(len(query_text_id_R), device=query_text_id_R.device) if row_B is None else row_B
    hit_RM = row_B.new_zeros(len(query_text_id_R), len(candidate_text_id_M), dtype=torch.bool)
    for positive_R in positive_text_id_RP.T:  # one column at a time: R·P·M would be large
        hit_RM |= (positive_R[:, None] == candidate_text_id_M) & (positive_R[:, None] >= 0)
    distinct, group_R = query_text_id_R.unique(return_inverse=True)
    hits_of_text = row_B.new_zeros(len(distinct), hit_RM.shape[1], dtype=torch.int32)
    hits_of_text.index_add_(0, group_R, hit_RM.int())
    allowed_BM = (hits_of_text[group_R[row_B]] == 0) & (candidate_text_id_M >= 0)
    return allowed_BM if in_batch else allowed_BM & (candidate_row_M == row_B[:, None])


def _negative_log_share(score_BM: Tensor, positive_B: Tensor, mask_BM: Tensor | None) -> Tensor:
    """-log softmax at the positive, as log(1 + Σ exp(negative - positive)).

    A logsumexp minus the positive's score loses every loss under 3e-5 at scores near 500 (cosine / 0.002), and a solved
    task's losses lie there.
    """
    is_positive_BM = torch.zeros_like(score_BM, dtype=torch.bool).scatter_(1, positive_B[:, None], True)
    refused_BM = is_positive_BM if mask_BM is None else is_positive_BM | ~mask_BM
    margin_BM = (score_BM - score_BM.gather(1, positive_B[:, None])).masked_fill(refused_BM, -torch.inf)
    return softplus(margin_BM.logsumexp(1))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def _check(query_BD: Tensor, passage_BND: Tensor, temperature: float, mask_BN: Tensor | None) -> None:
    _check_temperature(temperature)
    if passage_BND.ndim != 3 or not passage_BND.shape[1] or query_BD.shape != passage_BND.shape[::2]:
        raise ValueError(
            f"queries [B, D] and passages [B, N, D] needed, got {list(query_BD.shape)} and {list(passage_BND.shape)}"
        )
    if mask_BN is not None and mask_BN.shape != passage_BND.shape[:2]:
        raise ValueError(f"mask {list(mask_BN.shape)}, but passages {list(passage_BND.shape[:2])}")
