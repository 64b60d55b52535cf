"""Whether work that takes long still moves: by what it says, and by what its processes do. Judges, and ends nothing.

Only time in which this process looked is counted, so that nobody is judged for a time in which it slept.
"""

from __future__ import annotations

from contextlib import suppress

import psutil

from localai_q.cluster.events import Progress

LOOK = 1.0  # seconds between two looks
IDLE_CPU = 0.01  # of a core: what a process uses that only waits, and more
LEAST_CPU = 0.05  # seconds; the kernel counts in hundredths
LEAST_READ = 1 << 20  # bytes
PER_GIB = 20.0  # seconds that loading may take for each GiB, as LocalAI has it
BUSY = (
    900.0  # seconds, and those for each GiB, that loading may work without reading anything: templates can be endless
)
LONGEST = 6 * 3600.0  # seconds without a word, as LocalAI has it for loads: for what is busy for ever
UNREADABLE = (psutil.Error, OSError, RuntimeError)  # psutil passes on some of what the system says


class Watch:
    """One piece of work, with the process that does it; `look` is to be called every `LOOK` seconds.

    Args:
        pid: the process; those that it started belong to it.
        patience: seconds for which nothing may move.
    """

    def __init__(self, pid: int, patience: float) -> None:
        self.elapsed = 0.0  # seconds
        self.still = 0.0  # seconds since anything moved
        self.silent = 0.0  # seconds since it has said something new
        self.unread = 0.0  # seconds since it has read anything
        self._pid = pid
        self._patience = patience
        self._read = 0  # bytes, when that was noted last
        self._seen: dict[int, tuple[float, int]] = {}
        self._at: Progress | None = None

    def note(self, progress: Progress) -> None:
        """It has said how far it is; to say the same again is no progress."""
        if progress != self._at:
            self._at, self.still, self.silent = progress, 0.0, 0.0

    def look(self) -> bool:
        """Whether it has stalled, or is busy for ever; which of both, and where, its text says."""
        self.elapsed += LOOK
        self.still += LOOK
        self.silent += LOOK
        self.unread += LOOK
        if self._moved():
            self.still = 0.0
        return self.still > self._patience or self.silent > LONGEST

    def __str__(self) -> str:
        where = f" at {_place(self._at)}" if self._at else ""
        if self.still > self._patience:
            return f"stalled{where}: nothing moved for {self.still:.0f} s"
        return f"is busy for ever{where}: nothing was heard of its progress for {self.silent:.0f} s"

    def _moved(self) -> bool:
        """Whether its processes have worked, read or changed since that was last so."""
        found = _readings(self._pid)
        read = sum(amount for _, amount in found.values())
        if abs(read - self._read) >= LEAST_READ:  # less, where a process has ended
            self._read, self.unread = read, 0.0
        if found.keys() <= self._seen.keys():
            cpu = sum(used - self._seen[pid][0] for pid, (used, _) in found.items())
            read = sum(amount - self._seen[pid][1] for pid, (_, amount) in found.items())
            if cpu < max(IDLE_CPU * self.still, LEAST_CPU) and read < LEAST_READ:
                return False
        self._seen = found
        return True


def longest(file_size: int, patience: float) -> float:
    """Seconds that a backend may take to load so many bytes without any sign that it moves."""
    return min(patience + PER_GIB * file_size / (1 << 30), LONGEST)


def _place(progress: Progress) -> str:
    stage = progress.stage or progress.note
    amount = f"{progress.done:.0f}" + (f" of {progress.total:.0f}" if progress.total else "")
    return f"{stage} {amount} {progress.unit}".strip() + (f" ({progress.note})" if progress.note else "")


def _readings(pid: int) -> dict[int, tuple[float, int]]:
    """CPU seconds and bytes read of a process and of all below it, by id; of those that can be asked."""
    found = {}
    with suppress(*UNREADABLE):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(*UNREADABLE):
                cpu = sum(process.cpu_times()[:4])  # with that of children that have ended
                found[process.pid] = cpu, _read(process)
    return found


def _read(process: psutil.Process) -> int:
    """Bytes that it has read, from the disk or the page cache; 0 where the system does not count them."""
    try:
        counted = process.io_counters()
    except (*UNREADABLE, AttributeError):
        return 0
    return int(counted.read_bytes) + int(getattr(counted, "read_chars", 0))
