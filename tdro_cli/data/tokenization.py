"""From texts to token ids: prompt in front, special tokens around, EOS kept on truncation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tdro_cli.model.contract import EncoderContract


TokenIds = Sequence[int] | np.ndarray


class TextTokenizer:
    """Token ids of queries and passages as a contract wants them.

    The special tokens around a text (`prefix_ids`, `suffix_ids`) are those that the tokenizer's own template adds. If
    it ends a text with none and the contract's `ending` is "eos", the EOS token follows. A text that is too long loses
    its end, never these tokens. `pad_id` is the padding token's id, EOS where there is none (the mask decides).
    """

    def __init__(self, tokenizer: Any, contract: EncoderContract):
        self.tokenizer, self.contract = tokenizer, contract
        self._backend = _plain_backend(tokenizer)
        self.prefix_ids, own_suffix_ids = special_ids(tokenizer)
        self.appended_ids: list[int] = []
        if contract.ending == "eos" and not own_suffix_ids:
            end = next((i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), None)
            if end is None:
                raise ValueError("the tokenizer has neither an EOS nor a SEP token to end a text with")
            self.appended_ids = [end]
        self.suffix_ids = own_suffix_ids + self.appended_ids
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id: int = next((i for i in pads if i is not None), 0)
        self._checked: set[tuple[str, int]] = set()  # prompts that leave room for a text
        for name, limit in (("query_length", contract.query_length), ("passage_length", contract.passage_length)):
            if self._room(limit) < 1:
                raise ValueError(f"{name} {limit} leaves no room beside {limit - self._room(limit)} special tokens")

    def queries(self, texts: Sequence[str], prompt: str | Sequence[str] = "") -> list[list[int]]:
        """Token ids, at most `query_length` a text. `prompt`: of all texts, or of each.

        Raises ValueError if a prompt alone fills that length.
        """
        return self._encode(texts, prompt, self.contract.query_length)

    def passages(self, texts: Sequence[str], prompt: str | Sequence[str] = "") -> list[list[int]]:
        """Token ids, at most `passage_length` a text. A prompt is for tasks whose two sides are alike."""
        return self._encode(texts, prompt, self.contract.passage_length)

    def _encode(self, texts: Sequence[str], prompt: str | Sequence[str], limit: int) -> list[list[int]]:
        prompts, room = [prompt] * len(texts) if isinstance(prompt, str) else prompt, self._room(limit)
        heads = {one: self.contract.head(one) for one in dict.fromkeys(prompts)}
        for head in filter(None, heads.values()):
            self._check_head(head, limit)
        bodies = self._plain([heads[own] + text for own, text in zip(prompts, texts, strict=True)])
        # a model can't read nothing: an empty text without special tokens is one padding token
        return [self.prefix_ids + body[:room] + self.suffix_ids or [self.pad_id] for body in bodies]

    def _room(self, limit: int) -> int:
        return limit - len(self.prefix_ids) - len(self.suffix_ids)

    def _check_head(self, head: str, limit: int) -> None:
        if (head, limit) in self._checked:
            return
        tokens, room = len(self._plain([head])[0]), self._room(limit)
        if tokens >= room:
            raise ValueError(
                f"the prompt takes {tokens} tokens of {room} and leaves none for the text: {head!r}; "
                f"shorten it, or raise the length of {limit}"
            )
        self._checked.add((head, limit))

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without special tokens, padding or truncation."""
        if self._backend is None:
            return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def __getstate__(self) -> dict[str, Any]:
        """For another process that tokenizes: it need not import transformers."""
        return self.__dict__ if self._backend is None else {**self.__dict__, "tokenizer": None}


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer's template puts before and after a text.

    Raises ValueError if the text's own ids are not found between them.
    """
    outer = tokenizer("a", truncation=False, padding=False)["input_ids"]
    inner = tokenizer("a", add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    for start in range(len(outer) - len(inner) + 1):
        if inner and outer[start : start + len(inner)] == inner:
            return list(outer[:start]), list(outer[start + len(inner) :])
    raise ValueError(f"the tokenizer turns 'a' into {inner}, which is not part of {outer} with special tokens")


def ending_in_template(text_tokenizer: TextTokenizer) -> Any:
    """A copy of the tokenizer that gives by itself the ids that `text_tokenizer` gives to a plain passage.

    Pads and truncates on the right; `model_max_length` is `passage_length`; EOS pads where there is no padding token.
    """
    exported = copy.deepcopy(text_tokenizer.tokenizer)
    exported.padding_side = exported.truncation_side = "right"
    exported.model_max_length = text_tokenizer.contract.passage_length
    if exported.pad_token_id is None:
        exported.pad_token = exported.eos_token
    backend = getattr(exported, "backend_tokenizer", None)
    if backend is None:
        return exported
    backend.no_truncation()
    backend.no_padding()
    if text_tokenizer.appended_ids:
        _set_template(exported, backend, text_tokenizer.prefix_ids, text_tokenizer.suffix_ids)
    return exported


def _set_template(exported: Any, backend: Any, prefix_ids: list[int], suffix_ids: list[int]) -> None:
    from tokenizers.processors import TemplateProcessing

    before, after = (exported.convert_ids_to_tokens(ids) for ids in (prefix_ids, suffix_ids))

    def around(text: str, segment: int) -> list[str]:
        return [f"{piece}:{segment}" for piece in (*before, text, *after)]

    backend.post_processor = TemplateProcessing(
        single=around("$A", 0),
        pair=around("$A", 0) + around("$B", 1),
        special_tokens=list(dict(zip([*before, *after], [*prefix_ids, *suffix_ids], strict=True)).items()),
    )


def _plain_backend(tokenizer: Any) -> Any:
    """The tokenizer proper, which neither pads nor truncates; None for one in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # a copy: a tokenizer file may carry truncation and padding of its own, and others use the original
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()
    return backend
