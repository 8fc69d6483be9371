"""All that knows DeepSpeed: one engine trains in every case, one process or many, CPU or GPU."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdro_cli import artifacts
from tdro_cli.errors import RunFailed, TdroError
from tdro_cli.recipe import Optimizer
from tdro_cli.run import timing
from tdro_cli.run.distributed import World

DEEPSPEED_BUCKET = 500_000_000  # elements of its buffer for reducing gradients: 2 GB, however small the model
NO_CLIPPING = 1e30  # a threshold that never binds, but makes DeepSpeed take the gradient norm


def deepspeed_config(given: Mapping[str, Any], optimizer: Optimizer, world_size: int) -> dict[str, Any]:
    """The generated configuration with the recipe's keys merged over it; `zero_stage` stands for the long form."""
    given = dict(given)
    stage = given.pop("zero_stage", 0)
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # micro-batches are cut by tokens; losses are normalised by us
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": optimizer.max_grad_norm or NO_CLIPPING,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also updates what is offloaded to the CPU
    }
    return _merge(generated, given)


def _require_precision(config: Mapping[str, Any], device: torch.device) -> None:
    """Raises TdroError for float16 on a CPU, where DeepSpeed would train on without a word."""
    if config.get("fp16", {}).get("enabled") and device.type == "cpu":
        raise TdroError("fp16 needs a GPU", where="deepspeed.fp16", remedy="set bf16, or run on a GPU")


@contextlib.contextmanager
def _told_as_recipe_faults() -> Iterator[None]:
    """What DeepSpeed refuses is a fault of the recipe's section `deepspeed`."""
    try:
        yield
    except (ValueError, AssertionError, TypeError, KeyError, NotImplementedError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise TdroError(
            f"DeepSpeed refuses its configuration: {words[:400]}",
            where="deepspeed",
            remedy="mend or remove the keys there; without any, training works",
        ) from error


def is_mixed(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed itself keeps the weights in half precision, beside float32 copies."""
    return any(config.get(kind, {}).get("enabled") for kind in ("fp16", "bf16"))


def reduce_bucket(zero: Mapping[str, Any], trainable: int) -> int:
    """Elements of the buffer for reducing gradients: the recipe's, else no more than there are."""
    return int(zero.get("reduce_bucket_size", min(DEEPSPEED_BUCKET, trainable)))


def _merge(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


class Engine:
    """A model in training. Gradients are sums over all ranks of what `backward` was given."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, deepspeed: Mapping[str, Any], world: World):
        self.world = world
        engine = _import_deepspeed(world)
        config = deepspeed_config(deepspeed, optimizer, world.size)
        _require_precision(config, world.device)
        zero = config["zero_optimization"]
        # without ZeRO and mixed precision DeepSpeed would clip, but keep the norm to itself: then it is done here
        self._max_grad_norm = None if is_mixed(config) or zero["stage"] else config["gradient_clipping"]
        if self._max_grad_norm is not None:
            config["gradient_clipping"] = 0.0
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        zero["reduce_bucket_size"] = reduce_bucket(zero, sum(parameter.numel() for parameter in self._trainable))
        groups = parameter_groups(module, optimizer.weight_decay)
        if "optimizer" in config:  # DeepSpeed makes it
            with _told_as_recipe_faults():
                self._engine, *_ = engine.initialize(model=module, model_parameters=groups, config=config)
        else:
            first, second = optimizer.betas
            adamw = torch.optim.AdamW(
                groups, lr=optimizer.learning_rate, betas=(first, second), eps=optimizer.eps, fused=True
            )
            with _told_as_recipe_faults():
                self._engine, *_ = engine.initialize(model=module, optimizer=adamw, config=config)
        self.zero_stage = self._engine.zero_optimization_stage()
        self.skips_steps = self._engine.fp16_enabled()  # after an overflow, which lowers the loss scale

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def __call__(self, *inputs: Any) -> Any:
        with timing.part("forward"):
            return self._engine(*inputs)

    def train(self) -> None:
        self._engine.train()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`; with `last`, the next `step` applies the sum."""
        self._engine.set_gradient_accumulation_boundary(last)
        with timing.part("backward"):
            self._engine.backward(loss * self.world.size)  # DeepSpeed averages over ranks

    def step(self, learning_rate: float) -> float | None:
        """Applies the gradient; returns its L2 norm before clipping (None: DeepSpeed does not tell)."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        with timing.part("optimizer"):
            norm = None if self._max_grad_norm is None else self._clip(self._max_grad_norm)
            self._engine.step()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return None if norm is None else float(norm)

    def _clip(self, max_norm: float) -> Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._trainable if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(self._trainable, max_norm, norm)
        return norm

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, the first rank sees all parameters, also where ZeRO 3 has scattered them. Every rank must enter."""
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=None):
            yield

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        """A checkpoint that exists only when whole. `state`: what to carry beside the model, equal on all ranks."""
        aside = folder.with_name(f".{folder.name}.partial")
        if self.world.leads:
            remove(aside)
            aside.mkdir(parents=True)
        self.world.barrier()
        try:
            self._engine.save_checkpoint(str(aside), tag="engine", save_latest=False, exclude_frozen_parameters=True)
            torch.save({"random": _random_state(), "state": dict(state)}, aside / f"rank-{self.world.rank}.pt")
        except Exception:
            remove(aside)  # the disk may be full
            raise
        self.world.barrier()
        if self.world.leads:
            digests = {
                str(p.relative_to(aside)): artifacts.digest_file(p) for p in sorted(aside.rglob("*")) if p.is_file()
            }
            artifacts.write_json(aside / artifacts.MANIFEST, {"ranks": self.world.size, "files": digests})
            remove(folder)
            os.rename(aside, folder)
        self.world.barrier()

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores the engine and the random state; returns what `save` was given as `state` on this rank.

        Raises RunFailed if another number of processes wrote the checkpoint.
        """
        ranks = artifacts.manifest_of(folder)["ranks"]
        if ranks != self.world.size:
            raise RunFailed(
                f"the checkpoint was written by {_processes(ranks)} and can't be continued by {self.world.size}",
                where=str(folder),
                remedy=f"run with {_processes(ranks)} again, or remove the folder checkpoints to start over",
            )
        self._engine.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
        saved = torch.load(folder / f"rank-{self.world.rank}.pt", weights_only=True)
        _restore_random_state(saved["random"])
        return saved["state"]


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where its files are those that were written."""
    try:
        files = dict(artifacts.manifest_of(folder)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{artifacts.MANIFEST} can't be read"
    return next(artifacts.file_faults(folder, files), None)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def keep_newest(folder: Path, count: int) -> None:
    """Removes whole checkpoints but the `count` newest, and what is left of ones that a kill cut short."""
    whole = artifacts.checkpoints_in(folder)
    halves = [path for path in artifacts.checkpoint_folders(folder) if path not in whole]
    for path in [*whole[count:], *halves, *folder.glob(".step-*.partial")]:
        remove(path)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters, with weight decay on matrices only: none on biases and norms."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def seed_everything(seed: int, rank: int) -> None:
    """Dropout and the like: another stream on every rank."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def _random_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed with its process group made, saying only what is wrong."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # calls of DeepSpeed's
        if not torch.distributed.is_initialized():
            # a process alone needs no port, and leaves nothing in the environment of those that it starts
            alone: dict[str, Any] = {}
            if world.size == 1:
                alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
            torch.distributed.init_process_group(backend, **alone)
            atexit.register(_leave)
        if world.device.type == "cpu":
            # else it compiles a collective of its own at the first start, a minute, under a lock that a kill leaves for
            # ever: every later run of this user would wait for it without end
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(backend, verbose=False)
    return deepspeed


def _leave() -> None:
    # else gloo's threads are torn down with the interpreter, which ends a process that has done its work by a signal
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
