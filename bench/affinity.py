"""What it is worth that a conversation stays with its replica: `python -m bench.affinity`.

Two nodes with a replica each of the default model, in real engines. The same conversations, each a long system prompt of
its own and some turns, are held with each of the two policies, on models that differ in `route_policy` only, in turns in
one run. Prints for each the part of the prompts' tokens that engines found in their caches, and the time to the first
token of the turns after the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cluster import Cluster, running
from localai_q.gallery import catalog

CONTEXT = 2048
SLOTS = 4
TOKENS = 8
AT_ONCE = 2  # requests
PAUSE = 0.1  # seconds between two requests of a client
POLICIES = ("prefix_cache", "round_robin")
SUBJECTS = ("lighthouses", "clocks", "the sea", "foxes", "winter", "trains", "friends", "gardens")
RULES = (
    "You know all about {0} and nothing else. When somebody asks about {0}, answer in one plain sentence. "
    "When somebody asks about anything else, bring the talk back to {0}. Never make lists. "
)


@dataclass
class Found:
    """What one policy gave."""

    firsts: list[float] = field(default_factory=list)  # seconds, of turns after the first
    prompt: int = 0  # tokens of these turns
    cached: int = 0


def hold(cluster: Cluster, model: str, subjects: list[str], turns: int, found: Found) -> None:
    """These conversations, a turn of each after the other."""
    connection = cluster.connection()
    talks: dict[str, list[dict[str, str]]] = {
        subject: [{"role": "system", "content": RULES.format(subject) * 6}] for subject in subjects
    }
    for turn in range(turns):
        for subject, messages in talks.items():
            messages.append({"role": "user", "content": f"Question {turn}: what is best about {subject}?"})
            first, text, usage = ask(cluster, connection, model, messages)
            messages.append({"role": "assistant", "content": text})
            if turn:
                found.firsts.append(first)
                found.prompt += usage["prompt_tokens"]
                found.cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            time.sleep(PAUSE)


def ask(cluster: Cluster, connection: Any, model: str, messages: Any) -> tuple[float, str, dict[str, Any]]:
    """Seconds to the first token, the answer and its usage."""
    body = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    began, first, text, usage = time.perf_counter(), 0.0, "", {}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), cluster.headers())
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        said = "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", ()))
        if said and not first:
            first = time.perf_counter() - began
        text, usage = text + said, chunk.get("usage") or usage
    return first, text, usage


def hold_all(cluster: Cluster, model: str, subjects: list[str], turns: int, found: Found) -> None:
    """All conversations; as many clients as `AT_ONCE` share them out."""
    threads = [
        threading.Thread(target=hold, args=(cluster, model, subjects[first::AT_ONCE], turns, found))
        for first in range(AT_ONCE)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def show(policy: str, found: Found) -> dict[str, float]:
    """The policy's line of the table, and its numbers."""
    numbers = {
        "cached": found.cached / found.prompt,
        "first_p50_ms": 1000 * statistics.median(found.firsts),
        "first_p90_ms": 1000 * statistics.quantiles(found.firsts, n=10)[-1],
    }
    print(f"| {policy} | {numbers['cached']:.0%} | {numbers['first_p50_ms']:.0f} | {numbers['first_p90_ms']:.0f} |")
    return numbers


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of each conversation")
    parser.add_argument("--rounds", type=int, default=2, help="how often each policy has its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args()
    entry = catalog.default_model()
    found = {policy: Found() for policy in POLICIES}
    with running(2) as cluster:
        for policy in POLICIES:
            cluster.add_model(policy, replicas=2, source=entry.source, sha256=entry.sha256, slots=SLOTS,
                              context_size=CONTEXT, threads=1, route_policy=policy)  # fmt: skip
        for turn in range(options.rounds):
            for policy in POLICIES:
                hold_all(cluster, policy, [f"{subject} {turn}" for subject in SUBJECTS], options.turns, found[policy])
    print("| policy | prompt tokens found in caches | first token p50, ms | p90, ms |\n|---|---|---|---|")
    numbers = {policy: show(policy, each) for policy, each in found.items()}
    warm, plain = (numbers[policy] for policy in POLICIES)
    print(f"\nprefix_cache : round_robin = {warm['cached'] / plain['cached']:.2f} of cached tokens, "
          f"{warm['first_p50_ms'] / plain['first_p50_ms']:.2f} of the time to the first token (p50), "
          f"{warm['first_p90_ms'] / plain['first_p90_ms']:.2f} (p90)")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
