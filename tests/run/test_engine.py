from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from tdro_cli.artifacts import checkpoints_in  # noqa: E402
from tdro_cli.errors import RunFailed, TdroError  # noqa: E402
from tdro_cli.recipe import Optimizer  # noqa: E402
from tdro_cli.run.distributed import World  # noqa: E402
from tdro_cli.run.engine import (  # noqa: E402
    Engine,
    damage,
    deepspeed_config,
    keep_newest,
    parameter_groups,
    seed_everything,
)

ALONE = World(0, 1, torch.device("cpu"))


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def test_any_key_of_deepspeed_can_be_set_over_the_generated_ones():
    given = {
        "zero_stage": 2,
        "zero_optimization": {"overlap_comm": True},
        "gradient_clipping": 0.5,
        "wall_clock_breakdown": True,
    }
    config = deepspeed_config(given, Optimizer(max_grad_norm=1.0), 4)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert (config["gradient_clipping"], config["train_batch_size"], config["wall_clock_breakdown"]) == (0.5, 4, True)
    assert deepspeed_config({}, Optimizer(max_grad_norm=1.0), 1)["gradient_clipping"] == 1.0
    assert given["zero_stage"] == 2  # left as it was


def test_weight_decay_spares_biases_and_norms():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[0].weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(3, 0.0)]
    groups = parameter_groups(nn.Linear(3, 2), 0.1)
    assert [(group["params"][0].ndim, group["weight_decay"]) for group in groups] == [(2, 0.1), (1, 0.0)]


def test_an_engine_starts_where_a_killed_compilation_left_its_lock(tmp_path):
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    start = (
        "import torch; from tdro_cli.recipe import Optimizer; from tdro_cli.run.distributed import World;"
        "from tdro_cli.run.engine import Engine;"
        "Engine(torch.nn.Linear(3, 2), Optimizer(), {}, World(0, 1, torch.device('cpu')))"
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", start], env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["deepspeed_shm_comm"]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_gradients_of_several_backward_passes_add_up_and_are_clipped_once(zero_stage):
    model, plain = linear(), linear()
    optimizer = Optimizer(learning_rate=0.1, weight_decay=0.0, max_grad_norm=0.5)
    engine = Engine(model, optimizer, {"zero_stage": zero_stage}, ALONE)
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    x = torch.arange(6.0).reshape(2, 3)
    for _ in range(2):
        engine.backward(engine(x[:1]).square().sum(), last=False)
        engine.backward(engine(x[1:]).square().sum(), last=True)
        norm = engine.step(0.1)
        adamw.zero_grad()
        plain(x).square().sum().backward()
        expected = float(nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        adamw.step()
        assert norm == pytest.approx(expected, rel=1e-5)
    with engine.whole_weights():
        torch.testing.assert_close(model.weight.detach(), plain.weight.detach(), rtol=1e-4, atol=1e-5)


def test_without_a_limit_nothing_is_clipped_and_the_norm_is_told():
    engine = Engine(linear(), Optimizer(max_grad_norm=None), {}, ALONE)
    engine.backward(1e6 * engine(torch.ones(1, 3)).sum(), last=True)
    assert engine.step(0.0) == pytest.approx(1e6 * (2 * 3 + 2) ** 0.5)


def test_the_learning_rate_is_that_of_the_step():
    model = linear()
    engine = Engine(model, Optimizer(learning_rate=1.0, weight_decay=0.0), {}, ALONE)
    for rate in (0.0, 0.25):
        before = model.bias.detach().clone()
        engine.backward(engine(torch.ones(1, 3)).sum(), last=True)
        engine.step(rate)
        assert (before - model.bias.detach()).tolist() == pytest.approx([rate, rate], abs=1e-5)


def trained(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.rand(4, 3)).square().sum(), last=True)
        engine.step(0.1)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_checkpoint_brings_back_model_optimizer_random_numbers_and_state(zero_stage, tmp_path):
    def fresh(seed: int) -> Engine:
        engine = Engine(linear(seed), Optimizer(), {"zero_stage": zero_stage}, ALONE)
        seed_everything(seed, 0)
        return engine

    def end(engine: Engine) -> list[float]:
        trained(engine, 3)
        with engine.whole_weights():
            return engine.module.weight.detach().flatten().tolist()

    engine = fresh(0)
    trained(engine, 2)
    engine.save(tmp_path / "step-000002", {"step": 2, "seen": torch.tensor([4, 5])})
    expected = end(engine)
    other = fresh(1)
    state = other.load(tmp_path / "step-000002")
    assert state["step"] == 2 and state["seen"].tolist() == [4, 5]
    assert end(other) == expected


def moved_by(deepspeed: dict, steps: int = 2, **options) -> torch.Tensor:
    """The weights after some steps on fixed input."""
    engine = Engine(linear(), Optimizer(weight_decay=0.0, **options), deepspeed, ALONE)
    engine.train()
    for _ in range(steps):
        dtype = next(engine.module.parameters()).dtype
        engine.backward(engine(torch.arange(6.0).reshape(2, 3).to(dtype)).float().square().sum(), last=True)
        engine.step(0.1)
    with engine.whole_weights():
        return engine.module.weight.detach().float().clone()


OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_optimizer_offloaded_to_the_cpu_takes_the_same_steps(zero_stage):
    found = moved_by({"zero_stage": zero_stage, "zero_optimization": OFFLOADED})
    torch.testing.assert_close(found, moved_by({}), rtol=1e-5, atol=1e-6)


def test_deepspeeds_own_optimizer_may_be_chosen():
    own = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "weight_decay": 0.0}}}
    torch.testing.assert_close(moved_by(own), moved_by({}), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_weights_with_float32_copies_move_as_in_float32_but_for_rounding(zero_stage):
    found = moved_by({"zero_stage": zero_stage, "bf16": {"enabled": True}})
    torch.testing.assert_close(found, moved_by({}), rtol=0.02, atol=0.02)


def test_fp16_on_a_cpu_and_keys_that_deepspeed_refuses_are_faults_of_the_recipe():
    with pytest.raises(TdroError, match="fp16 needs a GPU"):
        moved_by({"fp16": {"enabled": True}})
    for wrong in ({"zero_optimization": {"stgae": 2}}, {"zero_optimization": {"reduce_bucket_size": -5}}):
        with pytest.raises(TdroError, match="DeepSpeed refuses") as fault:
            moved_by({"zero_stage": 1, **wrong})
        assert fault.value.where == "deepspeed" and fault.value.exit_code == 2


def checkpoint(tmp_path):
    engine = Engine(linear(), Optimizer(), {}, ALONE)
    engine.save(tmp_path / "step-000007", {"step": 7})
    return tmp_path / "step-000007"


def test_a_sound_checkpoint_has_no_damage_and_every_file_is_watched(tmp_path):
    folder = checkpoint(tmp_path)
    assert damage(folder) is None
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) >= 2
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert damage(folder) == f"{path} is not the file that was written"
        path.unlink()
        assert damage(folder) == f"{path} is missing"
        path.write_bytes(content)
    assert damage(folder) is None
    (folder / "manifest.json").write_text("[]")
    assert damage(folder) == "manifest.json can't be read"


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    folder = checkpoint(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "ranks": 4}))
    with pytest.raises(RunFailed, match="was written by 4 processes and can't be continued by 1") as refused:
        Engine(linear(), Optimizer(), {}, ALONE).load(folder)
    assert "run with 4 processes again" in refused.value.remedy


def test_only_whole_checkpoints_count_and_the_newest_are_kept(tmp_path):
    for step in (2, 10, 999_999, 1_000_000):
        (tmp_path / f"step-{step:06d}").mkdir()
        if step != 10:
            (tmp_path / f"step-{step:06d}" / "manifest.json").write_text("{}")
    (tmp_path / ".step-000012.partial").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-1000000", "step-999999", "step-000002"]
    keep_newest(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1000000"]


def test_a_copy_of_a_checkpoint_is_neither_read_nor_removed(tmp_path):
    for name in ("step-000002", "step-000002-copy", "step-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-000002"]
    keep_newest(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 3


def test_random_numbers_differ_between_ranks_and_not_between_runs():
    drawn = []
    for rank in (0, 1, 0):
        seed_everything(5, rank)
        drawn.append(torch.rand(2).tolist())
    assert drawn[0] == drawn[2] != drawn[1]


def test_deepspeed_keeps_quiet_and_leaves_no_place_in_the_environment(capfd, monkeypatch):
    import os

    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    Engine(linear(), Optimizer(), {}, ALONE)
    assert capfd.readouterr().out == ""
    assert logging.getLogger("DeepSpeed").level == logging.ERROR
    assert "MASTER_PORT" not in os.environ and "WORLD_SIZE" not in os.environ
