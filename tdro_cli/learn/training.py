"""train-ref and finetune: contrastive training on homogeneous batches, tasks in given shares.

B queries and M passages of the global batch, D embedding size.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tdro_cli import artifacts, registry
from tdro_cli.builtin.false_negative_masks import Known
from tdro_cli.data.batching import BatchPlan
from tdro_cli.data.collation import NO_TEXT, TokenBatch, TrainingTask
from tdro_cli.data.loading import Arriving, Collation, num_workers
from tdro_cli.data.tasks import TaskStore
from tdro_cli.data.tokenization import TextTokenizer
from tdro_cli.errors import RunFailed, TdroError
from tdro_cli.learn.contrastive import candidate_mask, cosine, infonce
from tdro_cli.learn.gradient_cache import backward, forward
from tdro_cli.learn.guide import Guide
from tdro_cli.learn.schedules import learning_rate
from tdro_cli.model.contract import EncoderContract
from tdro_cli.model.encoder import (
    TextEncoder,
    add_lora,
    check_lengths,
    checkpoint_activations,
    compile_blocks,
)
from tdro_cli.model.packing import budget_on
from tdro_cli.protocols import FalseNegativeMask
from tdro_cli.recipe import Checkpoint, Optimizer, Recipe, Schedule, Training
from tdro_cli.run import timing
from tdro_cli.run.distributed import World
from tdro_cli.run.engine import Engine, damage, keep_newest, remove, seed_everything
from tdro_cli.run.memory import peak_memory
from tdro_cli.run.plan import Plan, stores_of
from tdro_cli.run.progress import Progress
from tdro_cli.run.signals import StopWish

if TYPE_CHECKING:
    from tdro_cli.run.events import EventLog

# ---- what both trainers start from ----


def encoder_contract(recipe: Recipe) -> EncoderContract:
    section = recipe.encoder
    return EncoderContract(
        pooling=section.pooling,
        normalize=section.normalize,
        query_length=section.query_length,
        passage_length=section.passage_length,
        temperature=section.temperature,
        prompts={task.name: task.prompt for task in recipe.tasks if task.prompt},
    )


def load_encoder(recipe: Recipe, source: str, *, lora: bool = True) -> tuple[TextEncoder, TextTokenizer]:
    """The recipe's backbone from `source`, ready to be trained."""
    section = recipe.backbone
    backbone = registry.resolve("backbones", section.name, section.options, where="backbone")
    loaded = backbone.load(source, dtype=section.dtype, attention=section.attention)
    contract = encoder_contract(recipe)
    check_lengths(loaded.model, contract, where="encoder")
    if section.activation_checkpointing:
        checkpoint_activations(loaded.model)
    model: nn.Module = loaded.model
    if lora and recipe.lora:
        model = add_lora(
            loaded,
            r=recipe.lora.r,
            alpha=recipe.lora.alpha,
            dropout=recipe.lora.dropout,
            targets=recipe.lora.target_modules,
        )
    if section.compile:
        compile_blocks(model)
    encoder = TextEncoder(model, pooling=contract.pooling, normalize=contract.normalize, autocast=section.dtype)
    return encoder, TextTokenizer(loaded.tokenizer, contract)


def backbone_source(plan: Plan) -> str:
    """The folder that the backbone stage made, or what the recipe names."""
    if "backbone" in plan.inputs:
        return str(plan.input("backbone") / "model")
    source = plan.settings().backbone.source
    if source is None:
        raise TdroError(
            "the backbone has no source",
            where="backbone.source",
            remedy="name a model folder or a Hugging Face name; the backbone `scratch` needs none",
        )
    return source


def training_tasks(plan: Plan, rows: str, *, need_negatives: bool = False) -> list[TrainingTask]:
    """The tasks with the rows `all`, `held_in` or `held_out`; of them, if asked, those that have a hard negative.

    Raises TdroError for a task left without any.
    """
    recipe = plan.settings()
    stores = stores_of(plan)
    fraction = recipe.train_ref.hold_out
    tasks = []
    for task in recipe.tasks:
        store = stores[task.name]
        if rows == "all" or fraction == 0:
            chosen: np.ndarray | range = range(len(store))  # millions of rows cost no memory
        else:
            chosen = store.held_in_rows(fraction) if rows == "held_in" else store.held_out_rows(fraction)
        if not len(chosen):
            raise TdroError(
                f"task {task.name!r} has no rows {rows.replace('_', ' ')}: it has {len(store)} in all",
                where="train_ref.hold_out",
                remedy="hold out another share, or set learn_weights.rows to all",
            )
        if need_negatives:
            chosen = _with_negatives(chosen, store)
            if not len(chosen):
                raise TdroError(
                    f"task {task.name!r} has no hard negatives: without them a query has no loss",
                    where=str(store.path),
                    remedy="mine them (a `mine:` section), with `pad: true` where too few are found",
                )
        tasks.append(TrainingTask(task.name, store, chosen, task.prompt, task.symmetric, task.in_batch_negatives))
    return tasks


def _with_negatives(chosen: np.ndarray | range, store: TaskStore) -> np.ndarray | range:
    if not store.facts["rows_without_negatives"]:
        return chosen
    rows = store.rows_with_negatives()
    return rows if isinstance(chosen, range) else np.intersect1d(chosen, rows, assume_unique=True)


def require_queries(world: World, queries: int) -> None:
    """Raises TdroError unless every process gets a query of a batch."""
    if queries < world.size:
        raise TdroError(
            f"a batch of {queries} queries can't be divided among {world.size} processes",
            where="batch.queries",
            remedy="use a larger batch or fewer processes",
        )


# ---- the run: metrics, checkpoints, resuming ----


class Stopped(RunFailed):
    """The user's wish (Ctrl-C, SIGTERM), granted after a step and a checkpoint."""

    exit_code = 130


@dataclass(eq=False)
class Run:
    """What a training loop shares with every other: where it is, its log and its checkpoints."""

    plan: Plan
    world: World
    engine: Engine
    steps: int
    optimizer: Optimizer
    schedule: Schedule
    checkpoint: Checkpoint
    progress: Progress
    stop_wish: StopWish = field(default_factory=StopWish)
    _first: tuple[int, float] | None = field(default=None, init=False)  # a step that this process has done, and when
    _events: EventLog | None = field(default=None, init=False)  # of the leading process

    def __enter__(self) -> Run:
        """Inside, the wish to stop is heard; at the end the loggers are closed."""
        self.stop_wish.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._events is not None:
            self._events.close()
        self.stop_wish.__exit__(*exc)

    @property
    def checkpoints(self) -> Path:
        return Path(self.plan.folder) / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return Path(self.plan.folder) / "metrics.jsonl"

    def resume(self) -> tuple[int, dict[str, Any] | None]:
        """The step to go on from, and the state saved with it; (0, None) at the start."""
        newest = self._sound_checkpoint()
        if newest is None:
            self._begin_log(0)
            return 0, None
        state = self.engine.load(newest)
        step = state.pop("step")
        self._begin_log(step)
        if self.world.leads:
            self.progress.note(f"  resuming from step {step}")
        return step, state

    def _sound_checkpoint(self) -> Path | None:
        """The newest checkpoint whose files are those that were written. Damaged ones are removed, with a warning."""
        sound = -1
        if self.world.leads:
            for folder in artifacts.checkpoints_in(self.checkpoints):
                fault = damage(folder)
                if fault is None:
                    sound = artifacts.step_of(folder)
                    break
                self.progress.warn(
                    f"the checkpoint {folder} is damaged ({fault}) and is removed; an earlier one is used"
                )
                remove(folder)
        sound = self.world.most(sound)
        return self._checkpoint_at(sound) if sound >= 0 else None

    def _checkpoint_at(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def learning_rate(self, step: int) -> float:
        warmup = self.schedule.warmup_steps
        return learning_rate(
            step,
            peak=self.optimizer.learning_rate,
            steps=self.steps,
            warmup_steps=min(self.steps // 10 if warmup is None else warmup, self.steps),
            min_ratio=self.schedule.min_ratio,
            name=self.schedule.name,
        )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One object a step; numbers that are not finite become null. The loggers get the same."""
        if self.world.leads:
            with open(self.metrics_file, "a", encoding="utf-8") as file:
                metrics = {**metrics, "peak_memory": peak_memory(self.world.device), **self._time_left(metrics["step"])}
                file.write(json.dumps(_finite({**metrics, **timing.lap()}), ensure_ascii=False) + "\n")
            self._events.add(metrics)

    def _time_left(self, step: int) -> dict[str, float]:
        """Seconds, by the steps that this process has done; the first ones are slower than the rest."""
        if self._first is None:
            self._first = (step, time.monotonic())
            return {}
        first, began = self._first
        return {"seconds_left": (time.monotonic() - began) / (step - first) * (self.steps - step - 1)}

    @staticmethod
    def pace(tokens: int, began: float, waited: float) -> dict[str, float]:
        """Real tokens of all ranks a second, and the share of this rank's time that it waited for data."""
        seconds = time.monotonic() - began
        return {"tokens_per_second": tokens / seconds, "waiting_share": waited / seconds}

    def require_finite(self, step: int, what: str, values: Mapping[str, float]) -> None:
        """Raises RunFailed that names the tasks whose value isn't finite: nothing good comes of such a step."""
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            raise RunFailed(
                f"{what} of {', '.join(bad)} is not finite at step {step}",
                where=str(self.plan.folder),
                remedy="lower the learning rate, raise the temperature, or compute in float32",
            )

    def step(self, step: int) -> dict[str, float | None]:
        """Updates the model by the gradient at hand. Raises RunFailed for a gradient that isn't finite."""
        rate = self.learning_rate(step)
        norm = self.engine.step(rate)
        if norm is not None and not self.engine.skips_steps:
            self.require_finite(step, "the gradient", {"the model": norm})
        return {"learning_rate": rate, "gradient_norm": norm}

    def save(self, done: int, state: Mapping[str, Any]) -> None:
        """A checkpoint after `done` steps, where one is due. Where the user wishes to stop, one now, and Stopped."""
        if done >= self.steps:
            return
        stop = self.world.most(int(self.stop_wish.uttered))
        if stop or done % self.checkpoint.every_steps == 0:
            self.engine.save(self._checkpoint_at(done), {"step": done, **state})
            if self.world.leads:
                keep_newest(self.checkpoints, self.checkpoint.keep_last)
        if stop:
            raise Stopped(f"stopped after step {done} of {self.steps}", remedy="the same command goes on from there")

    def _begin_log(self, steps: int) -> None:
        """Drops what is logged of steps that will be run again."""
        if not self.world.leads:
            return
        from tdro_cli.protocols import LoggedRun
        from tdro_cli.run.events import EventLog

        kept = []
        if self.metrics_file.exists():
            kept = [line for line in read_metrics(self.metrics_file) if line["step"] < steps]
            artifacts.write_text(
                self.metrics_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            )
        recipe = self.plan.settings()
        run = LoggedRun(
            recipe.name, self.plan.stage, self.plan.digest, Path(self.plan.folder) / "log", self.plan.recipe
        )
        self._events = EventLog(recipe.loggers, run, self.progress.warn)
        self._events.begin(kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The metrics of the steps so far; a line cut short by a kill ends them."""
    lines = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


# ---- contrastive training ----


def train(
    plan: Plan,
    world: World,
    progress: Progress,
    *,
    section: Training,
    rows: str,
    probabilities: Mapping[str, float],
    loss_weights: Mapping[str, float],
    publish: Callable[[Engine, TextTokenizer, dict[str, Any]], None],
) -> None:
    """Trains the recipe's backbone; `publish` is given the engine, the tokenizer and what was done.

    `probabilities`: of each task that is used. `loss_weights`: factors of tasks' losses; 1 where absent.
    """
    recipe = plan.settings()
    require_queries(world, section.batch.queries)
    seed_everything(recipe.seed, world.rank)
    tasks = [task for task in training_tasks(plan, rows) if probabilities.get(task.name, 0) > 0]
    encoder, tokenizer = load_encoder(recipe, backbone_source(plan))
    engine = Engine(encoder, section.optimizer, recipe.deepspeed, world)
    engine.train()
    batches = BatchPlan(
        seed=recipe.seed,
        queries=section.batch.queries,
        sizes=tuple(len(task.rows) for task in tasks),
        probabilities=tuple(probabilities[task.name] for task in tasks),
        composition=section.batch.composition,
        draws=section.batch.draws,
    )
    budget = budget_on(world.device, recipe.encoder)
    factor_G = torch.tensor([loss_weights.get(task.name, 1.0) for task in tasks], device=world.device)
    choice = section.false_negative_mask
    judge = registry.resolve("false_negative_masks", choice.name, choice.options, where="false_negative_mask")
    judge = None if isinstance(judge, Known) else judge
    at_once = budget.micro_batch_tokens
    guide = Guide(judge, world, Path(plan.folder), token_budget=at_once) if hasattr(judge, "source") else None
    run = Run(plan, world, engine, section.steps, section.optimizer, section.schedule, section.checkpoint, progress)
    start, state = run.resume()
    seen_G = np.zeros(len(tasks), dtype=np.int64) if state is None else state["seen"].numpy()
    tokens = 0 if state is None else state["tokens"]
    began = time.monotonic()
    negatives = section.batch.passages_per_query - 1
    collation = Collation(batches, tasks, tokenizer, world.rank, world.size, negatives, keep_texts=guide is not None)
    arriving = Arriving(collation, range(start, section.steps), workers=num_workers(world))
    with progress.start(plan.stage, section.steps, "steps") as bar, run, contextlib.closing(arriving):
        bar.advance(start)
        for step in range(start, section.steps):
            step_began = time.monotonic()
            _, batch = next(arriving)
            passed = forward(engine, batch.queries + batch.passages, pad_id=tokenizer.pad_id, budget=budget)
            contrasted = contrast(
                world,
                passed.embedding_ND,
                batch,
                tasks,
                factor_G,
                temperature=recipe.encoder.temperature,
                cross_device=section.cross_device_negatives,
                judge=judge,
                guide_ND=guide.embed(batch, tasks) if guide else None,
            )
            loss_by_task, count_G = task_means(contrasted.loss_B, contrasted.task_B, len(tasks))
            by_name = {task.name: float(loss_by_task[i]) for i, task in enumerate(tasks) if count_G[i]}
            run.require_finite(step, "the loss", by_name)
            backward(engine, passed, contrasted.gradient_ND)
            applied = run.step(step)
            seen_G += count_G
            step_tokens, computed = world.sums(passed.tokens, passed.computed)
            tokens += step_tokens
            mean = float((loss_by_task * count_G).sum() / count_G.sum())
            run.log(
                {
                    "step": step,
                    "loss": mean,
                    **applied,
                    **run.pace(step_tokens, step_began, arriving.waited),
                    "padding_share": 1 - step_tokens / computed,
                    "masked_pairs": contrasted.masked,
                    "tasks": {
                        task.name: {"count": int(count_G[i]), "loss": by_name[task.name]}
                        for i, task in enumerate(tasks)
                        if count_G[i]
                    },
                }
            )
            bar.advance(1, loss=mean)
            run.save(step + 1, {"seen": torch.from_numpy(seen_G), "tokens": tokens})
    seconds = time.monotonic() - began
    done = {
        "steps": section.steps,
        "queries_seen": {task.name: int(n) for task, n in zip(tasks, seen_G, strict=True)},
        "rows": {task.name: len(task.rows) for task in tasks},
        "epochs": {task.name: float(n / len(task.rows)) for task, n in zip(tasks, seen_G, strict=True)},
        "tokens": tokens,
        "seconds": seconds,
    }
    publish(engine, tokenizer, done)
    if guide:
        guide.close()


@dataclass(eq=False)
class Contrast:
    """Losses and tasks of the global batch [B]; the gradient of its mean loss at this rank's embeddings [N, D].

    `masked`: pairs of the global batch that the false-negative mask took out.
    """

    loss_B: Tensor
    task_B: Tensor
    gradient_ND: Tensor
    masked: int = 0


def contrast(
    world: World,
    embedding_ND: Tensor,
    batch: TokenBatch,
    tasks: Sequence[TrainingTask],
    factor_G: Tensor,
    *,
    temperature: float,
    cross_device: bool,
    judge: FalseNegativeMask | None = None,
    guide_ND: Tensor | None = None,
) -> Contrast:
    """InfoNCE over the passages of all ranks. `embedding_ND`: this rank's queries, then its passages.

    `judge` masks false negatives by the embeddings, or by `guide_ND`, those of another model.
    """
    count = len(batch.queries)
    shared = gather_batch(world, batch)
    query_BD = world.gather(embedding_ND[:count]).requires_grad_()
    passage_MD = world.gather(embedding_ND[count:]).requires_grad_()
    mask_BM = shared.mask(tasks, cross_device=cross_device)
    masked = 0
    if judge is not None:
        asked = (query_BD, passage_MD) if guide_ND is None else map(world.gather, guide_ND.tensor_split([count]))
        doubtful_BM = mask_BM & shared.doubtful(judge, *(embedding.detach() for embedding in asked))
        mask_BM &= ~doubtful_BM
        masked = int(doubtful_BM.sum())
    loss_B = infonce(query_BD, passage_MD, shared.first_B, temperature, mask_BM)
    # every rank has the whole loss, so its part of the gradient is exact, and none need be exchanged
    loss = (loss_B * factor_G[shared.task_B]).mean()
    gradient_BD, gradient_MD = torch.autograd.grad(loss, (query_BD, passage_MD))
    own_ND = torch.cat([gradient_BD[shared.own_queries], gradient_MD[shared.own_passages]])
    return Contrast(loss_B.detach(), shared.task_B, own_ND, masked)


@dataclass(eq=False)
class SharedBatch:
    """The global batch as every rank sees it, in rank order; `own_*`: where this rank's part stands."""

    task_B: Tensor
    first_B: Tensor
    row_M: Tensor
    rank_M: Tensor
    rank_B: Tensor
    query_id_B: Tensor
    passage_id_M: Tensor
    positive_ids_BP: Tensor
    own_queries: slice
    own_passages: slice

    def mask(self, tasks: Sequence[TrainingTask], *, cross_device: bool) -> Tensor:
        """The candidates that each query meets as negatives: [B, M]."""
        mask_BM = candidate_mask(self.query_id_B, self.positive_ids_BP, self.passage_id_M, self.row_M)
        own_BM = self._own()
        in_batch_G = torch.tensor([task.in_batch_negatives for task in tasks], device=self.row_M.device)
        mask_BM &= own_BM | in_batch_G[self.task_B][:, None]
        if not cross_device:
            mask_BM &= self.rank_M == self.rank_B[:, None]
        return mask_BM

    def doubtful(self, judge: FalseNegativeMask, query_BD: Tensor, passage_MD: Tensor) -> Tensor:
        """The candidates that `judge` takes for false negatives by these embeddings: [B, M]."""
        score_BM = cosine(query_BD, passage_MD)
        doubtful_BM = judge(score_BM, score_BM.gather(1, self.first_B[:, None])[:, 0])
        return doubtful_BM if getattr(judge, "among", "in_batch") == "all" else doubtful_BM & ~self._own()

    def _own(self) -> Tensor:
        """The passages that each query brought itself: [B, M]."""
        return self.row_M == torch.arange(len(self.task_B), device=self.row_M.device)[:, None]


def gather_batch(world: World, batch: TokenBatch) -> SharedBatch:
    """Tells every rank what the others hold beside the embeddings."""
    queries, passages = len(batch.queries), len(batch.passages)
    width = world.most(batch.positive_ids_BP.shape[1])
    of_query = np.full((queries, 4 + width), NO_TEXT, dtype=np.int64)
    of_query[:, 0], of_query[:, 1] = world.rank, batch.task_B
    of_query[:, 2], of_query[:, 3] = batch.count_B, batch.query_id_B
    of_query[:, 4 : 4 + batch.positive_ids_BP.shape[1]] = batch.positive_ids_BP
    of_passage = np.stack([np.full(passages, world.rank, dtype=np.int64), batch.passage_id_M], 1)
    all_BK = world.gather(torch.from_numpy(of_query).to(world.device))
    all_MK = world.gather(torch.from_numpy(of_passage).to(world.device))
    rank_B, count_B, rank_M = all_BK[:, 0], all_BK[:, 2], all_MK[:, 0]
    first_own, first_passage = int((rank_B < world.rank).sum()), int((rank_M < world.rank).sum())
    return SharedBatch(
        task_B=all_BK[:, 1],
        first_B=count_B.cumsum(0) - count_B,
        row_M=torch.repeat_interleave(torch.arange(len(count_B), device=world.device), count_B),
        rank_M=rank_M,
        rank_B=rank_B,
        query_id_B=all_BK[:, 3],
        passage_id_M=all_MK[:, 1],
        positive_ids_BP=all_BK[:, 4:],
        own_queries=slice(first_own, first_own + queries),
        own_passages=slice(first_passage, first_passage + passages),
    )


def task_means(loss_B: Tensor, task_B: Tensor, num_tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss and count of each task: [G] each; 0 for an absent one."""
    loss, task = loss_B.double().cpu().numpy(), task_B.cpu().numpy()
    count_G = np.bincount(task, minlength=num_tasks)
    return np.bincount(task, weights=loss, minlength=num_tasks) / np.maximum(count_G, 1), count_G
