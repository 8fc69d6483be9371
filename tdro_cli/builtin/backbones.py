"""Backbones: models that turn tokens into hidden states, with their tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_cli.errors import TdroError, did_you_mean
from tdro_cli.protocols import LoadedBackbone

DECODER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOST = 10**6  # of anything that a scratch model has so many of
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Auto:
    """Any decoder or encoder of Hugging Face, from a folder or by its hub name.

    `revision` pins a hub model to a commit. `trust_remote_code` runs Python that comes with the model.
    """

    revision: str | None = None
    trust_remote_code: bool = False

    def load(self, source: str, *, dtype: str = "float32", attention: str = "sdpa") -> LoadedBackbone:
        """The model without a head, and its tokenizer.

        The weights are float32 whatever `dtype` is: it names the precision to compute in, which the encoder applies
        ("float32" or "bfloat16"). `attention` goes to transformers ("sdpa", "eager", "flash_attention_2" ...); with
        "varlen" nothing is computed on padding.
        Raises TdroError if there is no such model, or its weights or tokenizer don't fit it.
        """
        if dtype not in PRECISIONS:
            raise TdroError(f"no precision {dtype!r}", where="backbone", remedy=did_you_mean(dtype, PRECISIONS))
        trusted = self.trust_remote_code
        folder = local_folder(source, revision=self.revision, trust_remote_code=trusted, where="backbone.source")
        with quiet_transformers():
            model = _load_model(source, folder, attention=attention, trust_remote_code=trusted)
            tokenizer = _load_tokenizer(source, folder, trust_remote_code=trusted)
        _check_vocabulary(source, model, tokenizer)
        _leave_pooler_out(model)
        embeddings = model.get_input_embeddings()
        if embeddings.padding_idx is not None and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            embeddings.padding_idx = None  # it would keep EOS, which pads here, from being trained
        # a name, not a place on this machine, for what is saved later
        model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = str(source)
        from tdro_cli.model.encoder import is_causal

        return LoadedBackbone(model, tokenizer, lora_targets(model), is_causal(model))

    def config(self, source: str) -> Any:
        """The model's configuration alone, for estimates: config.json is all that is read or fetched."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(
                str(source), revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            raise TdroError(
                f"the configuration of {str(source)!r} can't be read: {_first_line(error)}",
                where="backbone.source",
                remedy="check the name and the network, or give a folder with config.json",
            ) from error


@dataclass(frozen=True)
class Scratch:
    """A small Qwen2 with random weights and a tokenizer trained on the tasks' own text, for work without a network."""

    hidden_size: int = 128
    """of the embeddings, too; an even number times `heads`"""
    layers: int = 2
    """transformer blocks"""
    heads: int = 4
    """of attention, in each block"""
    intermediate_size: int | None = None
    """of the feed-forward layers; four times `hidden_size` when left out"""
    vocab_size: int = 8000
    """tokens that the tokenizer learns at most"""
    max_positions: int = 1024
    """the longest text, in tokens"""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "intermediate_size", "vocab_size", "max_positions"):
            size = getattr(self, name)
            if size is not None and not 1 <= size <= MOST:
                raise ValueError(f"{name} must be between 1 and {MOST:,}, got {size}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be an even number times heads {self.heads}")
        if self.vocab_size < 300:
            raise ValueError(f"vocab_size must be >= 300 (256 bytes and some), got {self.vocab_size}")

    def prepare(self, texts: Iterable[str], folder: Path, *, seed: int) -> None:
        """Writes tokenizer and model into `folder`: the same bytes for the same texts, options and seed."""
        import torch
        from transformers import Qwen2Model

        tokenizer = _train_tokenizer(texts, self.vocab_size, self.max_positions)
        config = self.config(
            vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen2Model(config)
            # the usual 0.02 drowns in what the layers add, and all texts begin alike: with 1 a text begins as the
            # sum of its words (loss after 60 steps 3.5 instead of 4.8)
            torch.nn.init.normal_(model.embed_tokens.weight, std=1.0)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    def config(self, source: str | None = None, **of_tokenizer: Any) -> Any:
        """The model's configuration; without its tokenizer's facts, that of the largest vocabulary."""
        from transformers import Qwen2Config

        return Qwen2Config(
            **{"vocab_size": self.vocab_size, **of_tokenizer},
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size or 4 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.max_positions,
            bos_token_id=None,
            use_cache=False,
        )

    def load(self, source: str, *, dtype: str = "float32", attention: str = "sdpa") -> LoadedBackbone:
        """The model that `prepare` wrote into the folder `source`."""
        if not (Path(source) / "config.json").is_file():
            raise TdroError(
                "no scratch model has been made yet", where=str(source), remedy="make it from the tasks' text first"
            )
        return Auto().load(source, dtype=dtype, attention=attention)


def local_folder(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, where: str | None = None
) -> Path:
    """The folder of a model: `source` itself, or the local copy of a hub model, fetched if need be.

    Raises TdroError if there is neither; `where` is the place that named it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_symlink():
        raise TdroError(f"the link {folder} leads to no folder", where=where, remedy="give the folder of a model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *(["*.py"] if trust_remote_code else [])]
    try:
        with quiet_transformers():
            return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise TdroError(
            f"no model folder {str(source)!r}", where=where, remedy="give an existing folder or a hub name"
        ) from error
    except (OSError, HfHubHTTPError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TdroError(
            f"no model {str(source)!r}{at}: no such folder here, and the hub did not give it ({reason})",
            where=where,
            remedy="check the name and the network, or download the model and give its folder",
        ) from error


def lora_targets(model: Any) -> tuple[str, ...]:
    """The linear layers that LoRA adapts by default: attention and feed-forward, never an unused pooler."""
    import torch

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    pooler = {name for name in linear if "pooler" in name.split(".")}
    last = [name.rpartition(".")[2] for name in linear if name not in pooler]
    if "q_proj" in last:
        return tuple(name for name in DECODER_TARGETS if name in last)
    # "dense" of a BERT is three layers and the pooler's too, so such a name takes its parent with it
    shared = {name.rpartition(".")[2] for name in pooler} | {"dense"}
    short = [
        ".".join(name.split(".")[-2:]) if name.rpartition(".")[2] in shared else name.rpartition(".")[2]
        for name in linear
        if name not in pooler
    ]
    return tuple(dict.fromkeys(short))


def _load_model(source: str | Path, folder: Path, *, attention: str, trust_remote_code: bool) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    from tdro_cli.model import varlen

    options = {"trust_remote_code": trust_remote_code}
    if attention == varlen.NAME:
        varlen.register()
    if not (folder / "config.json").is_file():
        raise TdroError(
            "no model: config.json is missing", where=str(source), remedy="give the folder of a saved model"
        )
    _require_safetensors(source, folder)
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if config.is_encoder_decoder:
            raise TdroError(
                f"{config.model_type} is an encoder-decoder", where=str(source), remedy="give an encoder or a decoder"
            )
        model, report = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            # transformers' own choice is sdpa, and eager for the few models that sdpa can't serve (Gemma 2)
            attn_implementation=None if attention == "sdpa" else attention,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # else an error that names no tensor
            **options,
        )
    except ImportError as error:
        raise TdroError(
            f"attention {attention!r} can't be used here: {_first_line(error)}",
            where="backbone.attention",
            remedy="install what it needs, or use sdpa",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise TdroError(
            f"the model can't be loaded: {_first_line(error)}",
            where=str(source),
            remedy="check that the folder is whole, that transformers knows this model, and the attention setting",
        ) from error
    for name, given, needed in sorted(report["mismatched_keys"]):
        raise TdroError(
            f"the weights do not fit config.json: {name} is {list(given)}, the model needs {list(needed)}",
            where=str(source),
            remedy="use the config.json and the weights of one model",
        )
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise TdroError(
            f"the weights lack {len(missing)} tensors of the model, first {missing[0]!r}",
            where=str(source),
            remedy="give a checkpoint of the whole model; these would be random",
        )
    if report["missing_keys"]:
        model.pooler = None  # random weights, and no pooling of ours reads them
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model


def _require_safetensors(source: str | Path, folder: Path) -> None:
    """Raises TdroError where the folder has no weights in safetensors: a pickle can run what its author likes."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    raise TdroError(
        f"the weights are a pickle ({pickled[0]}), which could run any code" if pickled else "the model has no weights",
        where=str(source),
        remedy="give model.safetensors" + (": safetensors.torch.save_file writes one" if pickled else ""),
    )


def _load_tokenizer(source: str | Path, folder: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what comes of files that are not there
            raise ValueError("it has no vocabulary")
        return tokenizer
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise TdroError(
            f"the tokenizer can't be loaded: {_first_line(error)}",
            where=str(source),
            remedy="check that tokenizer.json and tokenizer_config.json are beside the model",
        ) from error


def _check_vocabulary(source: str | Path, model: Any, tokenizer: Any) -> None:
    rows, ids = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values()) + 1
    if ids > rows:
        raise TdroError(
            f"the tokenizer has token ids up to {ids - 1}, but the model has embeddings for {rows}",
            where=str(source),
            remedy="use the tokenizer that belongs to this model",
        )


def _leave_pooler_out(model: Any) -> None:
    """BERT's pooler feeds no embedding of ours; without gradients it stays as it came."""
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(False)


def _train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """A byte-level BPE tokenizer of Qwen2's kind, which transformers also finds by the model's type."""
    from tokenizers import trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    # Qwen2's own normaliser and word pattern, with no words yet
    pipeline = Qwen2Tokenizer(vocab={}, merges=[], **special).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(texts, trainer)
    return Qwen2Tokenizer(tokenizer_object=pipeline, model_max_length=max_length, **special)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars and load reports of transformers and the hub client; our own checks speak up."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
