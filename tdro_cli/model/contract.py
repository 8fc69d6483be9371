"""The contract that says how a model reads its texts; for processes that only tokenize, it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Pooling = Literal["last_token", "mean", "cls"]
Ending = Literal["eos", "tokenizer"]

CONTRACT_FILE = "tdro_encoder.json"


@dataclass(frozen=True)
class EncoderContract:
    """All that must be known, next to the weights, to get the same embeddings.

    Lengths are in tokens, prompt and special tokens included. `prompts`: {task: prompt}; the keys "query" and
    "document" name the model's own, used where a caller gives none. A prompted text is `query_template`, which must end
    with "{query}"; where the prompt is empty, the text is plain. `ending`: "eos" appends the EOS token where the
    tokenizer's own template ends with no special token; "tokenizer" leaves the template alone.
    """

    pooling: Pooling = "last_token"
    normalize: bool = True
    query_length: int = 128
    passage_length: int = 512
    temperature: float = 0.002
    prompts: Mapping[str, str] = field(default_factory=dict)
    query_template: str = "Instruct: {prompt}\nQuery: {query}"
    ending: Ending = "eos"

    def __post_init__(self) -> None:
        for name, choices in (("pooling", get_args(Pooling)), ("ending", get_args(Ending))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if min(self.query_length, self.passage_length) < 2:
            raise ValueError(f"lengths must be >= 2, got {self.query_length} and {self.passage_length}")
        if not self.query_template.endswith("{query}") or self.query_template.count("{query}") > 1:
            raise ValueError(f"query_template must end with its only {{query}}, got {self.query_template!r}")

    def head(self, prompt: str) -> str:
        """What stands before a text with this prompt; "" for an empty prompt."""
        return self.query_template.removesuffix("{query}").replace("{prompt}", prompt) if prompt else ""

    def query_prompt(self) -> str:
        """The model's own query prompt: the one named "query", else the only one of all tasks, else none."""
        if "query" in self.prompts:
            return self.prompts["query"]
        distinct = set(self.prompts.values())
        return distinct.pop() if len(distinct) == 1 else ""

    def passage_prompt(self) -> str:
        """The model's own passage prompt: the one named "document", else none."""
        return self.prompts.get("document", "")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "prompts": dict(self.prompts)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EncoderContract:
        """The contract from `to_json`; keys that are none of its fields are left aside."""
        return cls(**{f.name: value[f.name] for f in fields(cls) if f.name in value})
