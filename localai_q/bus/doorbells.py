"""Ringing: the Celery messages that tell a consumer to look. Owns how they are sent; they carry one id and no truth."""

from __future__ import annotations

import kombu.exceptions
import redis
from celery import Celery

from localai_q.errors import Unavailable


class Doorbells:
    """Sends tasks through Celery."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def ring(self, task: str, argument: str, *, queue: str) -> None:
        """Send the task with its one id.

        Raises:
            Unavailable: the broker cannot be reached.
        """
        try:
            # Events tell the arguments' text to whoever may listen; a job's id is for those that hold the job.
            self._app.send_task(
                task, args=[argument], queue=queue, ignore_result=True, retry=False, argsrepr="-", kwargsrepr="-"
            )
        except (kombu.exceptions.OperationalError, redis.RedisError, OSError) as error:
            raise Unavailable("The queue (Redis) cannot be reached at the moment. Try again soon.") from error
