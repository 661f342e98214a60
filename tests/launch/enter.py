"""Starts a program on an imitated host and waits for it: ``enter.py REPORT FOLDER PROGRAM ARGUMENT ...``.

``nsenter --no-fork`` has put this process into the host's namespaces, but for that of process ids, which is for its
children. It starts the program in FOLDER, as leader of its own session, writes its process id (as seen from outside) to
the descriptor REPORT, and ends as the program does: with its exit code, or by the same signal. It stands alone.

``nsenter`` can wait for a program itself, but shares its signals then: it stops when the program is stopped. Nobody
would continue it when the program is killed, and a host with a dead program that nobody buries cannot end.
"""

import os
import signal
import sys


def start(folder: str, command: list[str]) -> int:
    """Starts the program and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and the program would, too
            signal.signal(number, signal.SIG_DFL)
        os.chdir(folder)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(sys.stderr.fileno(), f"{command[0]} in {folder}: {error.strerror}\n".encode())
    os._exit(127)  # as a shell does


def end_like(status: int) -> None:
    """Ends this process in the way that ``os.waitpid`` tells of another."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(os.WEXITSTATUS(status))


def main() -> None:
    """Runs the program."""
    report, folder, *command = sys.argv[1:]
    os.set_inheritable(int(report), False)
    pid = start(folder, command)
    os.write(int(report), str(pid).encode())
    os.close(int(report))
    end_like(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main()
