"""Little programs that tests run on imitated hosts to see what a network does to traffic."""

import textwrap
from pathlib import Path

from tests.launch.hosts import Host
from tests.launch.processes import Process

PROGRAMS = {
    # Sends back what it gets over TCP.
    "echo": """
        def answer(connection):
            with connection, contextlib.suppress(OSError):
                while data := connection.recv(1 << 20):
                    connection.sendall(data)
        server = socket.create_server((socket.gethostname(), 7000))
        print("listening", flush=True)
        while True:
            threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()
    """,
    # Talks to an echo every 10 ms until something goes wrong, and says how long ago the last answer was then.
    "talk": """
        with socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])) as connection:
            answered = time.monotonic()
            try:
                while True:
                    connection.sendall(b"?")
                    if not connection.recv(1):
                        raise ConnectionError("closed")
                    answered = time.monotonic()
                    print("answered", flush=True)
                    time.sleep(0.01)
            except OSError as error:
                print(f"broke {type(error).__name__} {error} after {time.monotonic() - answered}", flush=True)
    """,
    # Takes what it gets over TCP, and says so when the sender has ended.
    "sink": """
        server = socket.create_server((socket.gethostname(), 7002))
        print("listening", flush=True)
        while True:
            with server.accept()[0] as connection:
                while connection.recv(1 << 20):
                    pass
                connection.sendall(b"!")
    """,
    # The seconds until so many MB have arrived at a sink.
    "push": """
        with socket.create_connection((sys.argv[1], 7002), timeout=20) as connection:
            start = time.monotonic()
            connection.sendall(bytes(int(float(sys.argv[2]) * 1e6)))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
            print(time.monotonic() - start)
    """,
    # The seconds of the shortest of 5 round trips to an echo.
    "round_trip": """
        def round_trip():
            start = time.monotonic()
            connection.sendall(b"?")
            connection.recv(1)
            return time.monotonic() - start
        with socket.create_connection((sys.argv[1], 7000), timeout=10) as connection:
            print(min(round_trip() for _ in range(5)))
    """,
    # The seconds until so many MB, sent to an echo, have all come back, unchanged.
    "transfer": """
        sent, received = os.urandom(int(float(sys.argv[2]) * 1e6)), bytearray()
        with socket.create_connection((sys.argv[1], 7000), timeout=20) as connection:
            start = time.monotonic()
            threading.Thread(target=connection.sendall, args=(sent,)).start()
            while len(received) < len(sent):
                received += connection.recv(1 << 20)
            print(time.monotonic() - start)
        assert received == sent, "other data came back"
    """,
    # Counts datagrams until one of those that say "end".
    "count": """
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE: room for all, more than the usual limit
        receiver.bind((socket.gethostname(), 7001))
        print("listening", flush=True)
        counted = 0
        while receiver.recv(10) != b"end":
            counted += 1
        print("counted", counted, flush=True)
    """,
    # Sends 1000 datagrams, then so many that say "end" that one arrives.
    "send": """
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for data in [b"data"] * 1000 + [b"end"] * 50:
            sender.sendto(data, (sys.argv[1], 7001))
    """,
}


def program(name: str, *arguments: str) -> list[str]:
    """The command of a program of the table above."""
    code = "import contextlib, os, socket, sys, threading, time\n" + textwrap.dedent(PROGRAMS[name])
    return ["python", "-Ic", code, *arguments]


def start(host: Host, name: str, log: Path, *arguments: str) -> Process:
    """Starts a program on a host and waits for its first line."""
    process = host.popen(program(name, *arguments), log=log)
    process.wait_for("\n")
    return process


def measure(host: Host, name: str, *arguments: str) -> float:
    """Runs a program on a host to its end and returns the number that it prints."""
    return float(host.run(program(name, *arguments)).stdout)
