"""Passes Ethernet frames between two interfaces of one network after a delay: ``slow_link.py PORT NEW DELAY_S``.

PORT is there and leads to a host; NEW is made here (a TAP device) for the switch and goes when this program ends, which
it does at the end of its standard input. It writes ``ready`` when frames pass. It stands alone, for a start in 50 ms.
"""

import contextlib
import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable

# Numbers of linux/if_tun.h and linux/if_packet.h that Python has no names for.
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
ETH_P_ALL = 0x0003
SO_RCVBUFFORCE = 33

# The kernel hands over up to 64 KiB of TCP at a time as one frame without checksum. A header before each frame says so,
# and both interfaces read and write the same one, so it only has to be passed on.
MAX_FRAME_BYTES = 10 + 65536 + 18
BUFFER_BYTES = 64 << 20  # what a fast sender may have on its way here


def open_port(name: str) -> socket.socket:
    """A socket that gets what arrives at an interface and sends through it."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    port.bind((name, ETH_P_ALL))
    port.setblocking(False)
    return port


def open_tap(name: str) -> int:
    """Makes an interface and returns the descriptor that reads what is sent through it."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return tap


class Direction:
    """Frames from one side to the other, each so many seconds later."""

    def __init__(self, read: Callable[[int], bytes], write: Callable[[bytes], object], delay_s: float) -> None:
        self._read = read
        self._write = write
        self._delay_s = delay_s
        self._frames: deque[tuple[float, bytes]] = deque()  # with the time at which they are due

    def take(self) -> None:
        """Reads the frames that are there."""
        with contextlib.suppress(OSError):  # none is left, or the interface is down
            while True:
                self._frames.append((time.monotonic() + self._delay_s, self._read(MAX_FRAME_BYTES)))

    def pass_on(self) -> float | None:
        """Writes the frames that are due, and returns the seconds until the next one is."""
        while self._frames and (wait_s := self._frames[0][0] - time.monotonic()) <= 0:
            with contextlib.suppress(OSError):  # the interface is down, or its queue is full: the frame is lost
                self._write(self._frames.popleft()[1])
        return wait_s if self._frames else None


def main() -> None:
    """Passes frames in both directions until standard input ends."""
    port, tap = open_port(sys.argv[1]), open_tap(sys.argv[2])
    delay_s = float(sys.argv[3])
    outward = Direction(port.recv, lambda frame: os.write(tap, frame), delay_s)
    inward = Direction(lambda size: os.read(tap, size), port.send, delay_s)
    takers = {port.fileno(): outward.take, tap: inward.take}
    poll = select.poll()
    for descriptor in (*takers, sys.stdin.fileno()):
        poll.register(descriptor, select.POLLIN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        waits_ms = [wait_s * 1000 for direction in (outward, inward) if (wait_s := direction.pass_on()) is not None]
        for descriptor, _ in poll.poll(min(waits_ms, default=None)):
            if descriptor == sys.stdin.fileno():
                return
            takers[descriptor]()


if __name__ == "__main__":
    main()
