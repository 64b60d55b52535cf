"""How fast a node will be with a model, from what was measured. Pure.

What was measured of the model on the node itself counts first. Else what is known of the node's other models:

- Decoding: each token of an answer takes all weights through the memory once, so the bandwidth of the memory sets the pace
  (the roofline model: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009; a decode step does about two
  operations for each weight it reads, far below what any processor could do in that time). Tokens per second times bytes
  of weights is therefore about constant on one node.
- Loading reads the weights once: seconds are in proportion to bytes.

Where that was seen with several models, the median counts. Mixtures of experts read a part of their weights only, so that
they are faster than this says, and make others look faster than they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from localai_q.cluster.models import Model


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What was measured of a model on a node; 0 is what was not."""

    node_id: str
    model_id: str
    tokens_per_second: float = 0.0  # of one answer
    load_seconds: float = 0.0


class Speeds:
    """What is to be expected. 0: nothing is known.

    Args:
        models: those that were measured; of others, measures say nothing of their like.
    """

    def __init__(self, measures: Iterable[Measure] = (), models: Iterable[Model] = ()) -> None:
        sizes = {model.id: weight(model) for model in models}
        self._own: dict[tuple[str, str], Measure] = {}
        bandwidths: dict[str, list[float]] = defaultdict(list)
        paces: dict[str, list[float]] = defaultdict(list)
        for measure in measures:
            self._own[measure.node_id, measure.model_id] = measure
            size = sizes.get(measure.model_id, 0)
            if size and measure.tokens_per_second:
                bandwidths[measure.node_id].append(measure.tokens_per_second * size)
            if size and measure.load_seconds:
                paces[measure.node_id].append(measure.load_seconds / size)
        self._bandwidth = {node_id: median(found) for node_id, found in bandwidths.items()}
        self._pace = {node_id: median(found) for node_id, found in paces.items()}

    def tokens_per_second(self, model: Model, node_id: str) -> float:
        """Of one answer of the model on the node."""
        own = self._own.get((node_id, model.id))
        if own and own.tokens_per_second:
            return own.tokens_per_second
        size = weight(model)
        return self._bandwidth.get(node_id, 0.0) / size if size else 0.0

    def load_seconds(self, model: Model, node_id: str) -> float:
        """That the node needs to load the model, once it has the file."""
        own = self._own.get((node_id, model.id))
        if own and own.load_seconds:
            return own.load_seconds
        return self._pace.get(node_id, 0.0) * weight(model)


def weight(model: Model) -> int:
    """Bytes of the model's weights; 0: not known."""
    return model.facts.tensor_bytes if model.facts else model.config.size
