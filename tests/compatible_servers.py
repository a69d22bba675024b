"""Servers that speak OpenAI's embeddings API, each with its own limits, forms of error and omissions, on 127.0.0.1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from openai_server import Items, Matrix, OpenAIServer, Reply, hashed

LENGTH = 768
WINDOW = 512
"""Tokens that the servers with a small window read."""


def vectors(texts: Sequence[str]) -> Matrix:
    """Vectors of unit length that no argument makes shorter."""
    found = hashed(texts, LENGTH)
    units: Matrix = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    return units


def answered(status: int, body: Any) -> tuple[int, bytes]:
    return status, body.encode() if isinstance(body, str) else json.dumps(body).encode()


class CompatibleServer(OpenAIServer):
    """No key, 768 numbers whatever is asked for, lists of floats, any model's name.

    Attributes:
        model: The only model, if set.
    """

    paths: tuple[str, ...] = ("/v1/embeddings",)
    model = ""

    def __init__(self) -> None:
        super().__init__(vectors, key=None)

    @property
    def root(self) -> str:
        """The address without ``/v1``."""
        return self.url.removesuffix("/v1")

    def _answer(
        self, path: str, headers: dict[str, str], body: dict[str, Any], texts: list[str], reply: Reply
    ) -> tuple[int, bytes]:
        if reply.status != 200:
            return reply.status, json.dumps({"error": reply.error}).encode()
        if path not in self.paths:
            return self.no_such_path(path)
        return self.refusal(body, texts) or answered(200, self.complete(self._items(body, texts), body, texts))

    def no_such_path(self, path: str) -> tuple[int, bytes]:
        return answered(404, {"detail": "Not Found"})

    def refusal(self, body: dict[str, Any], texts: list[str]) -> tuple[int, bytes] | None:
        return None

    def complete(self, items: Items, body: dict[str, Any], texts: list[str]) -> Any:
        return {
            "object": "list",
            "data": items,
            "model": body["model"],
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        }

    def _items(self, body: dict[str, Any], texts: list[str]) -> Items:
        return [{"object": "embedding", "index": i, "embedding": v.tolist()} for i, v in enumerate(self.vectors(texts))]


class Ollama(CompatibleServer):
    model = "nomic-embed-text"

    def no_such_path(self, path: str) -> tuple[int, bytes]:
        return answered(404, "404 page not found")

    def refusal(self, body: dict[str, Any], texts: list[str]) -> tuple[int, bytes] | None:
        if body["model"] != self.model:
            message = f'model "{body["model"]}" not found, try pulling it first'
            return answered(
                404, {"error": {"message": message, "type": "not_found_error", "param": None, "code": None}}
            )
        if any(self.tokens(text) > WINDOW for text in texts):
            message = "the input length exceeds the context length"
            return answered(400, {"error": {"message": message, "type": "invalid_request_error", "code": None}})
        return None


class VLLM(CompatibleServer):
    def refusal(self, body: dict[str, Any], texts: list[str]) -> tuple[int, bytes] | None:
        message = ""
        if "dimensions" in body:
            message = f'Model "{body["model"]}" does not support matryoshka representation, changing output dimensions.'
        elif longest := max(n for n in map(self.tokens, texts)) > WINDOW:
            message = (
                f"This model's maximum context length is {WINDOW} tokens. However, you requested {longest} tokens."
            )
        return (
            answered(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}) if message else None
        )


class OlderVLLM(VLLM):
    """Its errors have no ``error`` around them."""

    def refusal(self, body: dict[str, Any], texts: list[str]) -> tuple[int, bytes] | None:
        found = super().refusal(body, texts)
        return answered(400, {"object": "error", **json.loads(found[1])["error"]}) if found else None


class TextEmbeddingsInference(CompatibleServer):
    paths = ("/embeddings", "/v1/embeddings")

    def refusal(self, body: dict[str, Any], texts: list[str]) -> tuple[int, bytes] | None:
        if len(texts) > 32:
            message = f"batch size {len(texts)} > maximum allowed batch size 32"
            return answered(422, {"message": message, "type": "Validation"})
        if any(self.tokens(text) > WINDOW for text in texts):
            return answered(413, {"message": f"`inputs` must have less than {WINDOW} tokens.", "type": "Validation"})
        return None


class LlamaCpp(CompatibleServer):
    paths = ("/embeddings", "/v1/embeddings")

    def _answer(self, path: str, *rest: Any) -> tuple[int, bytes]:
        if path == "/embeddings":  # its own form, a list of lists for each token
            return answered(200, [{"index": 0, "embedding": [[0.5] * LENGTH]}])
        return super()._answer(path, *rest)

    def refusal(self, body: dict[str, Any], texts: list[str]) -> tuple[int, bytes] | None:
        for text in texts:
            if (tokens := self.tokens(text)) > WINDOW:
                message = (
                    f"input ({tokens} tokens) is too large to process. increase the physical batch size "
                    f"(current batch size: {WINDOW})"
                )
                return answered(500, {"error": {"code": 500, "message": message, "type": "server_error"}})
        return None


class LMStudio(CompatibleServer):
    """Answers 200 where there is nothing; no usage."""

    def no_such_path(self, path: str) -> tuple[int, bytes]:
        return answered(200, {"error": f"Unexpected endpoint or method. (POST {path})"})

    def complete(self, items: Items, body: dict[str, Any], texts: list[str]) -> Any:
        return {"object": "list", "data": items, "model": body["model"]}

    def refusal(self, body: dict[str, Any], texts: list[str]) -> tuple[int, bytes] | None:
        return answered(500, {"error": "llama_decode returned -1"}) if len(texts) > 8 else None


class OneInList(CompatibleServer):
    """One input a request, and not a word on how many there may be."""

    def refusal(self, body: dict[str, Any], texts: list[str]) -> tuple[int, bytes] | None:
        return answered(400, {"error": {"message": "bad request"}}) if len(texts) > 1 else None


class OneText(CompatibleServer):
    """A single string only; knows no options."""

    def refusal(self, body: dict[str, Any], texts: list[str]) -> tuple[int, bytes] | None:
        if extra := body.keys() - {"model", "input"}:
            found = [{"loc": ["body", name], "msg": "Extra inputs are not permitted"} for name in extra]
            return answered(422, {"detail": found})
        if not isinstance(body["input"], str):
            return answered(
                422, {"detail": [{"loc": ["body", "input"], "msg": "Input should be a valid string, not a list"}]}
            )
        return None


class FirstOnly(CompatibleServer):
    """Embeds the first of the inputs, and says nothing of the others."""

    def complete(self, items: Items, body: dict[str, Any], texts: list[str]) -> Any:
        return super().complete(items[:1], body, texts)


class Unordered(CompatibleServer):
    """In any order."""

    def complete(self, items: Items, body: dict[str, Any], texts: list[str]) -> Any:
        return super().complete(items[::-1], body, texts)


class NoIndex(CompatibleServer):
    """Without numbers, without anything that it need not send."""

    def complete(self, items: Items, body: dict[str, Any], texts: list[str]) -> Any:
        return {"data": [{"embedding": item["embedding"]} for item in items], "usage": None}


SERVERS = (
    Ollama, VLLM, OlderVLLM, TextEmbeddingsInference, LlamaCpp, LMStudio, OneInList, OneText, FirstOnly, Unordered,
    NoIndex,
)  # fmt: skip
