from __future__ import annotations

import sqlite3
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tdro_cli.learn.reference_cache import ReferenceCache, loss_key

KEYS = [loss_key([i], [[1, 2], [3]]) for i in range(1200)]
TOKENS = st.lists(st.integers(0, 200_000), max_size=5)


def test_a_stored_loss_comes_back_with_its_bits_and_others_are_nan(tmp_path):
    cache = ReferenceCache(tmp_path / "deep" / "losses.sqlite")
    losses = np.array([0.1, 1e-8, 3.25], dtype=np.float32)
    cache.store(KEYS[:3], losses)
    found = cache.look_up([KEYS[2], KEYS[5], KEYS[0], KEYS[2]])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([3.25, np.nan, losses[0], 3.25], dtype=np.float32))


def test_losses_outlive_the_process_that_stored_them(tmp_path):
    first = ReferenceCache(tmp_path / "losses.sqlite")
    first.store(KEYS, np.arange(1200, dtype=np.float32))
    first.close()
    np.testing.assert_array_equal(ReferenceCache(tmp_path / "losses.sqlite").look_up(KEYS), np.arange(1200))


@given(TOKENS, st.lists(TOKENS, max_size=4), TOKENS, st.lists(TOKENS, max_size=4))
def test_a_key_names_one_query_with_its_ordered_passages(query, passages, other, others):
    same = (query, passages) == (other, others)
    assert (loss_key(query, passages) == loss_key(other, others)) == same


def test_the_boundary_between_query_and_passages_counts():
    assert loss_key([1], [[2, 3]]) != loss_key([1, 2], [[3]]) != loss_key([1], [[2], [3]])


def test_another_model_has_other_keys():
    assert loss_key([1], [[2]], model=b"a") != loss_key([1], [[2]], model=b"b")


def test_an_entry_whose_loss_was_changed_is_as_good_as_none(tmp_path):
    cache = ReferenceCache(tmp_path / "losses.sqlite")
    cache.store(KEYS[:2], np.array([1.0, 2.0], dtype=np.float32))
    cache.close()
    with sqlite3.connect(tmp_path / "losses.sqlite") as database:
        database.execute("UPDATE losses SET loss = 7.0 WHERE key = ?", (KEYS[0],))
    again = ReferenceCache(tmp_path / "losses.sqlite")
    np.testing.assert_array_equal(again.look_up(KEYS[:2]), [np.nan, 2.0])
    again.store(KEYS[:1], np.array([1.0], dtype=np.float32))
    np.testing.assert_array_equal(again.look_up(KEYS[:2]), [1.0, 2.0])


def test_a_file_that_is_no_database_is_begun_anew(tmp_path):
    (tmp_path / "losses.sqlite").write_bytes(b"what is this" * 1000)
    cache = ReferenceCache(tmp_path / "losses.sqlite")
    assert len(cache) == 0
    cache.store(KEYS[:1], np.array([1.0], dtype=np.float32))
    cache.close()
    assert ReferenceCache(tmp_path / "losses.sqlite").look_up(KEYS[:1]) == 1.0


def test_a_file_damaged_inside_costs_its_content_and_is_usable_again(tmp_path):
    path = tmp_path / "losses.sqlite"
    cache = ReferenceCache(path)
    cache.store(KEYS, np.ones(1200, dtype=np.float32))
    cache.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    damaged = ReferenceCache(path)
    assert np.isnan(damaged.look_up(KEYS)).all()
    damaged.store(KEYS[:2], np.ones(2, dtype=np.float32))
    np.testing.assert_array_equal(damaged.look_up(KEYS[:3]), [1.0, 1.0, np.nan])


def test_deleting_the_file_under_a_run_does_no_harm(tmp_path):
    cache = ReferenceCache(tmp_path / "losses.sqlite")
    cache.store(KEYS[:1], np.ones(1, dtype=np.float32))
    for path in tmp_path.iterdir():
        path.unlink()
    cache.look_up(KEYS[:2])
    cache.store(KEYS[1:2], np.ones(1, dtype=np.float32))
    cache.close()
    assert np.isnan(ReferenceCache(tmp_path / "losses.sqlite").look_up(KEYS[:2])).all()


def test_where_no_file_can_be_had_losses_are_kept_in_memory(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cache = ReferenceCache(tmp_path / "file" / "losses.sqlite")
    cache.store(KEYS[:1], np.ones(1, dtype=np.float32))
    assert cache.look_up(KEYS[:1]) == 1.0


def test_closing_keeps_the_file_within_its_bound(tmp_path):
    cache = ReferenceCache(tmp_path / "losses.sqlite", max_rows=1000)
    cache.store(KEYS, np.ones(1200, dtype=np.float32))
    cache.close()
    assert len(ReferenceCache(tmp_path / "losses.sqlite")) == 900


def test_two_processes_can_write_at_once(tmp_path):
    script = """
import sys, numpy as np
from tdro_cli.learn.reference_cache import ReferenceCache, loss_key
cache, parity = ReferenceCache(__import__("pathlib").Path(sys.argv[1])), int(sys.argv[2])
for i in range(parity, 1200, 2):
    cache.store([loss_key([i], [[1, 2], [3]])], np.array([i], dtype=np.float32))
"""
    path = tmp_path / "losses.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), str(parity)]) for parity in (0, 1)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    np.testing.assert_array_equal(ReferenceCache(path).look_up(KEYS), np.arange(1200))
