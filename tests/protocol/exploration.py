"""Every course that one job can take in a small world, tried on the real scripts. Owns the world's moves, what must hold
after each, and the search; what Redis makes of a move comes from `redis_as_value`.

A state is what Redis holds and what each process believes. A move is one call to Redis or one fault; faults come from a
budget, so the world is finite, and whatever may happen at the same time is tried in every order. The search is
breadth-first: what it finds first has a shortest course that leads there. Times do not exist here: a lease runs out by a
move, at any moment, and a process that makes no move meanwhile has been paused.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import redis
from redis_as_value import ALIVE, EXPIRED, Content, Stored

from localai_q import names
from localai_q.bus.journal import RECHECK, Reader
from localai_q.bus.leases import Append, Lease, Leases, Refusal, Submission
from localai_q.cluster.events import Delta, End, decode, encode
from localai_q.cluster.jobs import DEATHS
from localai_q.errors import GenerationFailed
from localai_q.services.jobs import REBUILT

JOB = "j"
LINE = names.model_queue("m")
REVISION = 2  # of the model when the job was accepted
POISON = "!"  # as many have died of the job as may; no owner's name
KEPT = (Append.WRITTEN, Append.CANCEL)


class Violation(Exception):
    """Something happened that must not."""


class Budget(NamedTuple):
    """How many faults of each kind may still happen."""

    pauses: int = 0  # a lease runs out though its owner lives
    crashes: int = 0  # an owner dies and comes back under another name
    doubles: int = 0  # a doorbell rings once more
    aborts: int = 0  # somebody wants the job to end
    forced: int = 0  # its deadline has long passed
    losses: int = 0  # the answer to a write is lost, so it is written again
    delays: int = 0  # a write is given up by its owner and reaches Redis later
    releases: int = 0  # an owner gives the job back
    holes: int = 0  # Redis loses the journal and nothing else
    wipes: int = 0  # Redis loses everything
    failovers: int = 0  # Redis loses what was written since some moment
    expiries: int = 0  # Redis forgets the job because it ended long ago


class Hand(NamedTuple):
    """One thread of an owner."""

    owner: str
    phase: str = "idle"  # idle | working | stopping | refused
    lease: int = -1
    written: tuple[str, ...] = ()
    unsure: bool = False  # whether its next entry may have been written already
    lost: bool = False  # whether it was told that Redis has lost the job
    end: str = ""  # what it will say when it is stopping

    def idle(self) -> Hand:
        return Hand(self.owner)


class Delayed(NamedTuple):
    """A write that is under way to Redis while nobody waits for its answer."""

    what: str
    hand: int
    args: tuple[Any, ...]


class Shown(NamedTuple):
    """What a client has seen of the stream."""

    place: tuple[int, int] = (0, 0)
    text: str = ""
    end: str = ""  # the job's, or "broken": the reader found that entries were lost


class State(NamedTuple):
    redis: int
    hands: tuple[Hand, ...]
    left: Budget
    bells: int = 0
    looked: str = ""  # what control has found out of the job's lease: EXPIRED, or POISON
    heard: str = ""  # what a web process has: an owner of the job that is dead, or POISON
    dead: tuple[str, ...] = ()  # owners whose death control has not heard of
    delayed: Delayed | None = None
    older: int = -1  # what a replica of Redis holds that follows no more
    shown: Shown = Shown()
    row: str = ""  # the end that Postgres knows


class Move(NamedTuple):
    name: str
    after: State
    fault: bool = False  # nothing may depend on its happening
    by: tuple[str, int] | None = None  # owner and attempt, if it was a write of theirs that was accepted
    silent: bool = False  # whether the client hears nothing of what it puts into the journal
    may_take: bool = False  # whether the job may lose its owner by it though the lease is alive
    loses: bool = False  # whether Redis loses data by it


@dataclass(frozen=True)
class World:
    """The bounds of a search."""

    faults: Budget
    owners: tuple[str, ...] = ("A", "B")  # one hand each; the same name twice is a process with two threads
    whole: str = "ab"  # the answer that nobody may see a part of missing or doubled
    outdated: tuple[str, ...] = ()  # owners that serve an older revision of the model than was asked for

    client: bool = True  # whether somebody reads along where Redis may lose something

    @property
    def loses(self) -> bool:
        """Whether Redis may lose something, so that it matters what others have seen of it."""
        return any(self.faults[Budget._fields.index("holes") :])


@dataclass
class Explored:
    """What a search has found."""

    states: int = 0
    moves: int = 0
    asked: int = 0  # calls that the scripts have answered; all others were the same call to the same content
    violation: str = ""
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        steps = "".join(f"\n  {number}. {name}" for number, name in enumerate(self.trace, 1))
        return f"{self.states} states, {self.moves} moves, {self.asked} calls. {self.violation}{steps}"


class View(NamedTuple):
    """What a content of Redis says of the job."""

    state: str | None
    attempt: int
    owner: str | None
    lease: str | None
    waits: bool
    journal: tuple[tuple[int, int, Delta | End], ...]  # attempt, index, token or end; markers left out
    newest: int  # attempt of the journal's last entry or marker; 0 without one
    ends: tuple[tuple[str, str], ...]


@lru_cache(maxsize=1 << 16)
def view(content: Content) -> View:
    found = {key: values for key, _, values in content}
    job = _pairs(found.get(names.job_key(JOB), ()))
    journal = _pairs(found.get(names.journal_key(JOB), ()))
    ends = [(key, text) for key, kind, values in content if key.startswith("ends:") for text in _pairs(values).values()]
    return View(
        state=job.get("state"),
        attempt=int(job.get("attempt", 0)),
        owner=job.get("owner"),
        lease=_pairs(found.get(names.leases_key(LINE), ())).get(JOB),
        waits=JOB in found.get(names.waiting_key(LINE), ()),
        journal=tuple(_entries(journal)),
        newest=_place([*journal, "0-0"][-2 if journal else -1])[0],
        ends=tuple(ends),
    )


def _pairs(flat: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _entries(journal: dict[str, str]) -> Iterator[tuple[int, int, Delta | End]]:
    for place, text in journal.items():
        attempt, _, index = place.partition("-")
        event = decode(text)
        if isinstance(event, Delta | End):
            yield int(attempt), int(index), event


class Exploration:
    """A search through one world, on one set of scripts."""

    def __init__(self, client: redis.Redis, leases: Leases, world: World) -> None:
        self.world = world
        self.stored = Stored(client, leases)
        self._leases = leases
        self._redis = client
        self._epoch = ""  # that a script is offered, if it needs one

    def run(self) -> Explored:
        """Visit every state, or stop at the first that must not be."""
        with mock.patch.object(names, "new_id", self._offered):
            return self._run()

    def _offered(self) -> str:
        return self._epoch

    def _run(self) -> Explored:
        found = Explored()
        first = self._first()
        came: dict[State, tuple[State, str] | None] = {first: None}
        back: dict[State, list[State]] = {}  # by moves that are no faults
        todo = deque([first])
        while todo:
            state = todo.popleft()
            try:
                for move in self._checked(state):
                    found.moves += 1
                    if not move.fault:
                        back.setdefault(move.after, []).append(state)
                    if move.after not in came:
                        came[move.after] = (state, move.name)
                        todo.append(move.after)
            except Violation as violation:
                found.violation = violation.args[0]
                found.trace = _trace(came, state) + list(violation.args[1:])
                break
        found.states, found.asked = len(came), self.stored.asked
        if not found.violation:
            self._check_that_all_can_end(came, back, found)
        return found

    def _first(self) -> State:
        return State(self._submitted(0), tuple(map(Hand, self.world.owners)), self.world.faults)

    # What must hold.

    def _checked(self, state: State) -> Iterator[Move]:
        """The moves from this state, each looked at."""
        before = self._view(state)
        writers: dict[tuple[str, int], str] = {}
        for move in self._moves(state):
            try:
                self._check_content(self._view(move.after))
                self._check_step(before, self._view(move.after), move)
                self._check_that_it_stays_over(state, move)
                if move.by:
                    writers[move.by] = move.name
                    self._check_writers(before, writers)
            except Violation as violation:
                raise Violation(violation.args[0], move.name) from None
            yield move

    def _check_content(self, now: View) -> None:
        places = [(attempt, index) for attempt, index, _ in now.journal]
        tokens = [said for _, _, said in now.journal if isinstance(said, Delta)]
        ends = [said for _, _, said in now.journal if isinstance(said, End)]
        _require(places == sorted(places), "attempts fall in the journal", places)
        _require(
            [index for _, index in places] == list(range(1, len(places) + 1)), "indexes have gaps or repeat", places
        )
        text = self._checked_text("", tokens)
        _require(len(ends) == (now.state == "ended"), "not one end of an ended job", now)
        _require(len(now.ends) == len(ends) or self.world.loses, "not one end for control", now)
        if ends:
            _require(now.journal[-1][2] is ends[0], "there is something behind the end", now.journal)
            _require(
                ends[0].state != "done" or _letters(text) == self.world.whole, "an answer is done and not whole", text
            )
        standing = {"waiting": (True, False), "leased": (False, True)}.get(now.state or "", (False, False))
        _require((now.waits, now.lease is not None) == standing, "the job does not stand in one place", now)
        old = now.state == "leased" and now.owner is not None and self._is_outdated(now.owner)
        _require(not old, "an older revision has the job", now.owner)

    def _checked_text(self, text: str, tokens: list[Delta]) -> str:
        """The text with these tokens behind it, if their owners wrote them behind just that."""
        for token in tokens:
            _require(token.reasoning == text, f"{token.text!r} was written behind {token.reasoning!r}", f"not {text!r}")
            text += token.text
        _require(self.world.whole.startswith(_letters(text)), "the text is not the answer's", text)
        return text

    def _check_step(self, before: View, after: View, move: Move) -> None:
        if move.loses:
            return
        _require(after.attempt >= before.attempt, "the attempt falls", after.attempt)
        if before.state == "ended":
            _require(after._replace(ends=before.ends) == before, "an ended job changes", after)
        if before.state == "leased" and before.lease == ALIVE and not move.may_take and move.by is None:
            kept = after.state == "leased" and after.attempt == before.attempt and after.owner == before.owner
            _require(kept, "an owner loses the job though its lease is alive", after)

    def _check_that_it_stays_over(self, state: State, move: Move) -> None:
        """What expired stays so. What Redis lost may be given back even then: it cannot know that it was over."""
        if state.row and not self._view(state).state and not self.world.faults.wipes:
            _require(not self._view(move.after).state, "a job that is over comes back", move.name)

    def _check_writers(self, before: View, writers: dict[tuple[str, int], str]) -> None:
        _require(before.state == "leased", "a write is accepted though nobody has the job", before)
        _require(len(writers) == 1, "the writes of two owners would be accepted", sorted(writers.values()))

    def _check_that_all_can_end(
        self, came: dict[State, tuple[State, str] | None], back: dict[State, list[State]], found: Explored
    ) -> None:
        good = {state for state in came if self._is_over(state)}
        todo = deque(good)
        while todo:
            for state in back.get(todo.popleft(), ()):
                if state not in good:
                    good.add(state)
                    todo.append(state)
        stuck = next((state for state in came if state not in good), None)
        if stuck:
            found.violation = "the job cannot end any more, or its reader not learn of it, unless by a fault"
            found.trace = _trace(came, stuck)

    def _is_over(self, state: State) -> bool:
        """Whether the job has ended, and who reads along knows it or has nothing left to read."""
        now = self._view(state)
        told = not self.world.loses or not self._reads(state) or not now.newest
        return told and bool(state.row or now.state == "ended")

    # What can happen.

    def _moves(self, state: State) -> Iterator[Move]:
        for move in self._calls(state):
            yield move
            if self.world.loses and not move.loses and not move.silent:
                yield from self._heard(state, move)

    def _heard(self, state: State, move: Move) -> Iterator[Move]:
        """The same, if what it puts into the journal reaches the client by an announcement."""
        before, after = self._view(state).journal, self._view(move.after).journal
        if len(after) > len(before) and self._reads(state):
            shown = self._read_on(move.after, after[-1])
            if shown != state.shown:
                yield move._replace(name=f"{move.name}, {_seen(shown)}", after=move.after._replace(shown=shown))

    def _calls(self, state: State) -> Iterator[Move]:
        for number, hand in enumerate(state.hands):
            yield from self._moves_of_hand(state, number, hand)
        yield from self._moves_of_control(state)
        yield from self._moves_of_others(state)
        yield from self._faults(state)
        if self.world.loses:
            yield from self._losses(state)
            yield from self._moves_of_those_who_know(state)

    def _moves_of_hand(self, state: State, number: int, hand: Hand) -> Iterator[Move]:
        match hand.phase:
            case "idle":
                if state.bells:
                    yield self._claim(state, number, hand)
            case "refused":
                yield self._abort(state, f"{hand.owner} ends the cancelled job", hand=number)
            case _ if hand.lost:
                yield self._restore(state, number, hand)
            case _:
                yield self._renew(state, number, hand)
                yield from self._write(state, number, hand)
                if hand.phase == "working" and not hand.unsure and state.left.releases:
                    yield from self._release(state, number, hand)
        if hand.phase != "idle" and state.left.crashes:
            yield self._crash(state, hand)

    def _claim(self, state: State, number: int, hand: Hand) -> Move:
        after, (lease, answer) = self._call(state.redis, "claim", self._claimed, hand.owner, self._new_epoch(state))
        rings = isinstance(answer, Refusal) and answer.why == "newer"  # again, for others
        state = state._replace(redis=after, bells=state.bells - (not rings))
        if isinstance(answer, Refusal):
            hand = hand._replace(phase="refused") if answer.why == "cancelled" else hand
            return Move(f"{hand.owner} claims: {answer.why}", _with(state, number, hand))
        name = f"{hand.owner} claims: attempt {answer.attempt} behind {answer.last_index}"
        hand = hand._replace(phase="working", lease=lease)
        return Move(name, _with(state, number, _stopping(hand, "failed") if answer.deaths >= DEATHS else hand))

    def _claimed(self, owner: str, epoch: str) -> tuple[int, Lease | Refusal]:
        self._epoch = epoch
        serves = REVISION - self._is_outdated(owner)
        answer = self._leases.claim(JOB, LINE, owner=owner, node_id=owner, revision=serves)
        return -1 if isinstance(answer, Refusal) else self.stored.number_of(answer), answer

    def _is_outdated(self, owner: str) -> bool:
        return owner.rstrip("'") in self.world.outdated

    def _restore(self, state: State, number: int, hand: Hand) -> Move:
        key = (hand.lease, self._own(hand), self._new_epoch(state))
        after, lease = self._call(state.redis, "restore", self._restored, *key)
        hand = hand.idle() if lease is None else hand._replace(lease=lease, lost=False)
        name = f"{hand.owner} gives back what Redis lost: {'refused' if lease is None else 'goes on'}"
        now = view(self.stored.contents[after])
        if lease is not None and (now.owner, now.attempt) != self._writer(lease):
            raise Violation(f"an owner goes on with a job that is not its own: {now}", name)
        # Who has the job still writes like others; who claimed it later than all that Redis knows of takes it back.
        (_, attempt), known = self._writer(key[0]), self._view(state).attempt
        by = self._writer(key[0]) if lease is not None and attempt == known else None
        state = _with(state._replace(redis=after), number, hand)
        return Move(name, state, by=by, may_take=attempt > known, silent=True)

    def _restored(self, number: int, own: tuple[Delta, ...], epoch: str) -> int | None:
        self._epoch = epoch
        lease = self._leases.restore(self.stored.lease(number), own)
        return lease and self.stored.number_of(lease)

    def _renew(self, state: State, number: int, hand: Hand) -> Move:
        after, [answer] = self._call(
            state.redis, "renew", lambda lease: self._leases.renew([self.stored.lease(lease)]), hand.lease
        )
        by = self._writer(hand.lease) if answer in KEPT else None
        name = f"{hand.owner} renews: {_shown(answer)}"
        return Move(name, _with(state._replace(redis=after), number, _told(hand, answer)), by=by)

    def _write(self, state: State, number: int, hand: Hand) -> Iterator[Move]:
        """The next token, or the end behind the last."""
        before = self._text(hand)
        letter = self.world.whole[len(_letters(before)) :][:1]
        index = self.stored.lease(hand.lease).last_index + 1 + len(hand.written)
        if letter and (hand.phase == "working" or hand.unsure):
            token = letter + hand.owner
            write = Delayed("append", number, (hand.lease, index, token, before))
        else:
            token = ""
            write = Delayed("finish", number, (hand.lease, index, hand.end or "done"))
        after, answer = self._do(state.redis, hand.owner, write)
        by = self._writer(hand.lease) if answer in KEPT else None
        name = f"{hand.owner} {_said(write)}: {_shown(answer)}"
        if token and by:
            self._check_that_it_is_written(after, write, name)
        told = _told(hand, answer, token) if token or answer is Append.LOST else hand.idle()
        yield Move(name, _with(state._replace(redis=after), number, told), by=by)
        again = hand._replace(unsure=bool(token))
        if state.left.losses and answer is not Append.LOST:
            lost = _with(_spent(state, "losses")._replace(redis=after), number, again)
            yield Move(f"{name}, but the answer is lost", lost, fault=True, by=by)
        if state.left.delays and state.delayed is None:
            late = _with(_spent(state, "delays")._replace(delayed=write), number, again)
            yield Move(f"{hand.owner} {_said(write)}, which is delayed", late, fault=True)

    def _check_that_it_is_written(self, after: int, write: Delayed, name: str) -> None:
        lease, index, token, _ = write.args
        place = (self.stored.lease(lease).attempt, index, token)
        journal = [
            (attempt, at, getattr(said, "text", "")) for attempt, at, said in view(self.stored.contents[after]).journal
        ]
        if place not in journal:
            raise Violation(f"what an owner was told is written is not in the journal: {journal}", name)

    def _release(self, state: State, number: int, hand: Hand) -> Iterator[Move]:
        write = Delayed("release", number, (hand.lease,))
        after, answer = self._do(state.redis, hand.owner, write)
        by = self._writer(hand.lease) if answer in KEPT else None
        name = f"{hand.owner} {_said(write)}"
        told = _told(hand, answer) if answer is Append.LOST else hand.idle()
        spent = state if answer is Append.LOST else _spent(state, "releases")
        yield Move(f"{name}: {_shown(answer)}", _with(spent._replace(redis=after), number, told), fault=True, by=by)
        if state.left.delays and state.delayed is None:
            late = _spent(_spent(state, "releases"), "delays")._replace(delayed=write)
            yield Move(f"{name}, which is delayed", _with(late, number, hand.idle()), fault=True)

    def _writer(self, number: int) -> tuple[str, int]:
        lease = self.stored.lease(number)
        return lease.owner, lease.attempt

    def _own(self, hand: Hand) -> tuple[Delta, ...]:
        text, own = self._text(hand._replace(written=())), []
        for token in hand.written:
            own.append(_token(token, text))
            text += token
        return tuple(own)

    def _text(self, hand: Hand) -> str:
        """The job's, as far as this hand knows."""
        return _text_of(self.stored.lease(hand.lease).journal) + "".join(hand.written)

    def _crash(self, state: State, hand: Hand) -> Move:
        state = _spent(state, "crashes")
        hands = tuple(Hand(f"{each.owner}'") if each.owner == hand.owner else each for each in state.hands)
        return Move(f"{hand.owner} dies", state._replace(hands=hands, dead=(*state.dead, hand.owner)), fault=True)

    def _moves_of_control(self, state: State) -> Iterator[Move]:
        now = self._view(state)
        if state.looked:
            yield self._take_up_again(state, "looked")
        elif now.lease == EXPIRED:
            yield Move("control sees that the lease ran out", state._replace(looked=EXPIRED))
        if state.heard:
            yield self._take_up_again(state, "heard")
        else:
            for owner in state.dead:
                left = tuple(each for each in state.dead if each != owner)
                heard = owner if now.lease and now.owner == owner else ""
                yield Move(f"a web process hears that {owner} is dead", state._replace(dead=left, heard=heard))
        if now.waits and not state.bells:
            yield Move("control rings", state._replace(bells=1))

    def _take_up_again(self, state: State, why: str) -> Move:
        """What `services.jobs` does about a job whose owner is dead, by what it has found out before."""
        found, who = getattr(state, why), {"looked": "control", "heard": "a web process"}[why]
        if found == POISON:
            return self._abort(state._replace(**{why: ""}), f"{who} ends the job that its owners died of")
        dead = "" if found == EXPIRED else found
        # Who is known to be dead loses the job before its lease runs out.
        may_take = bool(dead) and self._view(state).owner == dead
        after, deaths = self._call(state.redis, "requeue", lambda dead: self._leases._requeue(JOB, LINE, dead), dead)
        then = POISON if deaths >= DEATHS else ""
        return Move(f"{who} puts the job back: {deaths}", state._replace(redis=after, **{why: then}), may_take=may_take)

    def _moves_of_others(self, state: State) -> Iterator[Move]:
        if state.left.aborts and self._is_lost(state):
            # Whoever wants the end of a job that is lost brings it back, and then ends it by force: if nothing stops him.
            spent = _spent(state, "aborts")
            forced = spent.left._replace(forced=spent.left.forced + 1)
            back = spent._replace(redis=self._submitted(REBUILT), left=forced)
            yield Move("somebody brings the job back to abort it", back, fault=True)
        elif state.left.aborts:
            yield self._abort(_spent(state, "aborts"), "somebody aborts the job")._replace(fault=True)
        if state.left.forced:
            yield self._abort(_spent(state, "forced"), "control ends the late job", force=True)._replace(fault=True)
        if state.delayed:
            write = state.delayed
            owner = self.stored.lease(write.args[0]).owner
            after, answer = self._do(state.redis, owner, write)
            by = self._writer(write.args[0]) if answer in KEPT else None
            name = f"it arrives that {owner} {_said(write)}: {_shown(answer)}"
            yield Move(name, state._replace(redis=after, delayed=None), fault=True, by=by)

    def _abort(self, state: State, name: str, *, hand: int | None = None, force: bool = False) -> Move:
        after, answer = self._call(
            state.redis,
            "abort",
            lambda force: self._leases.abort(JOB, LINE, End(state="cancelled"), force=force),
            force,
        )
        state = state._replace(redis=after)
        state = state if hand is None else _with(state, hand, state.hands[hand].idle())
        return Move(f"{name}: {answer}", state, may_take=force)

    def _faults(self, state: State) -> Iterator[Move]:
        now = self._view(state)
        if now.lease == ALIVE:
            alone = not any(self._has(hand, now) for hand in state.hands)
            if alone or state.left.pauses:
                after = self.stored.edit(state.redis, _expire)
                spent = state if alone else _spent(state, "pauses")
                yield Move("the lease runs out", spent._replace(redis=after), fault=not alone)
        if state.bells and state.left.doubles:
            yield Move("the doorbell doubles", _spent(state, "doubles")._replace(bells=state.bells + 1), fault=True)

    def _losses(self, state: State) -> Iterator[Move]:
        now = self._view(state)
        if state.left.holes and now.state == "leased":
            after = self.stored.edit(state.redis, _without_journal)
            hole = _spent(state, "holes")._replace(redis=after)
            yield Move("Redis loses the journal", hole, fault=True, may_take=True, loses=True)
        if state.left.wipes and now.state:
            wiped = _spent(state, "wipes")._replace(redis=self.stored.number(()))
            yield Move("Redis loses everything", wiped, fault=True, may_take=True, loses=True)
        if state.left.expiries and now.state == "ended" and state.row:
            gone = _spent(state, "expiries")._replace(redis=self.stored.edit(state.redis, _without_job))
            yield Move("Redis forgets the job, which is over", gone, fault=True, loses=True)
        if state.left.failovers and now.state:
            yield Move(
                "a replica of Redis falls behind", _spent(state, "failovers")._replace(older=state.redis), fault=True
            )
        if state.older not in (-1, state.redis):
            failed = state._replace(redis=state.older, older=-1)
            yield Move("Redis fails over to that replica", failed, fault=True, may_take=True, loses=True)

    def _moves_of_those_who_know(self, state: State) -> Iterator[Move]:
        """A client that reads, and control, which has the job's row."""
        now = self._view(state)
        shown = self._read_on(state) if self._reads(state) else state.shown
        if shown != state.shown:
            yield Move(_seen(shown), state._replace(shown=shown))
        if now.ends:
            after, _ = self._call(state.redis, "forget", self._forget)
            end = decode(now.ends[0][1].partition(" ")[2])
            assert isinstance(end, End)
            yield Move("control writes the end down", state._replace(redis=after, row=state.row or end.state))
        elif self._is_lost(state):
            yield Move("control brings the job back", state._replace(redis=self._submitted(REBUILT)))

    def _is_lost(self, state: State) -> bool:
        """Whether Redis lacks a job that is open by its row."""
        now = self._view(state)
        return not (now.state or now.ends or state.row)

    def _reads(self, state: State) -> bool:
        return self.world.client and not state.shown.end

    def _read_on(self, state: State, announced: tuple[int, int, Delta | End] | None = None) -> Shown:
        """What the client has seen after an announcement, or a look into the log, by the reader that streams use."""
        shown = state.shown
        now = self._view(state)
        listener = SimpleNamespace(attach=lambda _, after: self._behind(now, after))
        reader = Reader(listener, JOB, queue.Queue())
        reader._place = shown.place
        reader._inbox.put(f"{announced[0]}-{announced[1]} {encode(announced[2])}" if announced else RECHECK)
        text, end = shown.text, ""
        try:
            for entry in filter(None, reader._next()):
                if isinstance(entry.event, End):
                    end = entry.event.state
                else:
                    text = self._checked_text(text, [entry.event])
        except GenerationFailed:
            end = "broken"
        except Violation as violation:
            look = f"the client hears {announced[:2]}" if announced else "the client looks into the log"
            raise Violation(violation.args[0], look) from None
        _require(end != "done" or _letters(text) == self.world.whole, "a client is told that a part is all", text)
        return Shown(reader._place, text, end)

    @staticmethod
    def _behind(now: View, after: tuple[int, int]) -> list[tuple[str, str]]:
        """What the script `attach` gives."""
        if now.newest and after != (0, 0) and after not in [(attempt, index) for attempt, index, _ in now.journal]:
            if now.newest > after[0] or now.state == "ended":
                raise GenerationFailed
            return []
        return [(f"{each[0]}-{each[1]}", encode(each[2])) for each in now.journal if each[:2] > after]

    def _forget(self) -> None:
        writers = [key.partition(":")[2] for key in self._redis.keys(names.ends_key("*"))]
        for node in self._leases.ends(writers):
            self._leases.forget_ends(node, [JOB])

    def _submitted(self, attempt: int) -> int:
        job = Submission(job_id=JOB, line=LINE, request={}, stream=True, attempt=attempt, revision=REVISION)
        after, _ = self._call(
            self.stored.number(()), "submit", lambda _: self._leases.submit(job, longest_line=9), attempt
        )
        return after

    def _new_epoch(self, state: State) -> str:
        faults, left = self.world.faults, state.left
        return f"epoch {faults.wipes - left.wipes + faults.failovers - left.failovers}"

    def _has(self, hand: Hand, now: View) -> bool:
        held = hand.phase in ("working", "stopping")
        return held and hand.owner == now.owner and self.stored.lease(hand.lease).attempt == now.attempt

    def _do(self, number: int, owner: str, write: Delayed) -> tuple[int, Any]:
        deed = {"append": self._append, "finish": self._finish, "release": self._released}[write.what]
        return self._call(number, write.what, deed, owner, *write.args)

    def _append(self, _: str, lease: int, index: int, token: str, before: str) -> Append:
        return self._leases.append([(self.stored.lease(lease), index, [_token(token, before)])])[0]

    def _finish(self, owner: str, lease: int, index: int, end: str) -> Append:
        return self._leases.finish(self.stored.lease(lease), index, End(state=end), node_id=owner)

    def _released(self, _: str, lease: int) -> Append:
        return self._leases.release(self.stored.lease(lease))

    def _call(self, number: int, what: str, deed: Any, *args: object) -> tuple[int, Any]:
        try:
            return self.stored.call(number, what, deed, *args)
        except (redis.ResponseError, KeyError) as error:
            raise Violation(f"a script breaks, or its answer cannot be read: {error}", f"{what} {args}") from error

    def _view(self, state: State) -> View:
        return view(self.stored.contents[state.redis])


def _require(holds: bool, what: str, seen: object) -> None:
    if not holds:
        raise Violation(f"{what}: {seen}")


def _trace(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    names_back = []
    while step := came[state]:
        state, name = step
        names_back.append(name)
    return names_back[::-1]


def _with(state: State, number: int, hand: Hand) -> State:
    return state._replace(hands=(*state.hands[:number], hand, *state.hands[number + 1 :]))


def _spent(state: State, fault: str) -> State:
    return state._replace(left=state.left._replace(**{fault: getattr(state.left, fault) - 1}))


def _told(hand: Hand, answer: Append, token: str = "") -> Hand:
    """What the hand believes after this answer to a write, perhaps of a token."""
    written = hand._replace(written=(*hand.written, token), unsure=False) if token else hand
    match answer:
        case Append.WRITTEN:
            return written
        case Append.CANCEL:
            return _stopping(written, "cancelled")
        case Append.LOST:
            return hand._replace(lost=True)
        case _:
            return hand.idle()


def _stopping(hand: Hand, end: str) -> Hand:
    return hand._replace(phase="stopping", end=hand.end or end)


def _said(write: Delayed) -> str:
    match write.what:
        case "append":
            return f"writes {write.args[2]!r} at {write.args[1]}"
        case "finish":
            return f"ends the job as {write.args[2]} at {write.args[1]}"
        case _:
            return "gives the job back"


def _shown(answer: Append) -> str:
    return answer.name


@lru_cache(maxsize=1 << 16)
def _text_of(journal: tuple[tuple[str, str], ...]) -> str:
    events = [decode(text) for _, text in journal]
    return "".join(event.text for event in events if isinstance(event, Delta))


def _token(token: str, before: str) -> Delta:
    """A token that says, too, which text its owner wrote it behind."""
    return Delta(text=token, reasoning=before, tokens=1)


def _letters(text: str) -> str:
    """The text without the names of its owners."""
    return "".join(filter(str.islower, text))


def _seen(shown: Shown) -> str:
    return f"the client sees {shown.text!r}" + (f" and that it is {shown.end}" if shown.end else "")


def _place(entry: str) -> tuple[int, int]:
    attempt, _, index = entry.partition("-")
    return int(attempt), int(index)


def _expire(content: Content) -> Content:
    key = names.leases_key(LINE)
    return tuple((name, kind, (JOB, EXPIRED) if name == key else values) for name, kind, values in content)


def _without_job(content: Content) -> Content:
    return tuple(item for item in content if item[0] not in (names.job_key(JOB), names.journal_key(JOB)))


def _without_journal(content: Content) -> Content:
    return tuple(item for item in content if item[0] != names.journal_key(JOB))
