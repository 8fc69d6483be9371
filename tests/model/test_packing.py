import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdro_cli.learn.weight_learning import micro_batches
from tdro_cli.model.packing import Budget, budget_on, cut, encode_token_lists, pad_batch, token_budget_batches
from tdro_cli.recipe import Encoder


def test_longest_first_and_as_many_as_the_budget_holds():
    batches = token_budget_batches([3, 9, 4, 1, 4, 1], budget=8)
    assert [batch.tolist() for batch in batches] == [[1], [2, 4], [0, 3], [5]]  # 9 > 8 is alone; 2x4; 2x3; 1


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 200))
def test_every_index_once_and_no_batch_over_budget_unless_it_is_one_text(lengths, budget):
    batches = token_budget_batches(lengths, budget)
    assert sorted(np.concatenate([np.empty(0, int), *batches]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    assert [b.tolist() for b in batches] == [b.tolist() for b in token_budget_batches(np.array(lengths, int), budget)]


LENGTHS = json.loads((Path(__file__).parents[2] / "benchmarks" / "lengths.json").read_text())


@pytest.mark.parametrize(("queries", "share"), [(32, 0.05), (256, 0.04), (2048, 0.04)])
def test_padding_is_low_at_real_lengths(queries, share):
    """1 + 8 texts a query of the 20 real tasks: a small batch, and one of 2,048 on 8 ranks and on 1."""
    rng = np.random.default_rng(3)
    rows = [LENGTHS[i] for i in rng.integers(0, len(LENGTHS), queries)]
    count_B = np.array([len(row) - 1 for row in rows])
    batch = SimpleNamespace(
        queries=[np.zeros(row[0]) for row in rows],
        passages=[np.zeros(length) for row in rows for length in row[1:]],
        first_B=np.cumsum(count_B) - count_B,
    )
    parts = {
        "finetune": [[length for row in rows for length in row]],
        "learn-weights": [[length for i in part for length in rows[i]] for part in micro_batches(batch, 65_536)],
    }
    for stage, lengths in parts.items():
        computed = sum(cut(part, 16_384, unpadded=False)[1] for part in lengths)
        assert 1 - sum(map(sum, lengths)) / computed < share, stage


@pytest.mark.parametrize("budget", [0, -1])
def test_no_budget_is_refused(budget):
    with pytest.raises(ValueError, match="must be > 0"):
        token_budget_batches([1], budget)


def test_padding_is_on_the_right():
    ids, mask = pad_batch([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_embeddings_come_back_in_the_given_order_with_gradients_and_counts():
    table = torch.arange(20.0).reshape(10, 2).requires_grad_()
    seen = []

    def sum_of_tokens(ids, mask):
        seen.append(tuple(ids.shape))
        return (table[ids] * mask.unsqueeze(-1)).sum(1)

    token_lists = [[1], [2, 3, 4], [5, 6], [7, 7]]
    packed = encode_token_lists(sum_of_tokens, token_lists, pad_id=0, budget=4, device="cpu")
    assert packed.embedding_ND.tolist() == [table[t].sum(0).tolist() for t in token_lists]
    assert seen == [(1, 3), (2, 2), (1, 1)]
    assert (packed.tokens, packed.padded_tokens) == (8, 0)
    packed.embedding_ND[:, 0].sum().backward()
    assert table.grad[:, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 2, 0, 0]
    wide = encode_token_lists(sum_of_tokens, token_lists, pad_id=0, budget=100, device="cpu")
    assert torch.equal(wide.embedding_ND, packed.embedding_ND)
    assert (wide.tokens, wide.padded_tokens, wide.padding_share) == (8, 4, 4 / 12)


@pytest.mark.parametrize(("draws", "training", "computed"), [(False, True, 3), (True, False, 3), (True, True, 8)])
def test_a_text_that_comes_again_is_computed_once_unless_each_time_is_another(draws, training, computed):
    class SumOfTokens(torch.nn.Embedding):
        draws_at_random = draws

        def forward(self, ids_NT, mask_NT):
            return (super().forward(ids_NT) * mask_NT.unsqueeze(-1)).sum(1)

    model = SumOfTokens(10, 2).train(training)
    token_lists = [[1], [2, 3], [1], np.array([2, 3]), [2, 3]]
    packed = encode_token_lists(model, token_lists, pad_id=0, budget=4, device="cpu")
    torch.testing.assert_close(packed.embedding_ND, torch.stack([model.weight[t].sum(0) for t in token_lists]))
    assert packed.tokens == computed
    (packed.embedding_ND[:, 0] * torch.tensor([1.0, 2, 4, 8, 16])).sum().backward()
    assert model.weight.grad[1:4, 0].tolist() == [5, 26, 26]


def test_a_cpu_takes_small_chunks_and_keeps_what_the_recipe_says():
    def budget(device, **keys):
        return budget_on(torch.device(device), Encoder(**keys))

    assert budget("cpu") == Budget(2048, 12288)
    assert budget("cuda") == Budget(16384, 65536)
    assert budget("cpu", micro_batch_tokens=512, activation_tokens=50000) == Budget(512, 50000)
    assert budget("cuda", micro_batch_tokens=512, activation_tokens=100) == Budget(512, 100)


def test_nothing_to_encode_is_refused():
    with pytest.raises(ValueError, match="no texts"):
        encode_token_lists(lambda ids, mask: ids, [], pad_id=0, budget=4, device="cpu")
