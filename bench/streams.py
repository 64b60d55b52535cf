"""What a stream costs: `python -m bench.streams`.

Three parts, each on a cluster of its own with the echo backend, which costs next to nothing itself:

- tokens: processor time a token in each process on its road, and tokens/s, against the bare engine (the same backend
  asked over gRPC) and against a plain loop of PUBLISH and one subscriber, in the same run;
- idle: memory and descriptors at 100, 1,000 and 5,000 open streams that wait in line;
- cancel: how long after a DELETE or a hung-up connection a job has ended and let go of its slot.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import cancel, cost, idle
from bench.cluster import running

PARTS = ["tokens", "idle", "cancel"]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="tokens, idle, cancel; default: all")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement of tokens")
    parser.add_argument("--levels", type=int, nargs="+", default=[100, 1000, 5000], help="numbers of idle streams")
    parser.add_argument("--number", type=int, default=50, help="jobs cancelled in each way")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    parts = options.parts or PARTS
    limit = idle.raise_limit()
    if "idle" in parts and limit < options.levels[-1] + 100:
        parser.error(f"this system allows {limit} open files: ask for fewer --levels, or raise it with 'ulimit -Hn'")
    found: dict[str, Any] = {}
    if "tokens" in parts:
        with running() as cluster:
            found["tokens"] = cost.measure(cluster, options.seconds)
        cost.show(found["tokens"])
    if "idle" in parts:
        with running(**idle.SETTINGS) as cluster:
            found["idle"] = idle.measure(cluster, options.levels)
        idle.show(found["idle"])
    if "cancel" in parts:
        with running() as cluster:
            found["cancel_s"] = cancel.measure(cluster, options.number)
        cancel.show(found["cancel_s"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
