"""The program of a worker process: `python -m advgrpo.rewards.pool.child FD`, started by workers.py alone.

It answers as `Host` on the socket that it inherits as FD. Both ends are processes of one user and of one program, so
what travels is pickled. It ends when the socket does, and so with whoever started it.
"""

from __future__ import annotations

import pickle
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

from advgrpo.rewards.pool.recipe import Host


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides what ends
    host = Host()
    with Connection(descriptor) as trainer, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            method, argument = pickle.loads(trainer.recv_bytes())
            trainer.send_bytes(pickle.dumps(host.answer(method, argument)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
