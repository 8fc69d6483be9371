"""A model as searching and mining use it: texts in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tdro_cli.artifacts import digest_file, digest_of, read_json
from tdro_cli.builtin.backbones import Auto, local_folder
from tdro_cli.data.tokenization import TextTokenizer
from tdro_cli.errors import TdroError
from tdro_cli.model.contract import CONTRACT_FILE, EncoderContract
from tdro_cli.model.encoder import TextEncoder, check_lengths, position_limit
from tdro_cli.model.packing import BUSY_TOKENS, embed_batch, is_unpadded, token_budget_batches, unpadded_batches
from tdro_cli.protocols import LoadedBackbone

CHUNK = 4096
UNPINNED_LENGTH = 512  # of a model that comes without a length of its own
CPU_TOKENS = 1024  # at once on a CPU: without gradients to keep, what a layer writes then stays in a core's cache
DIGESTED = (
    *("*.safetensors", "*.bin", "config.json", "adapter_config.json"),
    *("tokenizer*", "vocab*", "merges.txt", "*.model"),
)


class Embedder:
    """Embeds queries and passages, without gradients and with dropout off.

    `token_budget`: tokens, padding included, that go through the model at once (on a CPU at most 1,024). `digest` names
    the model and its contract: 64 hexadecimal digits; the same digest gives the same embeddings.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        tokenizer: Any,
        contract: EncoderContract,
        *,
        digest: str,
        token_budget: int = 16384,
        device: torch.device | str | None = None,
    ):
        self.encoder, self.contract, self.digest = encoder, contract, digest
        self.tokenizer = TextTokenizer(tokenizer, contract)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.token_budget = min(token_budget, CPU_TOKENS) if self.device.type == "cpu" else token_budget
        encoder.to(self.device)

    @property
    def dimension(self) -> int:
        return self.encoder.dimension

    def encode_queries(self, texts: Iterable[str], prompt: str | None = None) -> np.ndarray:
        """[n, D] float32, in the order of `texts`. `prompt`: None for the model's own, "" for none."""
        return self._whole(self.stream_queries(texts, prompt))

    def encode_passages(self, texts: Iterable[str], prompt: str | None = None) -> np.ndarray:
        """[n, D] float32, in the order of `texts`. `prompt`: None for the model's own, "" for none."""
        return self._whole(self.stream_passages(texts, prompt))

    def stream_queries(self, texts: Iterable[str], prompt: str | None = None) -> Iterator[np.ndarray]:
        """The same in pieces of at most 4,096 texts, so that neither texts nor embeddings need be in memory."""
        prompt = self.contract.query_prompt() if prompt is None else prompt
        return self._stream(texts, lambda chunk: self.tokenizer.queries(chunk, prompt))

    def stream_passages(self, texts: Iterable[str], prompt: str | None = None) -> Iterator[np.ndarray]:
        """The same in pieces of at most 4,096 texts, so that neither texts nor embeddings need be in memory."""
        prompt = self.contract.passage_prompt() if prompt is None else prompt
        return self._stream(texts, lambda chunk: self.tokenizer.passages(chunk, prompt))

    def _whole(self, pieces: Iterator[np.ndarray]) -> np.ndarray:
        parts = list(pieces) or [np.empty((0, self.dimension), np.float32)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _stream(self, texts: Iterable[str], tokenize: Callable[[list[str]], list[list[int]]]) -> Iterator[np.ndarray]:
        texts = iter(texts)
        # the next chunk is tokenized while the model works on this one
        with ThreadPoolExecutor(max_workers=1) as pool:
            pending = None
            while chunk := list(islice(texts, CHUNK)):
                coming = pool.submit(tokenize, chunk)
                if pending is not None:
                    yield self._embed(pending.result())
                pending = coming
            if pending is not None:
                yield self._embed(pending.result())

    def _embed(self, token_lists: list[list[int]]) -> np.ndarray:
        was_training = self.encoder.training
        self.encoder.eval()
        batches = self._batches([len(tokens) for tokens in token_lists])
        try:
            with torch.inference_mode():
                # filled in place: small results kept between large activations would leave the heap in pieces
                embedding_ND = torch.empty((len(token_lists), self.dimension), device=self.device)
                for rows in batches:
                    own = [token_lists[i] for i in rows]
                    embedding_ND[rows] = embed_batch(self.encoder, own, self.tokenizer.pad_id, self.device).float()
        finally:
            self.encoder.train(was_training)
        return embedding_ND.cpu().numpy()

    def _batches(self, lengths: Sequence[int]) -> list[np.ndarray]:
        """Which texts go through the model together: the same whatever the threads, since it shows in the last bits."""
        if is_unpadded(self.encoder):
            return unpadded_batches(lengths, self.token_budget)
        return token_budget_batches(lengths, self.token_budget, max(BUSY_TOKENS, self.token_budget // 32))


def load_embedder(
    source: str | Path,
    *,
    token_budget: int = 16384,
    device: torch.device | str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    attention: str = "sdpa",
    contract: EncoderContract | None = None,
    query_length: int | None = None,
    passage_length: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Embedder:
    """The embedder of a saved model: ours, a sentence-transformers or plain Hugging Face one, or a LoRA adapter.

    `source` is a folder, also that of a run, or a hub name; `dtype` the precision to compute in ("float32",
    "bfloat16"); `contract` what to use instead of the model's own. A plain model has none: then last-token pooling for
    a decoder and mean pooling for an encoder, normalised, 512 tokens, no prompt. `query_length` and `passage_length`
    take the place of the contract's. An adapter is merged into its base model.
    Raises TdroError if there is no such model, or it needs a step that we don't have.
    """
    source = model_folder(source)
    folder = local_folder(source, revision=revision, trust_remote_code=trust_remote_code)
    auto = Auto(trust_remote_code=trust_remote_code)
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    modules = _modules(folder)
    weights = folder / modules["Transformer"] if modules else folder
    if is_adapter:
        loaded, base = _load_adapter(folder, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code)
        digested = [folder, base]
    else:
        loaded, digested = auto.load(str(weights), dtype=dtype, attention=attention), [weights]
    if contract is None and (folder / CONTRACT_FILE).is_file():
        contract = EncoderContract.from_json(read_json(folder / CONTRACT_FILE))
    elif contract is None and modules:
        contract = _sentence_transformers_contract(folder, modules, loaded)
    elif contract is None:
        contract = _plain_contract(loaded)
    if query_length is not None:
        contract = replace(contract, query_length=query_length)
    if passage_length is not None:
        contract = replace(contract, passage_length=passage_length)
    check_lengths(loaded.model, contract, where=str(source))
    try:
        encoder = TextEncoder(
            loaded.model, pooling=contract.pooling, normalize=contract.normalize, autocast=dtype
        ).eval()
        return Embedder(
            encoder,
            loaded.tokenizer,
            contract,
            digest=model_digest(digested, contract, dtype=dtype),
            token_budget=token_budget,
            device=device,
        )
    except ValueError as error:
        raise TdroError(str(error), where=str(source), remedy="give another contract") from error


def model_folder(source: str | Path) -> str | Path:
    """The model that a run's folder, or its `out`, holds; any other source as it is.

    Raises TdroError for a run that has not published its model.
    """
    folder = Path(source).expanduser()
    for model in (folder / "out" / "model", folder / "model"):
        if (model / "config.json").is_file():
            return model
    if (folder / "plan.json").is_file():
        raise TdroError(
            "this run has no model: it is not complete, or its stage makes none",
            where=str(source),
            remedy="name a run of train-ref or finetune that `tdro runs` shows as complete",
        )
    return source


def model_digest(folders: Sequence[Path], contract: EncoderContract, *, dtype: str = "float32") -> str:
    """SHA-256 over weights, configuration, tokenizer, contract and precision, whatever the folders are called."""
    files = [
        {path.name: digest_file(path) for pattern in DIGESTED for path in folder.glob(pattern) if path.is_file()}
        for folder in folders
    ]
    return digest_of({"files": files, "contract": contract.to_json(), "dtype": dtype})


def _plain_contract(loaded: LoadedBackbone) -> EncoderContract:
    length = min(UNPINNED_LENGTH, position_limit(loaded.model) or UNPINNED_LENGTH)
    pooling: Literal["last_token", "mean"] = "last_token" if loaded.causal else "mean"
    return EncoderContract(pooling=pooling, query_length=length, passage_length=length)


def _load_adapter(folder: Path, *, dtype: str, attention: str, trust_remote_code: bool) -> tuple[LoadedBackbone, Path]:
    """The base model with the adapter merged in, and the base model's folder."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    settings = read_json(folder / "adapter_config.json")
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not name:
        raise TdroError("the adapter does not name its base model", where=str(folder), remedy="use the merged model")
    auto = Auto(revision=revision, trust_remote_code=trust_remote_code)
    loaded = auto.load(name, dtype=dtype, attention=attention)
    model = PeftModel.from_pretrained(loaded.model, folder).merge_and_unload()
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else loaded.tokenizer
    return LoadedBackbone(model, tokenizer, loaded.lora_targets, loaded.causal), local_folder(name, revision=revision)


# ---- models saved by sentence-transformers ----

POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "last_token": "pooling_mode_lasttoken",
}


def _modules(folder: Path) -> dict[str, str]:
    """{class: path in the folder} of modules.json; empty where there is none."""
    if not (folder / "modules.json").is_file():
        return {}
    found = {entry["type"].rpartition(".")[2]: entry["path"] for entry in read_json(folder / "modules.json")}
    unknown = sorted(found.keys() - {"Transformer", "Pooling", "Normalize"})
    if unknown or not {"Transformer", "Pooling"} <= found.keys():
        raise TdroError(
            f"a sentence-transformers model with the modules {', '.join(found)}",
            where=str(folder / "modules.json"),
            remedy="only Transformer, Pooling and Normalize are known here",
        )
    return found


def _sentence_transformers_contract(
    folder: Path, modules: Mapping[str, str], loaded: LoadedBackbone
) -> EncoderContract:
    """What sentence-transformers itself would do with the model, with its prompts as they are written."""
    weights = folder / modules["Transformer"]
    settings: dict[str, Any] = next((read_json(path) for path in sorted(weights.glob("sentence_*_config.json"))), {})
    if settings.get("do_lower_case"):
        _lower_case(loaded.tokenizer)
    limits = [settings.get("max_seq_length"), loaded.tokenizer.model_max_length, position_limit(loaded.model)]
    length = int(limits[0] or min(limit for limit in limits[1:] if limit))
    config_file = folder / "config_sentence_transformers.json"
    config = read_json(config_file) if config_file.is_file() else {}
    prompts = {name: prompt for name, prompt in (config.get("prompts") or {}).items() if prompt is not None}
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), "")
    pooling_file = folder / modules["Pooling"] / "config.json"
    pooling = read_json(pooling_file)
    if pooling.get("include_prompt") is False and any(prompts.values()):
        raise TdroError("pooling without the prompt's tokens is not known here", where=str(pooling_file))
    return EncoderContract(
        pooling=_pooling(pooling, where=str(pooling_file)),
        normalize="Normalize" in modules,
        query_length=int(settings.get("query_length") or length),
        passage_length=int(settings.get("document_length") or length),
        prompts={**prompts, "query": prompts.get("query", ""), "document": document},
        query_template="{prompt}{query}",
        ending="tokenizer",
    )


def _pooling(config: Mapping[str, Any], *, where: str) -> Any:
    modes = config.get("pooling_mode")
    modes = [modes] if isinstance(modes, str) else modes or [m for m, key in POOLING_KEYS.items() if config.get(key)]
    modes = ["last_token" if mode == "lasttoken" else mode for mode in modes or ["mean"]]
    if len(modes) > 1 or modes[0] not in ("last_token", "mean", "cls"):
        raise TdroError(
            f"pooling {' + '.join(modes)} is not known here", where=where, remedy="known: last_token, mean, cls"
        )
    return modes[0]


def _lower_case(tokenizer: Any) -> None:
    from tokenizers.normalizers import Lowercase, Sequence

    backend = tokenizer.backend_tokenizer
    backend.normalizer = Sequence([Lowercase(), *([backend.normalizer] if backend.normalizer else [])])
