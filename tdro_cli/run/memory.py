"""What training needs of each device's memory, estimated without weights, data or a device: `--dry-run` shows it.

The model is built without memory; its activations are counted by running it on tensors that have a size but no content.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tdro_cli import registry
from tdro_cli.errors import TdroError
from tdro_cli.recipe import Lora, Recipe
from tdro_cli.run.engine import is_mixed, reduce_bucket

if TYPE_CHECKING:
    from tdro_cli.model.packing import Budget

FLOAT, HALF = 4, 2  # bytes
ADAM = 2 * FLOAT  # its two moments of a parameter
LIVE_AT_ONCE = 10**9  # parameters that ZeRO 3 gathers and keeps at most: stage3_max_live_parameters
DEEP = 8  # layers; of a deeper model, this many tell how much each costs
SCORES = 4 * FLOAT + 3  # bytes of a query with a candidate: score, margin, exponent, gradient; three masks
ZERO_STAGES = (0, 1, 2, 3)
MOMENTARY = ("update", "total")  # beside what `device_bytes` says is held


@dataclass(frozen=True)
class Footprint:
    """A model's parameters, and bytes of one micro-batch: kept for the backward pass, and at the worst moment."""

    parameters: int
    trainable: int
    dimension: int
    kept: float
    peak: float


def peak_memory(device: Any) -> int:
    """Bytes that this process has had at its worst moment: of the GPU where it computes on one, else resident."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def estimate(recipe: Recipe, stages: list[str], *, ranks: int = 1, device: str | None = None) -> dict[str, Any]:
    """Bytes on each of `ranks` devices for the training `stages`, for ZeRO 0 to 3, all parameters trained or LoRA.

    `device`: "cpu" or "cuda"; where None, what this machine computes on.

    Raises TdroError if the backbone's shape can't be known here.
    """
    import torch

    from tdro_cli.model.packing import budget_on

    plugin = registry.resolve("backbones", recipe.backbone.name, recipe.backbone.options, where="backbone")
    if not hasattr(plugin, "config"):
        raise TdroError(f"the backbone {recipe.backbone.name!r} does not tell its shape", where="backbone")
    half = is_mixed(recipe.deepspeed)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    budget = budget_on(torch.device(device), recipe.encoder)
    variants = {"all parameters": None, "LoRA": recipe.lora or Lora()}
    found: dict[str, Any] = {
        "ranks": ranks,
        "device": device,
        "tokens": asdict(budget),
        "trained": "LoRA" if recipe.lora else "all parameters",
        "variants": {},
    }
    for name, lora in variants.items():
        shape = footprint(lambda: plugin.config(recipe.backbone.source), recipe, lora, half=half)
        found["parameters"] = found.get("parameters", shape.parameters)  # without adapters
        by_stage = {
            stage: {
                str(zero): device_bytes(recipe, stage, shape, budget, zero_stage=zero, ranks=ranks)
                for zero in ZERO_STAGES
            }
            for stage in stages
        }
        found["variants"][name] = {"trainable": shape.trainable, "stages": by_stage}
    zero = str(recipe.deepspeed.get("zero_stage", 0))
    planned = {stage: facts[zero] for stage, facts in found["variants"][found["trained"]]["stages"].items()}
    stage, worst = max(planned.items(), key=lambda item: item[1]["total"])
    largest = max((key for key in worst if key not in MOMENTARY), key=worst.__getitem__)
    computed_again = int(zero) < 3 and budget.activation_tokens > budget.micro_batch_tokens
    found["largest"] = {
        "stage": stage,
        "what": largest,
        "bytes": worst[largest],
        "remedy": remedy(largest, recipe, stage, computed_again=computed_again),
    }
    return found


def remedy(largest: str, recipe: Recipe, stage: str, *, computed_again: bool) -> str:
    """What of the recipe to change where a device has less: by what holds most of it."""
    section = stage.replace("-", "_")
    if largest == "activations":
        ways = ["lower encoder.activation_tokens, the rest is computed again"] if computed_again else []
        if not recipe.backbone.activation_checkpointing:
            ways.append("set backbone.activation_checkpointing: true")
        ways.append("lower encoder.micro_batch_tokens or the lengths of texts")
    elif largest == "embeddings":
        ways = [f"lower {section}.batch.queries or {section}.batch.passages_per_query"]
    else:
        ways = ["use a higher deepspeed.zero_stage and more devices", "train a `lora`"]
        ways.append("keep the optimizer off the device: deepspeed.zero_optimization.offload_optimizer")
    return "; ".join(ways)


def device_bytes(
    recipe: Recipe, stage: str, shape: Footprint, budget: Budget, *, zero_stage: int, ranks: int
) -> dict[str, float]:
    """Bytes by what they hold, and their `total` at the worst moment of a step."""
    section = getattr(recipe, stage.replace("-", "_"))
    states = model_states(shape, recipe.deepspeed, zero_stage=zero_stage, ranks=ranks)
    batch, encoder = section.batch, recipe.encoder
    per_rank = -(-batch.queries // ranks)
    longest = per_rank * (encoder.query_length + batch.passages_per_query * encoder.passage_length)
    # under ZeRO 3 and beyond activation_tokens only one micro-batch has a graph
    graphs = min(longest, budget.activation_tokens) if zero_stage < 3 else 0
    at_once = min(budget.micro_batch_tokens, longest)
    kept = shape.kept * max(graphs, at_once) / encoder.micro_batch_tokens
    states["activations"] = kept + (shape.peak - shape.kept) * at_once / encoder.micro_batch_tokens
    passages = batch.queries * batch.passages_per_query
    texts = batch.queries + passages
    if stage == "learn-weights":
        states["embeddings"] = FLOAT * 2 * shape.dimension * (per_rank * texts / batch.queries)
        states["reference model"] = FLOAT * shape.parameters
    else:
        # gathered with their gradients on every rank; scores, their copies in the loss, and the mask
        states["embeddings"] = FLOAT * 3 * shape.dimension * texts + SCORES * batch.queries * passages
    during = states["gradients"] + states["buffers"] + states["activations"] + states["embeddings"]
    after = states["gradients"] / (ranks if zero_stage else 1) + states["update"]
    steady = states["weights"] + states["optimizer"] + states.get("reference model", 0.0)
    return {**states, "total": steady + max(during, after)}


def model_states(shape: Footprint, deepspeed: Mapping[str, Any], *, zero_stage: int, ranks: int) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer (float32 copies included), DeepSpeed's buffers, and of the update itself.

    arXiv:1910.02054, section 3, with what DeepSpeed 0.19 does beside: counted with its engine, see the tests.
    """
    half = is_mixed(deepspeed)
    word = HALF if half else FLOAT
    zero = deepspeed.get("zero_optimization", {})
    share = ranks if zero_stage else 1
    bucket = reduce_bucket(zero, shape.trainable)
    # each rank updates a float32 copy of its share, also where the model itself is float32
    copy = FLOAT * (half or zero_stage > 0)
    gathered = min(shape.parameters, int(zero.get("stage3_max_live_parameters", LIVE_AT_ONCE)))
    states = {
        "weights": word * (shape.parameters / ranks + gathered * (ranks > 1) if zero_stage == 3 else shape.parameters),
        "gradients": word * shape.trainable / (ranks if zero_stage > 1 else 1),
        "optimizer": (ADAM + copy) * shape.trainable / share,
        "buffers": word * bucket * (1, 2, 3, 2)[zero_stage],
        "update": FLOAT * shape.trainable / share * (2 if zero_stage else half),
    }
    if zero_stage and zero.get("offload_optimizer", {}).get("device", "none") != "none":
        states["optimizer"] = states["update"] = 0.0
    if zero_stage == 3 and zero.get("offload_param", {}).get("device", "none") != "none":
        states["weights"] = word * gathered
    return states


# ---- what a model needs, by running it on tensors without content ----


def footprint(config: Callable[[], Any], recipe: Recipe, lora: Lora | None, *, half: bool) -> Footprint:
    """Parameters and activations of the model of `config()`, a new one each time, in micro-batches of the recipe."""
    whole = config()
    layers = whole.get_text_config().num_hidden_layers
    if layers <= DEEP:
        return _measured(whole, recipe, lora, half=half)
    counts = _counted(whole, recipe, lora)
    less, more = (_measured(_cut(config(), n), recipe, lora, half=half) for n in (DEEP // 2, DEEP))
    further = (layers - DEEP) / (DEEP - DEEP // 2)
    kept = more.kept + (more.kept - less.kept) * further
    return replace(more, **counts, kept=kept, peak=more.peak + (more.peak - less.peak) * further)


def _cut(config: Any, layers: int) -> Any:
    """The configuration with its first layers only."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = layers
    if kinds:
        text.layer_types = kinds[:layers]
    return config


def _without_memory(config: Any, recipe: Recipe, lora: Lora | None) -> Any:
    """The model as training has it, on the meta device."""
    import torch

    with torch.device("meta"):
        return build(config, recipe, lora)


def build(config: Any, recipe: Recipe, lora: Lora | None) -> Any:
    """A model with random weights, as training has it."""
    from transformers import AutoModel

    from tdro_cli.builtin.backbones import lora_targets, quiet_transformers
    from tdro_cli.model.encoder import add_lora, checkpoint_activations
    from tdro_cli.protocols import LoadedBackbone

    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' names for activation checkpointing, in peft
        model = AutoModel.from_config(config)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        if recipe.backbone.activation_checkpointing:
            checkpoint_activations(model)
        if lora is None:
            return model
        options: dict[str, Any] = {
            "r": lora.r,
            "alpha": lora.alpha,
            "dropout": lora.dropout,
            "targets": lora.target_modules,
        }
        return add_lora(LoadedBackbone(model, None, lora_targets(model), True), **options)


def _counted(config: Any, recipe: Recipe, lora: Lora | None) -> dict[str, int]:
    model = _without_memory(config, recipe, lora)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"parameters": sum(n for n, _ in counts), "trainable": sum(n for n, trained in counts if trained)}


def _measured(config: Any, recipe: Recipe, lora: Lora | None, *, half: bool) -> Footprint:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tdro_cli.model.encoder import TextEncoder

    model = _without_memory(config, recipe, lora)
    counts = _counted(config, recipe, lora)
    section = recipe.encoder
    length = min(section.passage_length, section.micro_batch_tokens)
    texts = max(1, section.micro_batch_tokens // length)
    with FakeTensorMode():
        _give_sizes(model, torch.bfloat16 if half else torch.float32)
        encoder = TextEncoder(
            model, pooling=section.pooling, normalize=section.normalize, autocast=recipe.backbone.dtype
        ).train()
        standing = [t for p in encoder.parameters() for t in (p, p.grad) if t is not None]
        with counting(standing) as count:
            ids_NT = torch.zeros((texts, length), dtype=torch.int64)
            embedding_ND = encoder(ids_NT, torch.ones_like(ids_NT))
            kept = count.live
            embedding_ND.sum().backward()
    share = section.micro_batch_tokens / (texts * length)
    return Footprint(**counts, dimension=embedding_ND.shape[1], kept=kept * share, peak=count.peak * share)


def _give_sizes(model: Any, dtype: Any) -> None:
    """Tensors without content in place of those of the meta device; gradients that are there from the step before."""
    import torch

    def sized(tensor: Any) -> Any:
        return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)

    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                parameter = torch.nn.Parameter(sized(tensor), requires_grad=tensor.requires_grad)
                parameter.grad = torch.zeros_like(parameter) if tensor.requires_grad else None
                module._parameters[name] = parameter
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = sized(tensor)


@dataclass(eq=False)
class Count:
    """Bytes of the tensors made since the counting began: now, and at the worst moment."""

    live: int = 0
    peak: int = 0


@contextlib.contextmanager
def counting(standing: list[Any]) -> Iterator[Count]:
    """Counts the memory of every tensor that is made inside, beside those that are `standing` already."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    count = Count()
    known = {tensor.untyped_storage()._cdata for tensor in standing}

    def let_go(key: int, size: int) -> None:
        known.discard(key)
        count.live -= size

    def add(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            count.live += storage.nbytes()
            count.peak = max(count.peak, count.live)
            weakref.finalize(storage, let_go, storage._cdata, storage.nbytes())

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor):
                    add(tensor)
            return made

    with Counting():
        yield count
