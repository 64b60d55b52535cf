"""The road of a request to an engine that takes OpenAI's bodies and calls back with OpenAI's chunks.

Owns the calls of the service that such engines share, and the cancelling of a request. Bodies are `bodies`' and `limits`', replies are
`replies`'; the process and the model's lifecycle are `serving`'. A backend's folder brings the engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import backend_pb2
import bodies
import grpc
import replies
import serving
from serving import Refusal

Chunk = dict[str, Any]
Chunks = SimpleQueue[Chunk | Refusal | None]


class Engine:
    """A loaded model. A subclass sets what is declared here, and does the work."""

    mode: str  # chat | embedding | rerank
    slots: int  # requests that it works on at once
    context_size: int  # tokens that one request may use
    template_has_tools: bool  # whether the chat template shows tools by itself
    thinks: bool

    def metadata(self) -> backend_pb2.ModelMetadataResponse:
        """What it can do."""
        return backend_pb2.ModelMetadataResponse(
            supports_thinking=self.thinks,
            context_size=self.context_size,
            slots=self.slots,
            chat=self.mode == "chat",
            embeddings=self.mode == "embedding",
            rerank=self.mode == "rerank",
        )

    def require(self, mode: str) -> None:
        """Refuse with UNIMPLEMENTED what the model was not loaded for."""
        if mode != self.mode:
            raise Refusal(grpc.StatusCode.UNIMPLEMENTED, f"this model was loaded for {self.mode}, not for {mode}")

    def generate(self, kind: str, fields: Chunk, take: Callable[[Chunk], bool]) -> None:
        """Run a request to its end, calling `take` with each chunk on this thread; True from it cancels.

        Raises:
            Refusal: the request cannot be served.
            ValueError: it cannot be read.
        """
        raise NotImplementedError

    def embed(self, text: str | list[int]) -> tuple[list[float], int]:
        """The vector of a text or of token ids, and how many tokens they were."""
        raise NotImplementedError

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, without those that begin or end a prompt."""
        raise NotImplementedError

    def detokenize(self, tokens: list[int]) -> str:
        """The text of token ids."""
        raise NotImplementedError


class AnsweringBackend(serving.Backend):
    """The service. A subclass gives `load`."""

    def PredictStream(
        self, request: backend_pb2.PredictOptions, context: grpc.ServicerContext
    ) -> Iterator[backend_pb2.Reply]:
        with serving.refusing(context):
            yield from self._answer(request, context)

    def Predict(self, request: backend_pb2.PredictOptions, context: grpc.ServicerContext) -> backend_pb2.Reply:
        with serving.refusing(context):
            return replies.whole(list(self._answer(request, context)))

    def Embedding(
        self, request: backend_pb2.PredictOptions, context: grpc.ServicerContext
    ) -> backend_pb2.EmbeddingResult:
        with self.call(context, request.ModelIdentity) as (model, _):
            model.require("embedding")
            if not request.Embeddings and not request.EmbeddingTokens:
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "there is nothing to embed")
            vector, tokens = model.embed(request.Embeddings or list(request.EmbeddingTokens))
            return backend_pb2.EmbeddingResult(embeddings=vector, dim=len(vector), tokens=tokens, prompt_tokens=tokens)

    def TokenizeString(
        self, request: backend_pb2.PredictOptions, context: grpc.ServicerContext
    ) -> backend_pb2.TokenizationResponse:
        with self.call(context, request.ModelIdentity) as (model, _):
            tokens = model.tokenize(request.Prompt)
            return backend_pb2.TokenizationResponse(length=len(tokens), tokens=tokens)

    def Detokenize(
        self, request: backend_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> backend_pb2.DetokenizeResponse:
        with self.call(context, "") as (model, _):
            return backend_pb2.DetokenizeResponse(content=model.detokenize(list(request.tokens)))

    def _answer(
        self, request: backend_pb2.PredictOptions, context: grpc.ServicerContext
    ) -> Iterator[backend_pb2.Reply]:
        """The replies to a request.

        The engine calls back on the thread that called it, so it has a thread of its own: this one can then answer a
        cancel at once, while the engine's ends at its next chunk and holds the call, and with it the model, until then.
        """
        model, call = self.begin(context, request.ModelIdentity)
        try:
            model.require("chat")
            body = bodies.read_body(request, model.template_has_tools, model.context_size)
            chunks: Chunks = SimpleQueue()
            call.on_stop(lambda: chunks.put(None))
            call.heeds_stop = True
            thread = threading.Thread(target=_generate, args=(model, body, call, chunks), daemon=True)
            thread.start()
        except BaseException:
            call.end()
            raise
        # Whatever ends this generator, the engine must not go on for nobody.
        try:
            yield from _replies(body, chunks, call)
        finally:
            call.stop()


def _generate(model: Engine, body: bodies.Body, call: serving.Call, chunks: Chunks) -> None:
    """Run the request, putting each chunk, what it is refused with, and then None into the queue."""
    stopped, put = call.stopped.is_set, chunks.put

    def take(chunk: Chunk) -> bool:
        if stopped():
            return True
        put(chunk)
        return False

    try:
        model.generate(body.kind, body.fields, take)
    except Refusal as refusal:
        put(refusal)
    except ValueError as error:
        put(Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error)))
    except Exception as error:  # noqa: BLE001  (whatever the engine raises is the answer to this request)
        put(Refusal(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"))
    finally:
        del model
        call.end()
        put(None)


def _replies(body: bodies.Body, chunks: Chunks, call: serving.Call) -> Iterator[backend_pb2.Reply]:
    answer = replies.Replies(body.kind, body.forced_tool)
    for chunk in iter(chunks.get, None):
        if isinstance(chunk, Refusal):
            raise chunk
        reply = answer.reply(chunk)
        if reply is not None:
            yield reply
        if answer.finished and body.forced_tool:
            call.stop()
            break
    if call.stopped.is_set() and not answer.finished:
        reason = "the model is being freed" if call.freed else "the caller went away"
        raise Refusal(grpc.StatusCode.CANCELLED, reason)
    yield answer.last()
