"""Runs a server for as long as the process that asked for it lives.

    python watchdog.py PARENT_PID COMMAND...

The kernel's parent-death signal follows the THREAD that forked, which may end long before its
process. So a small process of its own watches: it ends the server when its parent is gone, and the
kernel ends the server with it. Imports the standard library only, to start at once.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

POLL_S = 0.2
GRACE_S = 10.0
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent thread ends; others cannot be asked."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def watch(parent: int, command: list[str]) -> int:
    """Run the command until it ends, SIGTERM arrives or the parent is gone; its exit status."""
    # This process has one thread, so code between fork and exec is safe here.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    # Ctrl-C reaches a whole terminal; the run decides in which order its parts end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.getppid() == parent:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return server.wait(timeout=POLL_S)
    server.terminate()
    try:
        return server.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


if __name__ == "__main__":
    sys.exit(watch(int(sys.argv[1]), sys.argv[2:]))
