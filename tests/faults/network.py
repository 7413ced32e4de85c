"""A network of machines on one machine: a network namespace and a TAP device each, and a switch between them.

The switch is a thread of this process that passes Ethernet frames on, late, not at all, or not to everybody, as it is
told: what `tc netem` and a pulled cable do, on kernels without netem. It needs root, `ip` of iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path

_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x0002 | 0x1000  # linux/if_tun.h
_BROADCAST = 1  # this bit of a destination's first byte: to all
MTU = 9000
_SERIAL = itertools.count()  # networks that this process has made


def missing() -> str:
    """Why there can be no such network here; "" where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        return "network namespaces need `ip` and /dev/net/tun"
    probe = f"advgrpo-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return "" if made.returncode == 0 else f"no network namespaces: {made.stderr.strip()}"


class Network:
    """`machines` machines, in a `with`.

    Attributes:
        cut: numbers of machines that nobody reaches, and that reach nobody; may be changed at any time.
        delay: seconds that each frame takes, at most; drawn evenly from half of it on.
        loss: share of the frames that are lost, in [0, 1).
    """

    def __init__(self, machines: int, seed: int):
        self.cut: set[int] = set()
        self.delay, self.loss = 0.0, 0.0
        self._own = f"{os.getpid()}-{next(_SERIAL)}"
        self._names = [f"advgrpo-{self._own}-{machine}" for machine in range(machines)]
        self._random = random.Random(seed)
        self._devices: list[int] = []
        self._wake, self._ends = os.pipe()
        self._thread = threading.Thread(target=self._switch, name="switch", daemon=True)

    def namespace(self, machine: int) -> str:
        """Its file, for setns."""
        return f"/run/netns/{self._names[machine]}"

    def interface(self, machine: int) -> str:
        return f"tap{machine}"

    def address(self, machine: int) -> str:
        return f"10.77.0.{machine + 1}"

    def __enter__(self) -> Network:
        for machine, name in enumerate(self._names):
            _ip("netns", "add", name)
            self._devices.append(self._plug_in(machine, name))
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._ends)
        if self._thread.is_alive():
            self._thread.join()
        for device in (*self._devices, self._wake):
            os.close(device)
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _plug_in(self, machine: int, name: str) -> int:
        """The switch's end of a machine's cable."""
        here = f"adv{self._own}-{machine}"[-15:]  # the longest name that Linux takes
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", here.encode(), _TAP_WITHOUT_HEADER))
        _ip("link", "set", here, "netns", name, "name", self.interface(machine))
        inside = ["ip", "netns", "exec", name, "sh", "-c"]
        subprocess.run([*inside, "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6"], capture_output=True)
        _ip("-n", name, "addr", "add", f"{self.address(machine)}/24", "dev", self.interface(machine))
        _ip("-n", name, "link", "set", self.interface(machine), "mtu", str(MTU), "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return device

    def _switch(self) -> None:
        """Until the other end of the pipe is closed."""
        late: list[tuple[float, int, int, int, bytes]] = []  # due, order, from, to, frame
        homes: dict[bytes, int] = {}  # which machine has a hardware address
        order = 0
        while True:
            wait = max(0.0, late[0][0] - time.monotonic()) if late else None
            ready = select.select([*self._devices, self._wake], [], [], wait)[0]
            if self._wake in ready:
                return
            for device in ready:
                source, frame = self._devices.index(device), os.read(device, MTU + 64)
                homes[frame[6:12]] = source
                known = None if frame[0] & _BROADCAST else homes.get(frame[:6])
                for target in range(len(self._devices)) if known is None else (known,):
                    if target != source and self._random.random() >= self.loss:
                        due = time.monotonic() + self.delay * self._random.uniform(0.5, 1.0)
                        heapq.heappush(late, (due, order := order + 1, source, target, frame))
            while late and late[0][0] <= time.monotonic():
                _, _, source, target, frame = heapq.heappop(late)
                if not self.cut & {source, target}:
                    self._deliver(target, frame)

    def _deliver(self, target: int, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # its queue is full, or the device is down: lost, as on a wire
            os.write(self._devices[target], frame)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
