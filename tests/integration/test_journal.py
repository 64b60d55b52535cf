"""Whoever reads a journal gets every entry once and in order, whatever becomes of the announcements."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import redis
from waiting import LIMIT, wait_for

from localai_q import names
from localai_q.bus import journal, presence
from localai_q.bus.journal import Listener, Reader
from localai_q.bus.leases import Append, Lease, Leases, Submission
from localai_q.cluster.events import Delta, End
from localai_q.cluster.jobs import Keep
from localai_q.errors import GenerationFailed, Unavailable

LINE = names.model_queue("m1")
DONE = End(state="done")
NEVER = 3600.0  # seconds


@pytest.fixture
def leases(redis_client: redis.Redis) -> Leases:
    return Leases(redis_client, lease=30.0, journal_ttl=60.0, journal_max=100_000)


@pytest.fixture
def listener(redis_client: redis.Redis) -> Iterator[Listener]:
    found = Listener(redis_client)
    channel = f"web:{found.watcher}"
    assert wait_for(lambda: redis_client.pubsub_numsub(channel)[0][1] == 1)
    yield found
    found.stop()


class Writer:
    """An owner that writes numbered pieces."""

    def __init__(self, leases: Leases, watcher: str) -> None:
        self.job_id = names.new_id()
        self.leases = leases
        leases.submit(Submission(job_id=self.job_id, line=LINE, request={}, watcher=watcher), longest_line=100)
        self.claim()

    def claim(self) -> None:
        lease = self.leases.claim(self.job_id, LINE, owner="r1", node_id="n1")
        assert isinstance(lease, Lease)
        self.lease, self.index = lease, lease.last_index + 1

    def write(self, count: int, *, every: float = 0.0) -> None:
        for _ in range(count):
            batch = [(self.lease, self.index, [Delta(text=f"{self.index} ")])]
            assert self.leases.append(batch) == [Append.WRITTEN]
            self.index += 1
            time.sleep(every)

    def end(self) -> None:
        assert self.leases.finish(self.lease, self.index, DONE, node_id="n1")


def followed(reader: Reader, *, fresh: bool = False, each: Callable[[], object] = lambda: None) -> list:
    """All entries up to the end; `each` is called after every one."""
    found = []
    for entry in reader.entries(fresh=fresh):
        if entry is not None:
            found.append(entry)
            each()
    return found


def texts(entries: list) -> str:
    return "".join(entry.event.text for entry in entries if isinstance(entry.event, Delta))


def numbers(first: int, last: int) -> str:
    return "".join(f"{n} " for n in range(first, last + 1))


def follow_in_background(reader: Reader, **options) -> tuple[threading.Thread, list]:
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(followed(reader, **options)), daemon=True)
    thread.start()
    return thread, found


def test_a_reader_gets_every_entry_live_and_stops_at_the_end(
    leases: Leases, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SILENCE", NEVER)
    monkeypatch.setattr(listener, "attach", lambda *_: [])  # the log says nothing: all is announced
    writer = Writer(leases, listener.watcher)
    reader = listener.open(writer.job_id)
    thread, found = follow_in_background(reader, fresh=True)
    writer.write(200)
    writer.end()
    thread.join(LIMIT)
    assert texts(found) == numbers(1, 200)
    assert [entry.index for entry in found] == list(range(1, 202))
    assert found[-1].event == DONE
    assert found[0].id == "1-1"
    reader.close()
    assert listener.open_readers == 0


def test_two_jobs_and_two_readers_of_one_job_do_not_get_into_each_others_way(
    leases: Leases, listener: Listener
) -> None:
    one, two = Writer(leases, listener.watcher), Writer(leases, listener.watcher)
    readers = [listener.open(one.job_id), listener.open(one.job_id), listener.open(two.job_id)]
    running = [follow_in_background(reader) for reader in readers]
    for writer, count in ((one, 20), (two, 30)):
        writer.write(count)
        writer.end()
    for thread, _ in running:
        thread.join(LIMIT)
    assert [texts(found) for _, found in running] == [numbers(1, 20), numbers(1, 20), numbers(1, 30)]
    readers[0].close()
    assert listener.open_readers == 2


def test_a_reader_that_comes_late_gets_what_it_missed_from_the_log(leases: Leases, listener: Listener) -> None:
    writer = Writer(leases, listener.watcher)
    writer.write(10)
    thread, found = follow_in_background(listener.open(writer.job_id))
    writer.write(5)
    writer.end()
    thread.join(LIMIT)
    assert texts(found) == numbers(1, 15)


def test_a_reader_that_comes_after_the_end_gets_everything(leases: Leases, listener: Listener) -> None:
    writer = Writer(leases, listener.watcher)
    writer.write(3)
    writer.end()
    assert texts(followed(listener.open(writer.job_id))) == numbers(1, 3)


def test_a_long_log_is_read_page_by_page(leases: Leases, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PAGE", 4)
    monkeypatch.setattr(Reader, "_in_silence", lambda _: pytest.fail("a page waited for a silence"))
    writer = Writer(leases, listener.watcher)
    writer.write(8)
    leases.release(writer.lease)
    writer.claim()
    writer.write(9)
    writer.end()
    assert texts(followed(listener.open(writer.job_id))) == numbers(1, 17)


def test_pages_without_an_event_hide_nothing_that_comes_behind_them(
    leases: Leases, listener: Listener, redis_client: redis.Redis
) -> None:
    writer = Writer(leases, listener.watcher)
    writer.write(1)
    for _ in range(2 * journal.PAGE + 1):
        redis_client.xadd(names.journal_key(writer.job_id), {"e": '{"k":"m"}'}, id=f"1-{writer.index}")
        writer.index += 1
    writer.write(2)
    writer.end()
    thread, found = follow_in_background(listener.open(writer.job_id))
    thread.join(LIMIT)
    assert texts(found) == f"1 {writer.index - 2} {writer.index - 1} "


@pytest.mark.parametrize("text", ["", "[]", "{", '{"k":"v"}', '{"k":"e","s":"over"}'])
def test_a_reader_of_what_is_no_event_fails(
    leases: Leases, listener: Listener, redis_client: redis.Redis, text: str
) -> None:
    writer = Writer(leases, listener.watcher)
    redis_client.xadd(names.journal_key(writer.job_id), {"e": text}, id="1-1")
    with pytest.raises(GenerationFailed, match="cannot be read"):
        followed(listener.open(writer.job_id))
    with pytest.raises(GenerationFailed, match="cannot be read"):
        journal.at(redis_client, writer.job_id, (1, 1))


def test_an_announcement_that_cannot_be_read_is_looked_up_in_the_log(
    leases: Leases, listener: Listener, redis_client: redis.Redis
) -> None:
    writer = Writer(leases, "")  # nothing else is announced
    thread, found = follow_in_background(listener.open(writer.job_id), fresh=True)
    writer.write(1)
    for announcement in ("1-1 {", "x-y {}", 'x-y {"k":"f","i":0,"r":"stop"}', ""):
        redis_client.publish(f"web:{listener.watcher}", f"{writer.job_id} {announcement}")
    writer.end()
    thread.join(LIMIT)
    assert texts(found) == numbers(1, 1)


def test_an_entry_is_found_by_its_place(leases: Leases, redis_client: redis.Redis) -> None:
    writer = Writer(leases, "")
    writer.write(2)
    assert journal.at(redis_client, writer.job_id, (1, 2)).event == Delta(text="2 ")
    for place in ((1, 3), (2, 2), (1, 0)):  # the last is the marker of the claim
        assert journal.at(redis_client, writer.job_id, place) is None


def test_who_attaches_hears_of_what_comes_and_who_detaches_last_learns_what_becomes_of_the_job(
    leases: Leases, listener: Listener, redis_client: redis.Redis
) -> None:
    writer = Writer(leases, "another-web")
    job_id = writer.job_id
    assert listener.attach(job_id, (0, 0)) == [("1-0", '{"k":"m"}')]
    assert leases.live([job_id])[job_id].watchers == ("another-web", listener.watcher)
    reader = listener.open(job_id)
    assert listener.detach(job_id) is None, "another reader of this process still waits"
    reader.close()
    assert listener.detach(job_id) is None, "another process still waits"
    assert leases.live([job_id])[job_id].left is None
    redis_client.hset(names.job_key(job_id), "watch", listener.watcher)
    before = presence.now(redis_client)
    assert listener.detach(job_id) is Keep.NOT
    assert before - 0.001 <= leases.live([job_id])[job_id].left <= presence.now(redis_client)
    listener.attach(job_id, (0, 0))
    assert leases.live([job_id])[job_id].left is None
    writer.end()
    assert listener.detach(job_id) is None, "an ended job needs nobody"
    with pytest.raises(Unavailable):  # its owner may be about to restore it, and would name this process again
        listener.detach("unknown")


def test_a_reader_of_a_job_that_nobody_announces_to_it_finds_its_entries(leases: Leases, listener: Listener) -> None:
    writer = Writer(leases, "another-web")
    thread, found = follow_in_background(listener.open(writer.job_id))
    writer.write(5)
    writer.end()
    thread.join(LIMIT)
    assert texts(found) == numbers(1, 5)


def test_announcements_that_are_lost_are_read_from_the_log_once(
    leases: Leases, listener: Listener, redis_client: redis.Redis
) -> None:
    writer = Writer(leases, listener.watcher)
    reader = listener.open(writer.job_id)
    thread, found = follow_in_background(reader)
    cut = 0
    for _ in range(6):
        writer.write(20, every=0.002)
        assert wait_for(lambda: redis_client.pubsub_numsub(f"web:{listener.watcher}")[0][1] == 1)
        cut += redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub", "SKIPME", "yes")
        writer.write(20, every=0.002)
    writer.end()
    thread.join(LIMIT)
    assert cut >= 6
    assert texts(found) == numbers(1, 240)
    assert [entry.index for entry in found] == list(range(1, 242))


def test_a_reader_that_lost_the_last_announcement_still_sees_the_end(leases: Leases, listener: Listener) -> None:
    writer = Writer(leases, listener.watcher)
    reader = listener.open(writer.job_id)
    thread, found = follow_in_background(reader)
    writer.write(3)
    assert wait_for(lambda: len(found) == 0 and writer.index == 4)
    real, listener._deliver = listener._deliver, lambda _: None  # the connection is up and says nothing
    writer.end()
    thread.join(LIMIT)
    listener._deliver = real
    assert [entry.index for entry in found] == [1, 2, 3, 4]


def test_a_reader_that_is_slow_loses_nothing_when_its_queue_overflows(
    leases: Leases, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "QUEUE_SIZE", 4)
    writer = Writer(leases, listener.watcher)
    reader = listener.open(writer.job_id)
    thread, found = follow_in_background(reader, each=lambda: time.sleep(0.003))
    writer.write(200)
    writer.end()
    thread.join(LIMIT)
    assert texts(found) == numbers(1, 200)
    assert [entry.index for entry in found] == list(range(1, 202))


def test_a_second_attempt_goes_on_counting_and_its_marker_is_no_entry(
    leases: Leases, listener: Listener, redis_client: redis.Redis
) -> None:
    writer = Writer(leases, listener.watcher)
    thread, found = follow_in_background(listener.open(writer.job_id))
    writer.write(3)
    assert leases.release(writer.lease)
    writer.claim()
    writer.write(2)
    writer.end()
    thread.join(LIMIT)
    assert [entry.id for entry in found] == ["1-1", "1-2", "1-3", "2-4", "2-5", "2-6"]


def test_a_reader_that_has_seen_what_the_journal_lost_fails_and_says_nothing_twice(
    leases: Leases, listener: Listener, redis_client: redis.Redis
) -> None:
    writer = Writer(leases, listener.watcher)
    writer.write(3)
    entries = listener.open(writer.job_id).entries()
    assert [next(entries).index for _ in range(3)] == [1, 2, 3]
    redis_client.xdel(names.journal_key(writer.job_id), "1-2", "1-3")  # as a fail-over to a replica that lagged does
    leases.release(writer.lease)
    writer.claim()
    writer.write(1)
    with pytest.raises(GenerationFailed, match="lost a part of this stream"):
        [next(entries) for _ in range(3)]


@pytest.mark.parametrize("given_back", [False, True])
def test_a_reader_waits_for_what_its_owner_will_restore(
    leases: Leases, listener: Listener, redis_client: redis.Redis, given_back: bool
) -> None:
    writer = Writer(leases, listener.watcher)
    writer.write(3)
    entries = listener.open(writer.job_id).entries()
    assert [next(entries).index for _ in range(3)] == [1, 2, 3]
    redis_client.xdel(names.journal_key(writer.job_id), "1-2", "1-3")
    if given_back:  # what Redis lost of its own claim, an owner restores even then
        leases.release(writer.lease)
    assert listener.attach(writer.job_id, (1, 3)) == []
    assert listener.attach(writer.job_id, (0, 0))[-1][0] == "1-1"
    assert [next(entries), next(entries)] == [None, None]
    if not given_back:
        assert leases.restore(writer.lease, [Delta(text=f"{n} ") for n in (1, 2, 3)])
        writer.write(1)
        writer.end()
        assert [entry.id for entry in entries if entry] == ["1-4", "1-5"]


def test_a_reader_waits_for_a_journal_that_is_gone_altogether(
    leases: Leases, listener: Listener, redis_client: redis.Redis
) -> None:
    writer = Writer(leases, listener.watcher)
    writer.write(2)
    redis_client.flushall()
    assert listener.attach(writer.job_id, (1, 2)) == []
    assert leases.restore(writer.lease, [Delta(text="1 "), Delta(text="2 ")])
    writer.write(1)
    assert [place for place, _ in listener.attach(writer.job_id, (1, 2))] == ["1-3"]


def test_what_an_earlier_attempt_wrote_is_restored_by_a_later_one_that_knew_it(
    leases: Leases, listener: Listener, redis_client: redis.Redis
) -> None:
    writer = Writer(leases, listener.watcher)
    writer.write(2)
    leases.release(writer.lease)
    writer.claim()
    redis_client.xdel(names.journal_key(writer.job_id), "1-2", "2-2")
    assert listener.attach(writer.job_id, (1, 2)) == []
    assert leases.restore(writer.lease, [])
    writer.write(1)
    assert [place for place, _ in listener.attach(writer.job_id, (1, 2))] == ["2-2", "2-3"]


@pytest.mark.parametrize("how", ["claimed", "ended"])
def test_a_reader_of_what_nobody_will_restore_fails(
    leases: Leases, listener: Listener, redis_client: redis.Redis, how: str
) -> None:
    writer = Writer(leases, listener.watcher)
    writer.write(3)
    if how == "ended":
        writer.end()
    redis_client.xdel(names.journal_key(writer.job_id), "1-2", "1-3")
    if how == "claimed":
        leases.release(writer.lease)
        assert listener.attach(writer.job_id, (1, 3)) == []
        writer.claim()  # the marker says that its owner goes on from something else
    with pytest.raises(GenerationFailed, match="lost a part of this stream"):
        listener.attach(writer.job_id, (1, 3))
    assert [place for place, _ in listener.attach(writer.job_id, (0, 0))][:2] == ["1-0", "1-1"]


def test_a_reader_can_begin_behind_a_place(leases: Leases, listener: Listener) -> None:
    writer = Writer(leases, listener.watcher)
    writer.write(3)
    writer.end()
    assert [entry.id for entry in listener.open(writer.job_id).entries(after=(1, 2)) if entry] == ["1-3", "1-4"]


def test_silence_is_told_as_such_and_a_reader_can_be_woken(
    leases: Leases, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_recheck_all", lambda: None)
    reader = listener.open(Writer(leases, listener.watcher).job_id)
    entries = reader.entries(fresh=True)
    monkeypatch.setattr(journal, "SILENCE", NEVER)
    reader.wake()
    assert next(entries) is None
    monkeypatch.setattr(journal, "SILENCE", 0.2)
    started = time.monotonic()
    assert next(entries) is None
    assert time.monotonic() - started >= journal.SILENCE


def test_the_longer_the_silence_the_rarer_the_looks_into_the_log(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SILENCE", 0.01)
    monkeypatch.setattr(listener, "_recheck_all", lambda: None)
    looks = []
    monkeypatch.setattr(listener, "attach", lambda *_: looks.append(len(ticks)) or [])
    ticks = []
    for tick in listener.open("silent").entries(fresh=True):
        ticks.append(tick)
        if len(ticks) == 40:
            break
    assert looks == [0, 1, 3, 7, 15, 23, 31, 39]


def test_a_reader_waits_for_redis_to_come_back(
    leases: Leases, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(leases, "")  # announces nothing: all is read from the log
    writer.write(2)
    attach, away = listener.attach, [1, 1]

    def sometimes(*arguments):
        if away:
            away.pop()
            raise Unavailable
        return attach(*arguments)

    monkeypatch.setattr(listener, "attach", sometimes)
    writer.end()
    assert texts(followed(listener.open(writer.job_id))) == numbers(1, 2)
    assert not away


def test_the_newest_event_of_jobs_is_read_in_one_trip(leases: Leases, redis_client: redis.Redis) -> None:
    some, fresh = Writer(leases, ""), Writer(leases, "")
    some.write(2)
    found = journal.latest(redis_client, [some.job_id, fresh.job_id, "unknown"])
    assert found == {some.job_id: Delta(text="2 ")}
    assert journal.latest(redis_client, []) == {}


def test_a_web_process_shows_that_it_is_there_from_its_first_moment_and_goes_on_doing_so(
    redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "REFRESHED", 0.05)
    key = names.web_alive_key(Listener(redis_client).watcher)
    assert 0 < redis_client.pttl(key) <= 1000 * presence.LIVES
    for _ in range(3):  # once it may be what a listener says when it begins to listen
        redis_client.delete(key)
        assert wait_for(lambda: redis_client.exists(key))
