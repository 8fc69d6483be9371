from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
from tdro_cli.run.distributed import World, join  # noqa: E402
from tdro_cli.run.signals import STOPPING, Interruption, StopWish  # noqa: E402


def test_a_process_alone_exchanges_nothing():
    world = World(0, 1, torch.device("cpu"))
    value = torch.tensor([[1.0], [2.0]])
    assert world.leads and world.gather(value) is value and world.total(value) is value
    assert world.most(7) == 7 and world.sums(3, 4) == [3, 4]
    world.barrier()


def test_without_a_launcher_a_process_is_alone_on_the_cpu(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    world = join()
    assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))


def test_ranks_with_unequal_and_with_no_rows_gather_in_rank_order(tmp_path):
    program = """
import sys, torch, torch.distributed as dist
from tdro_cli.run.distributed import World
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
world = World(rank, 2, torch.device("cpu"))
rows = torch.arange(6).reshape(3, 2)[: 3 if rank else 0]
assert world.gather(rows).tolist() == [[0, 1], [2, 3], [4, 5]]
assert world.gather(torch.full((1 + rank,), rank)).tolist() == [0, 1, 1]
assert world.most(10 - rank) == 10
assert world.sums(1, rank) == [2, 1]
assert world.total(torch.tensor([0.5, rank])).tolist() == [1.0, 1.0]
world.barrier()
dist.destroy_process_group()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "meet")]
    ranks = [subprocess.Popen([*command, str(rank)], env={**os.environ, "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


def test_the_first_signal_is_a_wish_and_the_second_an_end():
    before = signal.getsignal(signal.SIGINT)
    with StopWish() as wish:
        assert not wish.uttered
        os.kill(os.getpid(), signal.SIGINT)
        assert wish.uttered
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_interrupts_and_is_remembered(number):
    handler = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
            assert not interruption.happened
            os.kill(os.getpid(), number)
            time.sleep(1)
        assert interruption.happened and signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, handler)


def test_what_is_ignored_stays_ignored():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
        assert not interruption.happened
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells a child that its parent is gone")
def test_a_child_ends_with_its_parent(tmp_path):
    parent = """
import subprocess, sys
from tdro_cli.run.signals import die_with_parent
child = subprocess.Popen(["sleep", "60"], preexec_fn=die_with_parent)
print(child.pid, flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    for _ in range(100):
        try:
            state = open(f"/proc/{child}/stat").read().split()[2]  # noqa: SIM115
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")
