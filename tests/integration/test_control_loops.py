"""A loop counts as at work only while its turns succeed."""

import threading
from datetime import datetime
from operator import gt

import pytest
from sqlalchemy import select
from waiting import wait_for

from localai_q.control import loops
from localai_q.control.loops import Control, Loop
from localai_q.services import status
from localai_q.services.wiring import Services
from localai_q.store.tables import leaders


def seen_at_work(services: Services) -> list[datetime]:
    """When each loop was last seen at work."""
    with services.db.transaction() as db:
        return list(db.execute(select(leaders.c.beat_at).order_by(leaders.c.loop)).scalars())


@pytest.mark.parametrize("sound", [True, False])
def test_a_loop_is_ready_while_its_turns_succeed_and_late_when_each_fails(
    services: Services, monkeypatch: pytest.MonkeyPatch, sound: bool
) -> None:
    monkeypatch.setattr(loops, "LEAD", 0.3)
    monkeypatch.setattr(status, "LOOPS_LATE", 0.6)
    turns = []

    def turn(_: Services) -> None:
        turns.append(1)
        if not sound:
            raise ValueError("every time")

    control = Control(services)
    control.loops = [Loop(name, 0.05, turn, threading.Event()) for name in ("ends", "replicas")]
    control.start()
    try:
        assert wait_for(lambda: len(turns) > 5)
        if sound:
            before = seen_at_work(services)
            assert wait_for(lambda: all(map(gt, seen_at_work(services), before)))
        else:
            assert wait_for(lambda: status.readiness(services)["control"].startswith("no turn lately: {"))
    finally:
        control.stop()
