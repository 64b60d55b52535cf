"""Every name that two processes must agree on: queues, tasks, Redis keys and channels. Nothing else lives here.

Names are made of ids (`[a-z0-9]+`), never of what a person called something: ids cannot collide with the grammar of
an ACL pattern and say nothing private.
"""

from __future__ import annotations

import secrets

# Tasks. Their one argument is an id.
RUN_GENERATION = "localai_q.run_generation"  # (job id) on model.<mid> or replica.<rid>
RUN_JOB = "localai_q.run_job"  # (job id) on node.<nid>.jobs
START_REPLICA = "localai_q.start_replica"  # (replica id) on node.<nid>
STOP_REPLICA = "localai_q.stop_replica"  # (replica id) on node.<nid>
PROBE = "localai_q.probe"  # (a new id) on replica.<rid> or node.<nid>.jobs, from its own consumer

CONTROL_QUEUE = "control"

BEGINNING_HEADER = "X-Beginning-SHA256"  # of a part of a file: the SHA-256 of the file from its start to the part's end
WHEEL_HEADER = "X-LocalAI-Wheel"  # of a wheel that a node gives: its `cluster.wheels.WheelKey` as JSON

# Channels.
ENDS_CHANNEL = "ends"  # a node id: that node has ends to be written down
WAKE_CHANNEL = "wake"  # control should look at replicas and jobs now
PREFIXES_CHANNEL = "prefixes"  # what replicas have read, from web process to web process
EVENTS_CHANNELS = "/*.celeryev/*"  # a pattern: Celery's events, by number of the database and kind of event

SERVED_SINCE = "served-since"  # seconds since the epoch: the web has been there without a break
WATCHED_SINCE = "watched-since"  # seconds since the epoch: leases have been judged without a break
EPOCH = "epoch"  # random; another one means that Redis has lost its data


def new_id() -> str:
    """An id that fits every name: 16 characters of `[a-z0-9]`, 80 random bits."""
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"
    return "".join(alphabet[byte & 31] for byte in secrets.token_bytes(16))


def model_queue(model_id: str) -> str:
    return f"model.{model_id}"


def replica_queue(replica_id: str) -> str:
    """As a line, that of the replica's load."""
    return f"replica.{replica_id}"


def node_queue(node_id: str) -> str:
    return f"node.{node_id}"


def node_jobs_queue(node_id: str) -> str:
    return f"node.{node_id}.jobs"


def job_key(job_id: str) -> str:
    """Hash: what is true of a job now, its request, and what reading its answer needs; `submit.lua` begins it."""
    return f"job:{job_id}"


def journal_key(job_id: str) -> str:
    """Stream of the job's events; they are announced on the channels `web:<id>` of those who wait."""
    return f"gen:{job_id}"


def waiting_key(queue: str) -> str:
    """Sorted set of the jobs that wait in a line, by the time they joined it."""
    return f"waiting:{queue}"


def leases_key(queue: str) -> str:
    """Sorted set of the jobs of a line that somebody works on, by the time their lease ends."""
    return f"leases:{queue}"


def ends_key(owner: str) -> str:
    """Hash of job id to end, written by the node `owner`, read and emptied by control."""
    return f"ends:{owner}"


def web_alive_key(watcher: str) -> str:
    """There as long as this web process is."""
    return f"web-alive:{watcher}"


def web_missed_key(watcher: str) -> str:
    """When the sign of life of this web process was first missed, in seconds since the epoch."""
    return f"web-missed:{watcher}"


def pressure_key(model_id: str) -> str:
    """How many requests a replica's load has lately kept from the one that had read the beginning of their prompt."""
    return f"pressure:{model_id}"


def dead_letters(queue: str) -> str:
    """List of what lay on a queue and was no message of ours, the newest first."""
    return f"dead:{queue}"


def broker_keys(queue: str) -> list[str]:
    """Where kombu keeps what lies on a queue, and that there is one, whoever consumes it or rings on it."""
    return [queue, f"_kombu.binding.{queue}", f"_kombu.binding_permanent.{queue}"]


def keys_of_queue(queue: str) -> list[str]:
    """Every key that a consumer of this queue needs: ours, and kombu's."""
    return [*broker_keys(queue), waiting_key(queue), leases_key(queue), dead_letters(queue)]


def unacked_key(node_id: str) -> str:
    """Where kombu keeps what the processes of this node have taken and not acknowledged; the next two belong to it."""
    return f"unacked.{node_id}"


def unacked_index_key(node_id: str) -> str:
    return f"unacked-index.{node_id}"


def unacked_mutex_key(node_id: str) -> str:
    return f"unacked-mutex.{node_id}"


def node_user(node_id: str) -> str:
    """The user that this node is on Redis."""
    return f"node-{node_id}"


def web_channel(watcher: str) -> str:
    """Events of the jobs that this web process waits for; the scripts publish here."""
    return f"web:{watcher}"


def cancel_channel(node_id: str) -> str:
    """Ids of jobs whose work on this node must stop."""
    return f"cancel:{node_id}"
