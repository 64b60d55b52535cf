"""The last step before a child's own program: ties the child to its parent's life, drops privileges, and execs.

Run as a script by `localai_q.processes.spawn`, with `python -I -S`, so it imports the standard library only. It owns
nothing that outlives the exec; whom to start and when to stop it is left to its caller.

Usage: exec_child.py PARENT_PID DEATH_SIGNAL UID GID PROGRAM [ARGUMENT...]     (UID and GID -1: leave as they are)
"""

import os
import signal
import sys

if sys.platform == "linux":
    import ctypes  # here: after the change of user, the interpreter's own folder may be out of reach

PR_SET_PDEATHSIG = 1


def drop_privileges(uid: int, gid: int) -> None:
    """Become user `uid` of group `gid`, with no other groups, for good."""
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def die_with_parent(parent: int, death_signal: int) -> None:
    """Ask the kernel (Linux) for `death_signal` when the parent's spawning thread ends; exit if it ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(1)


def restore_signals() -> None:
    """Undo what the interpreter did to signals, and what the spawning thread had blocked."""
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def main(arguments: list[str]) -> None:
    """Become the program that `arguments` name; exits with 127 when it cannot be run."""
    parent, death_signal, uid, gid = (int(number) for number in arguments[:4])
    program = arguments[4:]
    if uid >= 0:
        drop_privileges(uid, gid)
    die_with_parent(parent, death_signal)  # after the change of user, which clears the parent-death signal
    restore_signals()
    try:
        os.execvp(program[0], program)  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"cannot run {program[0]}: {error.strerror}\n")
        raise SystemExit(127) from None


if __name__ == "__main__":
    main(sys.argv[1:])
