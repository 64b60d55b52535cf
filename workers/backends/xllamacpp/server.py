"""The xllamacpp backend: the service, with what its engine can do besides answering."""

from __future__ import annotations

import sys
from pathlib import Path

import grpc

try:
    import serving
except ModuleNotFoundError:  # in the source tree it lies one folder up
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import serving
import answering
import backend_pb2
import engine


class XllamacppBackend(answering.AnsweringBackend):
    """The service."""

    def load(self, options: backend_pb2.ModelOptions) -> engine.LlamaServer:
        return engine.load(options)

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


if __name__ == "__main__":
    if reason := engine.missing_device():
        sys.exit(reason)
    serving.main(XllamacppBackend())
