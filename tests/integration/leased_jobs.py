"""Jobs with leases on a real Valkey, as the tests of `localai_q.bus.leases` begin with them."""

import redis

from localai_q import names
from localai_q.bus.leases import Append, Lease, Leases, Submission
from localai_q.cluster.events import Delta, End, Usage, decode

LINE = names.model_queue("m1")
JOURNAL_MAX = 50
DONE = End(state="done", usage=Usage(prompt=3, completion=2))
CANCELLED = End(state="cancelled", error={"error": "Cancelled", "message": "no", "param": None})


def submission(job_id: str, **values: object) -> Submission:
    return Submission(**{"job_id": job_id, "line": LINE, "request": {"ask": job_id}, **values})


def submitted(leases: Leases, job_id: str = "j1", **values: object) -> str:
    leases.submit(submission(job_id, **values), longest_line=100)
    return job_id


def claimed(leases: Leases, job_id: str, owner: str = "r1", node_id: str = "n1") -> Lease:
    lease = leases.claim(job_id, LINE, owner=owner, node_id=node_id)
    assert isinstance(lease, Lease), lease
    return lease


def expire(client: redis.Redis, job_id: str) -> None:
    """Let the job's lease run out now."""
    assert client.zadd(names.leases_key(LINE), {job_id: 1}, xx=True, ch=True)


def bereave(leases: Leases, client: redis.Redis, job_id: str = "j1") -> None:
    """Let the job's lease run out now, and control put it back into its line."""
    expire(client, job_id)
    assert job_id in leases.requeue_expired(LINE)


def pieces(*texts: str) -> list[Delta]:
    return [Delta(text=text, tokens=1) for text in texts]


def write(leases: Leases, lease: Lease, index: int, *texts: str) -> Append:
    return leases.append([(lease, index, pieces(*texts))])[0]


def journal(client: redis.Redis, job_id: str) -> list[tuple[str, str]]:
    """Every entry: its id, and its text or kind."""
    rows = client.xrange(names.journal_key(job_id))
    return [(place, getattr(decode(fields["e"]), "text", decode(fields["e"]))) for place, fields in rows]


def everything(client: redis.Redis, job_id: str = "j1") -> tuple:
    """What Redis has of a job: its hash, its journal, and whether somebody holds it."""
    held = client.zscore(names.leases_key(LINE), job_id) is not None
    return client.hgetall(names.job_key(job_id)), client.xrange(names.journal_key(job_id)), held
