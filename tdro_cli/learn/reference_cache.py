"""Reference losses on disk: a function of the reference model and the texts, so none is computed twice.

One SQLite file for all reference models. Safe to delete, shared by concurrent runs, bounded.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tdro_cli.data.tokenization import TokenIds

OPEN_TRIES = 200  # at 50 ms
MAX_ROWS = 20_000_000  # about 1.2 GB


def loss_key(query: TokenIds, passages: Iterable[TokenIds], *, model: bytes = b"") -> bytes:
    """16 bytes that name a query with its ordered passages, by their token ids, and the model (at most 64 bytes)."""
    digest = hashlib.blake2b(digest_size=16, key=model)
    for tokens in (query, *passages):
        digest.update(len(tokens).to_bytes(4, "little"))
        digest.update(np.asarray(tokens, dtype=np.int32).tobytes())
    return digest.digest()


class ReferenceCache:
    """Losses in nats, float32, by `loss_key`. A damaged entry is as good as none; a damaged file is begun anew.

    Where no file can be had the losses are kept in memory: the cache spares work, and never costs a run.
    """

    def __init__(self, path: Path, *, max_rows: int = MAX_ROWS):
        self.path, self.max_rows = path, max_rows
        self._database = self._open_or_renew()

    def _open_or_renew(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return _open(self.path)
            except sqlite3.OperationalError:
                raise  # locked, no room, not writable: the file may be sound
            except sqlite3.DatabaseError:
                self._remove()
                return _open(self.path)
        except (OSError, sqlite3.DatabaseError):
            return _open(":memory:")

    def _remove(self) -> None:
        for name in (self.path.name, f"{self.path.name}-wal", f"{self.path.name}-shm"):
            self.path.with_name(name).unlink(missing_ok=True)

    def _after(self, error: sqlite3.DatabaseError) -> None:
        """What can be done after a failure: a damaged file makes way, else the losses are only computed again."""
        if not isinstance(error, sqlite3.OperationalError):
            self._database.close()
            with contextlib.suppress(OSError):
                self._remove()
            self._database = self._open_or_renew()
        elif self._database.in_transaction:
            self._database.execute("ROLLBACK")

    def look_up(self, keys: Sequence[bytes]) -> np.ndarray:
        """The losses of `keys`: [B] float32, NaN where there is none."""
        found = np.full(len(keys), np.nan, dtype=np.float32)
        places: dict[bytes, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, []).append(place)
        distinct = list(places)
        try:
            for start in range(0, len(distinct), 500):
                part = distinct[start : start + 500]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, loss, checksum FROM losses WHERE key IN ({marks})"
                for key, loss, checksum in self._database.execute(query, part):
                    if checksum == _checksum(key, loss):
                        found[places[key]] = loss
        except sqlite3.DatabaseError as error:
            self._after(error)
            return np.full(len(keys), np.nan, dtype=np.float32)
        return found

    def store(self, keys: Sequence[bytes], losses: np.ndarray) -> None:
        """Adds losses, in place of damaged entries."""
        rows = [(key, float(loss), _checksum(key, float(loss))) for key, loss in zip(keys, losses, strict=True)]
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR REPLACE INTO losses VALUES (?, ?, ?)", rows)
            self._database.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            self._after(error)

    def __len__(self) -> int:
        return self._database.execute("SELECT count(*) FROM losses").fetchone()[0]

    def close(self) -> None:
        """Keeps the file within `max_rows`: beyond it, a tenth more than the excess goes."""
        try:
            excess = len(self) - self.max_rows
            if excess > 0:
                doomed = excess + self.max_rows // 10
                self._database.execute("DELETE FROM losses WHERE key IN (SELECT key FROM losses LIMIT ?)", (doomed,))
        except sqlite3.DatabaseError:
            pass  # nothing of value is lost
        self._database.close()


def _open(path: Path | str) -> sqlite3.Connection:
    # used by one thread at a time, but not always by the one that made it
    database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    try:
        _write_ahead(database)
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute(
            "CREATE TABLE IF NOT EXISTS losses (key BLOB PRIMARY KEY, loss REAL, checksum INTEGER) WITHOUT ROWID"
        )
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


def _write_ahead(database: sqlite3.Connection) -> None:
    """Write-ahead logging. SQLite does not wait here: of two that open a new file at once, one must try again."""
    for _ in range(OPEN_TRIES - 1):
        try:
            database.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            time.sleep(0.05)
    database.execute("PRAGMA journal_mode=WAL")


def _checksum(key: bytes, loss: float) -> int:
    return zlib.crc32(key + np.float64(loss).tobytes())
