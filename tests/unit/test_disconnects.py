"""A client's end is noticed, also behind a request that it sent ahead."""

import gevent
import pytest
from gevent import socket
from gevent.event import Event
from waiting import LIMIT

from api import disconnects


@pytest.mark.parametrize("ahead", [b"", b"GET / HTTP/1.1\r\n"])
def test_a_client_that_goes_is_noticed_and_one_that_stays_is_not(monkeypatch: pytest.MonkeyPatch, ahead: bytes) -> None:
    monkeypatch.setattr(disconnects, "CHECK", 0.05)
    gone = Event()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client = socket.create_connection(listener.getsockname())
        connection, _ = listener.accept()
    with connection:
        client.sendall(ahead)
        end = disconnects.watch({"gunicorn.socket": connection}, gone.set)
        gevent.sleep(0.2)
        assert not gone.is_set()
        client.close()
        assert gone.wait(LIMIT)
        end()
