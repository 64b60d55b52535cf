"""The xllamacpp backend: the calls of the service, each handed to the engine and back.

Owns the road of a request through this process, its cancelling included. The engine is `engine`'s, bodies are
`bodies`', replies are `replies`'; the process and the model's lifecycle are `serving`'s.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc

try:
    import serving
except ModuleNotFoundError:  # in the source tree it lies one folder up
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import serving
import backend_pb2
import bodies
import engine
import replies

Chunks = SimpleQueue[dict[str, Any] | None]


class XllamacppBackend(serving.Backend):
    """The service."""

    def load(self, options: backend_pb2.ModelOptions) -> engine.LlamaServer:
        return engine.load(options)

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
                raise serving.Refusal(grpc.StatusCode.INVALID_ARGUMENT, "there is nothing to embed")
            vector, tokens = model.embed(request.Embeddings or list(request.EmbeddingTokens))
            return backend_pb2.EmbeddingResult(embeddings=vector, dim=len(vector), tokens=tokens, prompt_tokens=tokens)

    def Rerank(self, request: backend_pb2.RerankRequest, context: grpc.ServicerContext) -> backend_pb2.RerankResult:
        with self.call(context, request.ModelIdentity) as (model, _):
            model.require("rerank")
            documents = list(request.documents)
            if not documents:
                raise serving.Refusal(grpc.StatusCode.INVALID_ARGUMENT, "there are no documents to rank")
            answer = model.rerank(request.query, documents, max(request.top_n, 0))
            ranked = [
                backend_pb2.RerankDocument(
                    index=item["index"], text=documents[item["index"]], relevance_score=item["relevance_score"]
                )
                for item in answer["results"]
            ]
            ranked.sort(key=lambda document: -document.relevance_score)
            usage = answer["usage"]
            return backend_pb2.RerankResult(
                results=ranked,
                usage=backend_pb2.RerankUsage(total_tokens=usage["total_tokens"], prompt_tokens=usage["prompt_tokens"]),
            )

    def TokenizeString(
        self, request: backend_pb2.PredictOptions, context: grpc.ServicerContext
    ) -> backend_pb2.TokenizationResponse:
        with self.call(context, request.ModelIdentity) as (model, _):
            tokens = model.ask("/tokenize", {"content": request.Prompt, "add_special": False})["tokens"]
            return backend_pb2.TokenizationResponse(length=len(tokens), tokens=tokens)

    def Detokenize(
        self, request: backend_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> backend_pb2.DetokenizeResponse:
        with self.call(context, "") as (model, _):
            return backend_pb2.DetokenizeResponse(
                content=model.ask("/detokenize", {"tokens": list(request.tokens)})["content"]
            )

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
            body = bodies.read_body(request, model.template_has_tools)
            chunks: Chunks = SimpleQueue()
            call.on_stop(lambda: chunks.put(None))
            thread = threading.Thread(target=_generate, args=(model, body, call, chunks), daemon=True)
            thread.start()
        except BaseException:
            call.end()
            raise
        # Whatever ends this generator, the engine must not go on for nobody.
        try:
            yield from _replies(body, chunks, call)
        finally:
            call.stopped.set()


def _generate(model: engine.LlamaServer, body: bodies.Body, call: serving.Call, chunks: Chunks) -> None:
    """Run the request, putting each chunk and then None into the queue."""
    stopped, put = call.stopped.is_set, chunks.put

    def take(chunk: dict[str, Any]) -> bool:
        if stopped():
            return True
        put(chunk)
        return False

    try:
        model.generate(body.kind, body.fields, take)
    except ValueError as error:
        put({"error": {"code": 400, "message": str(error)}})
    except Exception as error:  # noqa: BLE001  (whatever the engine raises is the answer to this request)
        put({"error": {"code": 500, "message": f"{type(error).__name__}: {error}"}})
    finally:
        del model
        call.end()
        put(None)


def _replies(body: bodies.Body, chunks: Chunks, call: serving.Call) -> Iterator[backend_pb2.Reply]:
    answer = replies.Replies(body.kind, body.forced_tool)
    for chunk in iter(chunks.get, None):
        reply = answer.reply(chunk)
        if reply is not None:
            yield reply
        if answer.finished and body.forced_tool:
            call.stopped.set()
            break
    if call.stopped.is_set() and not answer.finished:
        reason = "the model is being freed" if call.freed else "the caller went away"
        raise serving.Refusal(grpc.StatusCode.CANCELLED, reason)
    yield answer.last()


if __name__ == "__main__":
    serving.main(XllamacppBackend())
