"""The program of a worker process: `python -m advgrpo.rewards.pool.child FD`, started by workers.py alone.

It answers as `Host` on the socket that it inherits as FD. Both ends are processes of one user and of one program, so
what travels is pickled. It ends when the other end of the socket does, also in the middle of a score, and so with
whoever started it, however he ends.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

from advgrpo.rewards.pool.recipe import Host


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides what ends
    threading.Thread(target=_end_with, args=[descriptor], daemon=True).start()
    host = Host()
    with Connection(descriptor) as trainer, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            method, argument = pickle.loads(trainer.recv_bytes())
            trainer.send_bytes(pickle.dumps(host.answer(method, argument)))


def _end_with(descriptor: int) -> None:
    """End this process once nobody holds the other end of the socket."""
    hung_up = select.poll()
    hung_up.register(descriptor, 0)  # which is told in any case
    hung_up.poll()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
