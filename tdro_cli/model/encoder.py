"""From token ids to embeddings.

N texts, T tokens of the longest one, D embedding size.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdro_cli.errors import TdroError
from tdro_cli.model import varlen
from tdro_cli.model.contract import EncoderContract, Pooling
from tdro_cli.protocols import LoadedBackbone

Precision = Literal["float32", "bfloat16"]


class TextEncoder(nn.Module):
    """A transformers model, pooling, and normalising.

    `backbone_model` may be wrapped by peft. `autocast` is the precision that the backbone computes in; pooling and
    normalising are always float32.
    """

    def __init__(
        self,
        backbone_model: nn.Module,
        *,
        pooling: Pooling = "last_token",
        normalize: bool = True,
        autocast: Precision = "float32",
    ):
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
        if autocast not in get_args(Precision):
            raise ValueError(f"autocast must be one of {', '.join(get_args(Precision))}, got {autocast!r}")
        self.backbone = backbone_model
        self.pooling, self.normalize, self.autocast = pooling, normalize, autocast
        # padding is on the right, where a causal model never looks: without a mask, attention takes its fastest path
        attention = getattr(backbone_model.config, "_attn_implementation", None)
        self.unpadded = attention == varlen.NAME
        self.draws_at_random = draws_at_random(backbone_model)
        self._needs_mask = not (is_causal(backbone_model) and attention == "sdpa")
        self._first_position = _first_position(backbone_model)
        self._extra = {"use_cache": False} if "use_cache" in _forward_parameters(backbone_model) else {}

    @property
    def dimension(self) -> int:
        return self.backbone.config.get_text_config().hidden_size

    def forward(self, input_ids_NT: Tensor, attention_mask_NT: Tensor) -> Tensor:
        """Embeddings [N, D] float32, of length 1 where `normalize`. Padding may be on either side of a text.

        Where the encoder is `unpadded`, inputs on the CPU spare a GPU the wait for their lengths.
        """
        embed = self._embed_unpadded if self.unpadded else self._embed_padded
        embedding_ND = embed(input_ids_NT, attention_mask_NT.bool())
        return F.normalize(embedding_ND, dim=-1) if self.normalize else embedding_ND

    def _embed_unpadded(self, input_ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        device = next(self.backbone.parameters()).device
        length_N = mask_NT.sum(1)
        position_NT = mask_NT.cumsum(1) - 1 + self._first_position
        told = varlen.bounds(length_N)
        told = {
            name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in told.items()
        }
        with self._precision(device):
            hidden_TD = self.backbone(
                input_ids=input_ids_NT[mask_NT][None].to(device, non_blocking=True),
                position_ids=position_NT[mask_NT][None].to(device, non_blocking=True),
                return_dict=True,
                **told,
                **self._extra,
            ).last_hidden_state[0]
        return pool_unpadded(hidden_TD, told["cu_seq_lens_q"].long(), self.pooling)

    def _embed_padded(self, input_ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        # real tokens to the front: then positions count from the text's first token in every family
        order_NT = mask_NT.int().argsort(dim=1, descending=True, stable=True)
        input_ids_NT, mask_NT = input_ids_NT.gather(1, order_NT), mask_NT.gather(1, order_NT)
        with self._precision(input_ids_NT.device):
            hidden_NTD = self.backbone(
                input_ids=input_ids_NT,
                attention_mask=mask_NT.long() if self._needs_mask else None,
                return_dict=True,
                **self._extra,
            ).last_hidden_state
        return pool(hidden_NTD, mask_NT, self.pooling)

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.autocast == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


def pool(hidden_NTD: Tensor, mask_NT: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text: [N, D] float32. `mask_NT` is true for the real tokens, which come first."""
    if pooling == "cls":
        return hidden_NTD[:, 0].float()
    length_N = mask_NT.sum(1)
    if pooling == "last_token":
        row_N = torch.arange(len(hidden_NTD), device=hidden_NTD.device)
        return hidden_NTD[row_N, (length_N - 1).clamp_min(0)].float()
    total_ND = (hidden_NTD.float() * mask_NT.unsqueeze(-1)).sum(1)
    return total_ND / length_N.clamp_min(1).unsqueeze(-1)


def pool_unpadded(hidden_TD: Tensor, start_N: Tensor, pooling: Pooling) -> Tensor:
    """The same for texts end to end: [N, D] float32. `start_N` says where each begins, and at last where all end."""
    if pooling == "cls":
        return hidden_TD[start_N[:-1]].float()
    if pooling == "last_token":
        return hidden_TD[start_N[1:] - 1].float()
    length_N = start_N.diff()
    text_T = torch.repeat_interleave(length_N, output_size=len(hidden_TD))
    total_ND = hidden_TD.new_zeros(len(length_N), hidden_TD.shape[1], dtype=torch.float32)
    return total_ND.index_add(0, text_T, hidden_TD.float()) / length_N.unsqueeze(-1)


def is_causal(model: nn.Module) -> bool:
    """Whether a token sees only what stands before it, by what the model's attention layers say of themselves."""
    if getattr(model.config, "is_causal", True) is False:
        return False
    layers = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return bool(layers) and all(layers)


def draws_at_random(model: nn.Module) -> bool:
    """Whether two passes of one text differ in training, by dropout or the like."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    settings = model.config.get_text_config().to_dict()  # attention's own is no module, but is named here
    return any(
        isinstance(value, int | float) and value > 0
        for name, value in settings.items()
        if any(word in name for word in ("drop", "jitter"))
    )


def position_limit(model: nn.Module) -> int | None:
    """The longest text in tokens that the model has positions for; None where it says no limit."""
    table = _position_table(model)
    if table is not None:
        return table.num_embeddings - _first_position(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None


def _position_table(model: nn.Module) -> nn.Embedding | None:
    tables = (getattr(module, "position_embeddings", None) for module in model.modules())
    return next((table for table in tables if isinstance(table, nn.Embedding)), None)


def _first_position(model: nn.Module) -> int:
    """RoBERTa's positions begin after its padding id, all others' at 0."""
    table = _position_table(model)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def check_lengths(model: nn.Module, contract: EncoderContract, *, where: str | None = None) -> None:
    """Raises TdroError if the contract allows longer texts than the model has positions for."""
    limit, longest = position_limit(model), max(contract.query_length, contract.passage_length)
    if limit is not None and longest > limit:
        raise TdroError(
            f"texts of up to {longest} tokens, but the model has {limit} positions",
            where=where,
            remedy=f"set query_length and passage_length to at most {limit}",
        )


def checkpoint_activations(model: nn.Module) -> None:
    """Lets a transformers model compute its activations again in the backward pass instead of keeping them."""
    name = "activation_checkpointing_enable"  # of newer transformers, which warn about the older name
    getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False})


def add_lora(
    loaded: LoadedBackbone,
    *,
    r: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    targets: Sequence[str] | None = None,
) -> nn.Module:
    """The model with LoRA adapters (arXiv 2106.09685), everything else frozen. `targets`: the family's when None.

    Raises TdroError if no layer has one of the target names.
    """
    from peft import LoraConfig, get_peft_model

    names = list(targets or loaded.lora_targets)
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=names
    )
    try:
        return get_peft_model(loaded.model, config)
    except ValueError as error:
        raise TdroError(
            f"LoRA can't be added to {', '.join(names)}: {error}",
            where="lora.target_modules",
            remedy=f"this model's own are {', '.join(loaded.lora_targets)}",
        ) from error


def compile_blocks(model: nn.Module) -> None:
    """Lets torch.compile make faster kernels for each layer, for batches of any shape, when it is first run."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in max(lists, key=len, default=[]):
        block.compile(dynamic=True)


def _forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(bare.forward).parameters
