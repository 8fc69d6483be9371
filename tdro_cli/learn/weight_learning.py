"""learn-weights: the proxy trains, the reference stands still, the task weights follow the loss measurement.

B queries of the global batch, b of a micro-batch, N passages per query, D embedding size, G tasks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdro_cli import artifacts, registry
from tdro_cli.data.batching import Batch, BatchPlan, assemble, drawn_counts
from tdro_cli.data.collation import TokenBatch
from tdro_cli.data.loading import Arriving, Collation, num_workers
from tdro_cli.data.tokenization import TokenIds
from tdro_cli.errors import RunFailed, TdroError
from tdro_cli.learn.contrastive import per_query_infonce
from tdro_cli.learn.dro import (
    WeightState,
    drift_over_noise,
    effective_tasks,
    learned_weights,
    query_weights,
    squared_norm_share,
    standard_error,
    start_weights,
    update_weights,
)
from tdro_cli.learn.gradient_cache import backward, forward
from tdro_cli.learn.reference_cache import ReferenceCache, loss_key
from tdro_cli.learn.task_gradients import gradient_products, watched_parameters
from tdro_cli.learn.training import (
    Run,
    backbone_source,
    load_encoder,
    require_queries,
    training_tasks,
)
from tdro_cli.model.encoder import TextEncoder
from tdro_cli.model.packing import Budget, budget_on, encode_token_lists
from tdro_cli.protocols import GradientUpdater, TaskLosses
from tdro_cli.recipe import Recipe, Stop
from tdro_cli.report.live import weights_view
from tdro_cli.run import timing
from tdro_cli.run.distributed import World
from tdro_cli.run.engine import Engine, seed_everything
from tdro_cli.run.plan import Plan
from tdro_cli.run.progress import Progress


@dataclass(eq=False)
class QueryLosses:
    """Losses [b] of some of a batch's queries (`rows`), tokens with and without padding."""

    rows: np.ndarray
    loss_B: Tensor
    tokens: int
    computed: int


def micro_batches(batch: TokenBatch, activation_tokens: int, chosen: np.ndarray | None = None) -> list[np.ndarray]:
    """Queries with their passages, longest first, cut so that the activations of each part fit.

    `chosen`: indices of the queries meant; all when None.
    """
    length_M = np.array([len(tokens) for tokens in batch.passages])
    cost_B = np.array([len(tokens) for tokens in batch.queries]) + np.add.reduceat(length_M, batch.first_B)
    chosen = np.arange(len(cost_B)) if chosen is None else chosen
    parts: list[np.ndarray] = []
    part: list[int] = []
    cost = 0
    for query in chosen[np.argsort(-cost_B[chosen], kind="stable")]:
        if part and cost + cost_B[query] > activation_tokens:
            parts.append(np.array(part))
            part, cost = [], 0
        part.append(query)
        cost += cost_B[query]
    return [*parts, np.array(part)] if part else parts


def query_losses(
    model: Any,
    batch: TokenBatch,
    rows: np.ndarray,
    *,
    pad_id: int,
    temperature: float,
    tokens_at_once: int,
    device: Any,
) -> QueryLosses:
    """InfoNCE of the queries `rows` over their own passages; with a graph where gradients are enabled."""
    texts = texts_of(batch, rows)
    packed = encode_token_lists(model, texts, pad_id=pad_id, budget=tokens_at_once, device=device)
    loss_B = losses_of_embeddings(packed.embedding_ND, batch, rows, temperature)
    return QueryLosses(rows, loss_B, packed.tokens, packed.tokens + packed.padded_tokens)


def texts_of(batch: TokenBatch, rows: np.ndarray) -> list[TokenIds]:
    """The queries `rows`, then the passages of each in turn."""
    passages = [i for row in rows for i in range(batch.first_B[row], batch.first_B[row] + batch.count_B[row])]
    return [batch.queries[row] for row in rows] + [batch.passages[i] for i in passages]


def losses_of_embeddings(embedding_ND: Tensor, batch: TokenBatch, rows: np.ndarray, temperature: float) -> Tensor:
    """InfoNCE [b] of the queries `rows`, from the embeddings of `texts_of` them."""
    count_b, device = batch.count_B[rows], embedding_ND.device
    after_b = len(rows) + np.cumsum(count_b) - count_b
    place_bN = after_b[:, None] + np.arange(count_b.max())
    mask_bN = np.arange(count_b.max()) < count_b[:, None]
    passage_bND = embedding_ND[torch.from_numpy(np.where(mask_bN, place_bN, 0)).to(device)]
    mask = torch.from_numpy(mask_bN).to(device)
    return per_query_infonce(embedding_ND[: len(rows)], passage_bND, temperature, mask_BN=mask)


class Reference:
    """The frozen reference model: losses out of the cache where they are, else computed and kept."""

    def __init__(self, plan: Plan, recipe: Recipe, pad_id: int, world: World):
        self.recipe, self.pad_id, self.world = recipe, pad_id, world
        self.forwards = 0  # queries computed
        self.hits = 0
        self._source = plan.input("train-ref") / "model"
        files = artifacts.manifest_of(self._source.parent)["files"]
        identity = {
            "model": {name: files[name] for name in files if name.startswith("model/") and not name.endswith(".md")},
            "encoder": recipe.encoder.numbers(),
            "dtype": recipe.backbone.dtype,
            "device": world.device.type,
        }
        self._identity = bytes.fromhex(artifacts.digest_of(identity))
        self.cache = ReferenceCache(Path(plan.cache) / "reference_losses.sqlite")
        self._encoder: TextEncoder | None = None

    def losses(self, batch: TokenBatch) -> np.ndarray:
        """[B] float32 for this rank's queries."""
        keys = [
            loss_key(query, batch.passages[first : first + count], model=self._identity)
            for query, first, count in zip(batch.queries, batch.first_B, batch.count_B, strict=True)
        ]
        known_B = self.cache.look_up(keys)
        missing_B = np.isnan(known_B)
        self.hits += int((~missing_B).sum())
        if missing_B.any():
            # all of the batch, so that a loss has the same bits whatever else was cached
            computed_B = self._compute(batch)
            self.cache.store([keys[i] for i in np.flatnonzero(missing_B)], computed_B[missing_B])
            known_B = np.where(missing_B, computed_B, known_B)
        return known_B

    def _compute(self, batch: TokenBatch) -> np.ndarray:
        if self._encoder is None:
            self._encoder = _load_reference(self.recipe, self._source).to(self.world.device)
        self.forwards += len(batch.queries)
        section, budget = self.recipe.encoder, budget_on(self.world.device, self.recipe.encoder)
        loss_B = np.empty(len(batch.queries), dtype=np.float32)
        with torch.inference_mode():
            for rows in micro_batches(batch, budget.activation_tokens):
                part = query_losses(
                    self._encoder,
                    batch,
                    rows,
                    pad_id=self.pad_id,
                    temperature=section.temperature,
                    tokens_at_once=budget.micro_batch_tokens,
                    device=self.world.device,
                )
                loss_B[rows] = part.loss_B.float().cpu().numpy()
        return loss_B


def _load_reference(recipe: Recipe, folder: Path) -> TextEncoder:
    backbone = recipe.backbone
    loaded = registry.resolve("backbones", "auto").load(str(folder), dtype=backbone.dtype, attention=backbone.attention)
    encoder = TextEncoder(
        loaded.model, pooling=recipe.encoder.pooling, normalize=recipe.encoder.normalize, autocast=backbone.dtype
    )
    return encoder.eval().requires_grad_(False)


class LossLog:
    """Every query's losses, [steps, B] records in one file of fixed size: a step run again overwrites its own."""

    RECORD = np.dtype([("task", "<i4"), ("row", "<i8"), ("proxy", "<f4"), ("reference", "<f4")])

    def __init__(self, path: Path, steps: int, queries: int):
        self.path, self.shape = path, (steps, queries)
        if not path.exists() or path.stat().st_size != steps * queries * self.RECORD.itemsize:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(steps * queries * self.RECORD.itemsize)

    def write(
        self, step: int, task_B: np.ndarray, row_B: np.ndarray, proxy_B: Tensor, reference_B: Tensor | None
    ) -> None:
        records = np.zeros(len(task_B), dtype=self.RECORD)
        records["task"], records["row"], records["proxy"] = task_B, row_B, proxy_B.numpy()
        records["reference"] = np.nan if reference_B is None else reference_B.numpy()
        with open(self.path, "r+b") as file:
            file.seek(step * records.nbytes)
            file.write(records.tobytes())

    def read(self) -> np.ndarray:
        """[steps, B] records, memory-mapped."""
        return np.memmap(self.path, dtype=self.RECORD, mode="r", shape=self.shape)


def task_losses(records_B: np.ndarray, num_tasks: int, parts: int) -> TaskLosses:
    """One step of the log as measurements take it."""
    reference_B = torch.from_numpy(records_B["reference"].copy())
    return TaskLosses(
        proxy=torch.from_numpy(records_B["proxy"].copy()),
        reference=None if bool(reference_B.isnan().any()) else reference_B,
        task=torch.from_numpy(records_B["task"].astype(np.int64)),
        num_tasks=num_tasks,
        micro_batch=part_of(len(records_B), parts),
    )


def part_of(queries: int, parts: int) -> Tensor | None:
    """Which of the batch's equal parts each query is in: [B] int64; None for a single part."""
    return None if parts == 1 else torch.arange(queries) * parts // queries


def learn_weights(plan: Plan, world: World, progress: Progress) -> None:
    """Runs the stage and publishes weights.json, losses.parquet and trajectory.parquet."""
    recipe = plan.settings()
    section = recipe.learn_weights
    require_queries(world, section.batch.queries)
    measurement = registry.resolve("loss_measurements", section.loss_measurement.name, section.loss_measurement.options)
    updater = registry.resolve("weight_updaters", section.weight_updater.name, section.weight_updater.options)
    seed_everything(recipe.seed, world.rank)
    rows = "held_out" if section.rows == "held_out" and recipe.train_ref.hold_out > 0 else "all"
    tasks = training_tasks(plan, rows, need_negatives=True)
    encoder, tokenizer = load_encoder(recipe, backbone_source(plan))
    engine = Engine(encoder, section.optimizer, recipe.deepspeed, world)
    engine.train()
    needs_reference = getattr(measurement, "needs_reference", True)
    reference = Reference(plan, recipe, tokenizer.pad_id, world) if needs_reference else None
    uniform_G = torch.full((len(tasks),), 1 / len(tasks))
    batches = BatchPlan(
        seed=recipe.seed,
        queries=section.batch.queries,
        sizes=tuple(len(task.rows) for task in tasks),
        probabilities=tuple(uniform_G.double().tolist()),
        composition="mixed",
        draws=section.batch.draws,
    )
    run = Run(plan, world, engine, section.steps, section.optimizer, section.schedule, section.checkpoint, progress)
    step, saved = run.resume()
    if saved is None:
        sizes_G = torch.tensor([len(task.store) for task in tasks])
        state = start_weights(measurement, updater, uniform_G, sizes_G)
        seen_G, recent_SG = np.zeros(len(tasks), dtype=np.int64), uniform_G[None]
        counted = {"forwards": 0, "hits": 0, "seconds": 0.0}
    else:
        state, seen_G, counted = WeightState.from_plain(saved["weights"]), saved["seen"].numpy(), saved["counted"]
        recent_SG = saved["recent"]
    loss_file = Path(plan.folder) / "losses.bin"
    if world.leads and saved is not None and not loss_file.exists():
        raise RunFailed(
            "the log of the losses before this checkpoint is gone",
            where=str(loss_file),
            remedy="remove the folder checkpoints beside it to start over",
        )
    log = LossLog(loss_file, section.steps, section.batch.queries) if world.leads else None
    samples = getattr(updater, "samples", False)
    watched = _watched(engine, updater, recipe)
    negatives = section.batch.passages_per_query - 1
    collation = Collation(batches, tasks, tokenizer, world.rank, world.size, negatives, keep_texts=False)
    # what an updater that samples draws depends on the step before: nothing can be made ahead
    arriving = None if samples else Arriving(collation, range(step, section.steps), workers=num_workers(world))
    names = [task.name for task in tasks]

    def update(state: WeightState, losses: TaskLosses, own: TokenBatch, step: int) -> tuple[WeightState, Tensor]:
        _require_finite(run, step, losses, names)
        product_GG = None
        if watched:
            parts = _shares_of_mean_losses(engine, own, losses.counts(), recipe, tokenizer.pad_id)
            product_GG = gradient_products(parts, watched, len(tasks), world)
        try:
            return update_weights(
                state,
                measurement,
                updater,
                losses,
                progress=step / section.steps,
                absent_tasks=section.absent_tasks,
                product_GG=product_GG,
            )
        except ValueError as error:
            raise RunFailed(
                f"the weights can't be updated at step {step}: {error}", remedy="change the measurement"
            ) from error

    began, shown = time.monotonic(), None
    ending = contextlib.nullcontext() if arriving is None else contextlib.closing(arriving)
    with progress.start(plan.stage, section.steps, "steps") as bar, run, ending:
        bar.advance(step)
        while step < section.steps and not _only_noise(section.stop, recent_SG):
            step_began = time.monotonic()
            forwards_before = 0 if reference is None else reference.forwards
            weights_G = updater.weights(state.updater)
            if arriving is None:
                with timing.part("data"):
                    count_G = drawn_counts(batches, step, weights_G.double().tolist())
                    whole, own = collation.of(assemble(batches, step, count_G, seen_G))
                waited = time.monotonic() - step_began
            else:
                whole, own = next(arriving)
                waited = arriving.waited
            with timing.part("reference"):
                reference_B = None if reference is None else torch.from_numpy(reference.losses(own))
            if section.proxy_weights == "current":
                proxy_B, _, _ = _proxy_pass(engine, own, recipe, tokenizer.pad_id, None)
                losses = _pooled(world, whole, proxy_B, reference_B, len(tasks), section.batch.parts)
                state, seen_M = update(state, losses, own, step)
                scale_G = updater.weights(state.updater)
                _, tokens, computed = _proxy_pass(
                    engine, own, recipe, tokenizer.pad_id, _own_weights(whole, scale_G, world)
                )
            else:
                own_weights = _own_weights(whole, weights_G, world)
                proxy_B, tokens, computed = _proxy_pass(engine, own, recipe, tokenizer.pad_id, own_weights)
                losses = _pooled(world, whole, proxy_B, reference_B, len(tasks), section.batch.parts)
                state, seen_M = update(state, losses, own, step)
            applied = run.step(step)
            forwards = 0 if reference is None else reference.forwards - forwards_before
            tokens, computed, forwards = world.sums(tokens, computed, forwards)
            recent_SG = _with_newest(recent_SG, updater.weights(state.updater), section.stop)
            seen_G = seen_G + np.bincount(whole.task_B, minlength=len(tasks))
            if log is not None:
                file_rows = np.array([tasks[t].rows[r] for t, r in zip(whole.task_B, whole.row_B, strict=True)])
                log.write(step, whole.task_B, file_rows, losses.proxy, losses.reference)
            metrics = _metrics(losses, seen_M, state, updater, measurement, names)
            metrics |= {
                "step": step,
                **applied,
                **run.pace(tokens, step_began, waited),
                "padding_share": 1 - tokens / computed,
                "reference_forwards": forwards,
            }
            if section.stop is not None:
                metrics["drift_over_noise"] = _judged(section.stop, recent_SG)
            run.log(metrics)
            bar.show(weights_view(metrics, shown, section.loss_measurement.name))
            shown = metrics
            step += 1
            bar.advance(1, loss=metrics["loss"], effective_tasks=metrics["effective_tasks"])
            counts = _counted(counted, reference, began)
            seen = torch.from_numpy(seen_G)
            run.save(step, {"weights": state.plain(), "seen": seen, "recent": recent_SG, "counted": counts})
    counts = _counted(counted, reference, began)
    counts["forwards"], counts["hits"] = world.sums(counts["forwards"], counts["hits"])
    if reference is not None:
        reference.cache.close()
    world.barrier()
    if world.leads:
        from tdro_cli.report.weights import publish_weights

        publish_weights(plan, names, state, updater, log, step, seen_G, tasks, counts, progress)
    world.barrier()


def _counted(before: dict[str, Any], reference: Reference | None, began: float) -> dict[str, Any]:
    """Reference forwards and cache hits in queries of this rank, and seconds; those before a resume included."""
    return {
        "forwards": before["forwards"] + (reference.forwards if reference else 0),
        "hits": before["hits"] + (reference.hits if reference else 0),
        "seconds": before["seconds"] + time.monotonic() - began,
    }


def _with_newest(recent_SG: Tensor, weights_G: Tensor, stop: Stop | None) -> Tensor:
    """The weights before the window that is judged and after each of its steps; of the last step only without one."""
    return torch.cat([recent_SG, weights_G[None]])[-(stop.window_steps + 1 if stop else 1) :]


def _judged(stop: Stop, recent_SG: Tensor) -> float | None:
    """`drift_over_noise` of the window; None before it is full."""
    return drift_over_noise(recent_SG) if len(recent_SG) > stop.window_steps else None


def _only_noise(stop: Stop | None, recent_SG: Tensor) -> bool:
    """Whether to end here. A bandit's weights that have not moved yet are no reason."""
    drift = None if stop is None else _judged(stop, recent_SG)
    return drift is not None and drift < stop.drift_over_noise


def _own_weights(whole: Batch, weights_G: Tensor, world: World) -> Tensor:
    """w_i / Σ w over the global batch, for this rank's queries: [B of the rank]."""
    weight_B = query_weights(torch.from_numpy(whole.task_B), weights_G)
    return weight_B[whole.shard(world.rank, world.size)].to(world.device)


def _proxy_pass(
    engine: Engine, own: TokenBatch, recipe: Recipe, pad_id: int, weight_B: Tensor | None
) -> tuple[Tensor, int, int]:
    """The proxy's losses on this rank's queries; with weights, also the gradient of their weighted sum.

    Returns the losses [B], tokens, and tokens with padding.
    """
    world, section = engine.world, recipe.encoder
    budget = budget_on(world.device, section)
    if engine.zero_stage == 3:
        return _cached_pass(engine, own, section.temperature, budget, pad_id, weight_B)
    parts = micro_batches(own, budget.activation_tokens)
    missing = world.most(len(parts)) - len(parts)
    loss_B = torch.zeros(len(own.queries), device=world.device)
    tokens = computed = 0
    for number, rows in enumerate(parts):
        with torch.set_grad_enabled(weight_B is not None):
            part = query_losses(
                engine,
                own,
                rows,
                pad_id=pad_id,
                temperature=section.temperature,
                tokens_at_once=budget.micro_batch_tokens,
                device=world.device,
            )
        where = torch.from_numpy(rows).to(world.device)
        loss_B[where] = part.loss_B.detach()
        tokens, computed = tokens + part.tokens, computed + part.computed
        if weight_B is not None:
            engine.backward((part.loss_B * weight_B[where]).sum(), last=number == len(parts) - 1 and not missing)
    for number in range(missing):  # other ranks have more parts, and each communicates
        idle = engine(
            torch.full((1, 1), pad_id, device=world.device), torch.ones(1, 1, dtype=torch.long, device=world.device)
        )
        if weight_B is not None:
            engine.backward(idle.sum() * 0.0, last=number == missing - 1)
    return loss_B, tokens, computed


def _cached_pass(
    engine: Engine, own: TokenBatch, temperature: float, budget: Budget, pad_id: int, weight_B: Tensor | None
) -> tuple[Tensor, int, int]:
    """The same under ZeRO 3, where each forward gathers parameters: as many chunks on every rank, one graph at once."""
    rows = np.arange(len(own.queries))
    passed = forward(engine, texts_of(own, rows), pad_id=pad_id, budget=budget)
    embedding_ND = passed.embedding_ND.requires_grad_()
    loss_B = losses_of_embeddings(embedding_ND, own, rows, temperature)
    if weight_B is not None:
        (gradient_ND,) = torch.autograd.grad((loss_B * weight_B).sum(), embedding_ND)
        backward(engine, passed, gradient_ND)
    return loss_B.detach(), passed.tokens, passed.computed


def _watched(engine: Engine, updater: Any, recipe: Recipe) -> list[torch.nn.Parameter]:
    """The parameters whose gradients the updater asks about; none where it asks about none.

    Raises TdroError under ZeRO 3, which scatters them.
    """
    if not isinstance(updater, GradientUpdater):
        return []
    if engine.zero_stage == 3:
        raise TdroError(
            f"the weight updater {recipe.learn_weights.weight_updater.name!r} reads gradients, which ZeRO 3 scatters",
            where="deepspeed.zero_stage",
            remedy="use zero_stage 0, 1 or 2 for learn-weights, or another updater",
        )
    return watched_parameters(engine.module, adapters=recipe.lora is not None)


def _shares_of_mean_losses(
    engine: Engine, own: TokenBatch, count_G: Tensor, recipe: Recipe, pad_id: int
) -> Iterator[tuple[int, Tensor]]:
    """This rank's shares of the tasks' mean losses, each of one task and small enough to keep its activations."""
    section, budget = recipe.encoder, budget_on(engine.world.device, recipe.encoder)
    for task in np.unique(own.task_B):
        for rows in micro_batches(own, budget.activation_tokens, np.flatnonzero(own.task_B == task)):
            part = query_losses(
                engine.module,
                own,
                rows,
                pad_id=pad_id,
                temperature=section.temperature,
                tokens_at_once=budget.micro_batch_tokens,
                device=engine.world.device,
            )
            yield int(task), part.loss_B.sum() / count_G[task]


def _pooled(
    world: World, whole: Batch, proxy_B: Tensor, reference_B: Tensor | None, num_tasks: int, parts: int
) -> TaskLosses:
    """The losses of the global batch, on the CPU, the same on every rank: one transfer."""
    columns = [proxy_B.float()] if reference_B is None else [proxy_B.float(), reference_B.to(proxy_B.device)]
    pooled = world.gather(torch.stack(columns, 1)).cpu()
    return TaskLosses(
        proxy=pooled[:, 0].contiguous(),
        reference=None if reference_B is None else pooled[:, 1].contiguous(),
        task=torch.from_numpy(whole.task_B),
        num_tasks=num_tasks,
        micro_batch=part_of(len(whole), parts),
    )


def _require_finite(run: Run, step: int, losses: TaskLosses, names: list[str]) -> None:
    for what, loss_B in (("the loss", losses.proxy), ("the reference's loss", losses.reference)):
        if loss_B is not None and not bool(loss_B.isfinite().all()):
            run.require_finite(step, what, dict(zip(names, losses.mean_by_task(loss_B).tolist(), strict=True)))


def _metrics(
    losses: TaskLosses, measurement_G: Tensor, state: WeightState, updater: Any, measurement: Any, names: list[str]
) -> dict[str, Any]:
    """What a step's log line says, per task and in all."""
    weights_G = updater.weights(state.updater)
    count_G = losses.counts()
    columns = {
        "count": count_G.long(),
        "proxy_loss": losses.mean_by_task(losses.proxy),
        "measurement": measurement_G,
        "weight": weights_G,
        "weight_mean": state.averages.mean_G,
        "weight_ema": state.averages.ema_G,
    }
    if losses.reference is not None:
        columns["reference_loss"] = losses.mean_by_task(losses.reference)
    with contextlib.suppress(ValueError, TypeError):  # a measurement that needs every task has no jackknife
        columns["standard_error"] = standard_error(measurement, losses)
    clamped = getattr(measurement, "clamped_share", None)
    if clamped is not None:
        columns["clamped_share"] = clamped(losses)
    table = {name: values.tolist() for name, values in columns.items()}
    share_G = squared_norm_share(measurement_G)
    return {
        "loss": float(losses.proxy.mean()),
        "effective_tasks": effective_tasks(weights_G),
        "top_share": float(share_G.max()),
        "top_task": names[int(share_G.argmax())],
        **({"clamped_share": float((columns["clamped_share"] * count_G).sum() / count_G.sum())} if clamped else {}),
        "tasks": {name: {key: column[i] for key, column in table.items()} for i, name in enumerate(names)},
    }


def final_weights(updater: Any, state: WeightState) -> dict[str, np.ndarray]:
    """`weight`, `mean` and `ema` of each task: [G] float64 each, summing to 1."""
    columns = {
        "weight": learned_weights(updater, state),
        "mean": state.averages.mean_G if state.averages.updates else learned_weights(updater, state),
        "ema": state.averages.ema_G,
    }
    return {name: (value.double() / value.double().sum()).numpy() for name, value in columns.items()}
