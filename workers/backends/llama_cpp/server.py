"""The llama-cpp backend: the service. Its engine answers; what all engines share is `answering`'s and `serving`'s."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import serving
except ModuleNotFoundError:  # in the source tree it lies one folder up
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import serving
import answering
import backend_pb2
import engine


class LlamaCppBackend(answering.AnsweringBackend):
    """The service."""

    def load(self, options: backend_pb2.ModelOptions) -> engine.OneSequence:
        return engine.load(options)


if __name__ == "__main__":
    serving.main(LlamaCppBackend())
