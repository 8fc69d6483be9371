import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from tdro_cli.learn.contrastive import candidate_mask, cosine, in_batch_infonce, infonce, per_query_infonce


def unit(*shape, seed=0, dtype=torch.float32):
    vector = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (vector / vector.norm(dim=-1, keepdim=True)).to(dtype)


def reference_loss(positive_score, negative_scores):
    """-log of the positive's softmax share, in float64, by numpy alone."""
    scores = np.array([positive_score, *negative_scores], dtype=np.float64)
    top = scores.max()
    return float(np.log(np.exp(scores - top).sum()) + top - scores[0])


def test_equal_scores_lose_log_of_the_number_of_passages():
    loss_B = per_query_infonce(tensor([[1.0, 0.0]]), tensor([[[1.0, 0.0]] * 4]), 0.02)
    assert loss_B.tolist() == pytest.approx([math.log(4)])


def test_loss_by_hand():
    query_BD, passage_BND = tensor([[1.0, 0.0]]), tensor([[[0.6, 0.8], [0.0, 1.0]]])
    assert per_query_infonce(query_BD, passage_BND, 0.5).item() == pytest.approx(math.log(1 + math.exp(-1.2)))


def test_a_small_loss_at_temperature_0_002_keeps_its_digits():
    query_BD, passage_BND = tensor([[1.0, 0.0]]), tensor([[[1.0, 0.0], [0.96, 0.28]]])
    # scores 500 and 480: logsumexp - score in float32 would be 0
    assert per_query_infonce(query_BD, passage_BND, 0.002).item() == pytest.approx(math.exp(-20), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    queries=st.integers(1, 5),
    passages=st.integers(1, 6),
    temperature=st.sampled_from([0.002, 0.02, 0.5]),
    seed=st.integers(0, 999),
)
def test_equals_a_float64_reference(queries, passages, temperature, seed):
    query_BD, passage_BND = unit(queries, 8, seed=seed), unit(queries, passages, 8, seed=seed + 1)
    score_BBN = np.einsum("bd,cnd->bcn", query_BD.double().numpy(), passage_BND.double().numpy()) / temperature
    own = [reference_loss(score_BBN[b, b, 0], score_BBN[b, b, 1:]) for b in range(queries)]
    all_others = [
        reference_loss(score_BBN[b, b, 0], np.delete(score_BBN[b].ravel(), b * passages)) for b in range(queries)
    ]
    np.testing.assert_allclose(per_query_infonce(query_BD, passage_BND, temperature), own, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(in_batch_infonce(query_BD, passage_BND, temperature), all_others, rtol=1e-3, atol=1e-6)


def test_bfloat16_embeddings_are_multiplied_in_float32_even_under_autocast():
    query_BD, passage_BND = unit(4, 16, dtype=torch.bfloat16), unit(4, 3, 16, seed=1, dtype=torch.bfloat16)
    expected = [per_query_infonce(query_BD.float(), passage_BND.float(), 0.002)]
    expected.append(in_batch_infonce(query_BD.float(), passage_BND.float(), 0.002))
    with torch.autocast("cpu", torch.bfloat16):
        got = [per_query_infonce(query_BD, passage_BND, 0.002), in_batch_infonce(query_BD, passage_BND, 0.002)]
    assert all(loss.dtype == torch.float32 for loss in got)
    assert torch.equal(torch.stack(got), torch.stack(expected))


@pytest.mark.parametrize("loss", [per_query_infonce, in_batch_infonce])
def test_a_masked_passage_is_as_if_it_were_not_there(loss):
    query_BD, passage_BND = unit(3, 8), unit(3, 4, 8, seed=1)
    mask_BN = torch.ones(3, 4, dtype=torch.bool)
    mask_BN[:, 3] = False
    assert torch.allclose(loss(query_BD, passage_BND, 0.1, mask_BN=mask_BN), loss(query_BD, passage_BND[:, :3], 0.1))


def test_a_query_without_negatives_has_loss_and_gradient_zero():
    query_BD = unit(2, 8).requires_grad_()
    passage_BND = unit(2, 3, 8, seed=1).requires_grad_()
    loss_B = per_query_infonce(query_BD, passage_BND, 0.002, mask_BN=tensor([[True, False, False], [True, True, True]]))
    loss_B.sum().backward()
    assert loss_B[0] == 0 and loss_B[1] > 0
    assert not query_BD.grad[0].any() and not passage_BND.grad[0].any()
    assert query_BD.grad.isfinite().all() and passage_BND.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.002, 0.1])
def test_gradient_equals_float64_softmax(temperature):
    query_BD, passage_BND = unit(3, 8), unit(3, 4, 8, seed=1)
    leaf = query_BD.clone().requires_grad_()
    per_query_infonce(leaf, passage_BND, temperature).sum().backward()
    wide = query_BD.double().requires_grad_()
    torch.nn.functional.cross_entropy(
        torch.einsum("bd,bnd->bn", wide, passage_BND.double()) / temperature, torch.zeros(3).long(), reduction="sum"
    ).backward()
    assert torch.allclose(leaf.grad.double(), wide.grad, rtol=1e-3, atol=1e-3)


def test_one_rank_against_gathered_candidates_equals_its_rows_of_the_whole_batch():
    query_BD, passage_BND = unit(4, 8), unit(4, 3, 8, seed=1)
    whole_B = in_batch_infonce(query_BD, passage_BND, 0.05)
    mine_B = infonce(query_BD[2:], passage_BND.flatten(0, 1), tensor([6, 9]), 0.05)
    assert torch.allclose(mine_B, whole_B[2:])


def test_the_positive_takes_part_whatever_the_mask_says():
    loss_B = infonce(tensor([[1.0, 0.0]]), tensor([[1.0, 0.0], [1.0, 0.0]]), tensor([0]), 1.0, tensor([[False, True]]))
    assert loss_B.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        per_query_infonce(unit(1, 4), unit(1, 2, 4), temperature)


def test_shapes_that_disagree_are_refused():
    for query_BD, passage_BND in [
        *((unit(2, 4), unit(3, 2, 4)), (unit(2, 4), unit(2, 2, 5)), (unit(2, 4), unit(2, 4))),
        *((unit(2, 3, 4), unit(2, 2, 3, 4)), (unit(2, 4), torch.empty(2, 0, 4))),
    ]:
        shapes = re.escape(f"got {list(query_BD.shape)} and {list(passage_BND.shape)}")
        for loss in (per_query_infonce, in_batch_infonce):
            with pytest.raises(ValueError, match=rf"queries \[B, D\] and passages \[B, N, D\] needed, {shapes}"):
                loss(query_BD, passage_BND, 0.1)
    for loss in (per_query_infonce, in_batch_infonce):
        with pytest.raises(ValueError, match=r"mask \[2, 3\], but passages \[2, 2\]$"):
            loss(unit(2, 4), unit(2, 2, 4), 0.1, mask_BN=torch.ones(2, 3, dtype=torch.bool))


def test_shapes_of_shared_candidates_that_disagree_are_refused():
    positive_B = tensor([0, 1])
    for query_BD, candidate_MD in [(unit(2, 4), unit(3, 5)), (unit(2, 4, 4), unit(3, 4)), (unit(2, 4), unit(3, 4, 4))]:
        shapes = re.escape(f"got {list(query_BD.shape)} and {list(candidate_MD.shape)}")
        with pytest.raises(ValueError, match=rf"queries \[B, D\] and candidates \[M, D\] needed, {shapes}"):
            infonce(query_BD, candidate_MD, positive_B, 0.1)
    with pytest.raises(ValueError, match=r"one positive for each of 2 queries needed, got \[1\]"):
        infonce(unit(2, 4), unit(3, 4), tensor([0]), 0.1)
    with pytest.raises(ValueError, match=r"mask \[2, 4\], but 2 queries and 3 candidates"):
        infonce(unit(2, 4), unit(3, 4), positive_B, 0.1, torch.ones(2, 4, dtype=torch.bool))


def test_a_batch_of_one_query_and_its_positive_alone_has_loss_zero():
    for loss in (per_query_infonce, in_batch_infonce):
        assert loss(tensor([[1.0, 0.0]]), tensor([[[0.0, 1.0]]]), 0.002).tolist() == [0.0]


def test_padding_and_refused_candidates_are_left_out_together():
    # two queries of two passages each: of the four candidates one is padding, and query 0 may not meet candidate 3
    query_BD, passage_BND = unit(2, 8), unit(2, 2, 8, seed=1)
    mask_BN, mask_BM = tensor([[True, False], [True, True]]), tensor([[True, True, True, False], [True] * 4])
    loss_B = in_batch_infonce(query_BD, passage_BND, 0.1, mask_BN=mask_BN, mask_BM=mask_BM)
    score_BM = (query_BD @ passage_BND.flatten(0, 1).T / 0.1).double().numpy()
    expected = [reference_loss(score_BM[0, 0], score_BM[0, [2]]), reference_loss(score_BM[1, 2], score_BM[1, [0, 3]])]
    assert loss_B.tolist() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.sampled_from([0.002, 0.02, 1.0]))
def test_the_order_of_negatives_and_a_rotation_of_the_space_change_no_loss(seed, temperature):
    query_BD, passage_BND = unit(4, 6, seed=seed), unit(4, 5, 6, seed=seed + 1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    order = [0, *(1 + np.random.default_rng(seed).permutation(4))]
    for loss in (per_query_infonce, in_batch_infonce):
        loss_B = loss(query_BD, passage_BND, temperature)
        assert torch.allclose(loss(query_BD, passage_BND[:, order], temperature), loss_B, atol=1e-6)
        turned = [(x.double() @ rotation).float() for x in (query_BD, passage_BND)]
        assert torch.allclose(loss(*turned, temperature), loss_B, rtol=1e-4, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.sampled_from([0.002, 0.02, 1.0]))
def test_another_negative_never_lowers_a_loss_and_in_batch_is_never_below_per_query(seed, temperature):
    query_BD, passage_BND = unit(4, 6, seed=seed), unit(4, 5, 6, seed=seed + 1)
    for loss in (per_query_infonce, in_batch_infonce):
        fewer_B = loss(query_BD, passage_BND[:, :4], temperature)
        assert (loss(query_BD, passage_BND, temperature) >= fewer_B * (1 - 1e-5)).all()
    own_B, all_B = (loss(query_BD, passage_BND, temperature) for loss in (per_query_infonce, in_batch_infonce))
    assert (all_B >= own_B * (1 - 1e-5)).all() and (own_B >= 0).all()


def test_cosine_is_that_of_embeddings_of_any_length():
    # (3, 4) and (5, 12): 63 / 65; orthogonal: 0; opposite: -1
    query_BD, candidate_MD = tensor([[3.0, 4.0], [1.0, 0.0]]), tensor([[5.0, 12.0], [0.0, 2.0], [-7.0, 0.0]])
    expected = pytest.approx([63 / 65, 0.8, -0.6, 5 / 13, 0.0, -1.0], abs=1e-6)
    assert cosine(query_BD, candidate_MD).flatten().tolist() == expected
    assert cosine(query_BD * 1e3, candidate_MD / 1e3).flatten().tolist() == expected


def test_cosine_is_float32_even_under_autocast():
    query_BD, candidate_MD = unit(4, 16, dtype=torch.bfloat16), unit(5, 16, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        score_BM = cosine(query_BD, candidate_MD)
    assert score_BM.dtype == torch.float32 and torch.equal(score_BM, cosine(query_BD.float(), candidate_MD.float()))


def test_known_positives_are_masked_by_text_and_by_query_text():
    # rows 0 and 2 ask the same; row 0 also knows text 12, its second positive; text 11 is row 1's positive
    allowed_BM = candidate_mask(
        query_text_id_R=tensor([1, 2, 1]),
        positive_text_id_RP=tensor([[10, 12], [11, -1], [13, -1]]),
        candidate_text_id_M=tensor([10, 20, 11, 12, 13, 10, -1]),
        candidate_row_M=tensor([0, 0, 1, 1, 2, 2, 2]),
    )
    assert allowed_BM.tolist() == [
        [False, True, True, False, False, False, False],
        [True, True, False, True, True, True, False],
        [False, True, True, False, False, False, False],
    ]


def test_without_in_batch_negatives_only_own_passages_are_met():
    ids = dict(
        query_text_id_R=tensor([1, 2]),
        positive_text_id_RP=tensor([[10], [11]]),
        candidate_text_id_M=tensor([10, 20, 11, 21]),
        candidate_row_M=tensor([0, 0, 1, 1]),
    )
    assert candidate_mask(**ids, in_batch=False).tolist() == [[False, True, False, False], [False, False, False, True]]
    query_BD, passage_BND = unit(2, 8), unit(2, 2, 8, seed=1)
    own_B = in_batch_infonce(query_BD, passage_BND, 0.1, mask_BM=candidate_mask(**ids, in_batch=False))
    assert torch.allclose(own_B, per_query_infonce(query_BD, passage_BND, 0.1))
    assert candidate_mask(**ids, row_B=tensor([1])).tolist() == [[True, True, False, True]]


def test_the_text_numbered_zero_is_a_text_like_any_other():
    allowed_BM = candidate_mask(tensor([0, 1]), tensor([[0], [1]]), tensor([0, 2, 1, 0]), tensor([0, 0, 1, 1]))
    assert allowed_BM.tolist() == [[False, True, True, False], [True, True, False, True]]
