"""A program of fixtures/bench as a process: its shared words, and what the kernel tells of it. Knows nothing of who records it."""
import mmap
import os
import signal
import subprocess
import time

from . import machine

PAGE = 1 << 20
READY, COMMAND, TOLD, WORKERS, STRIDE, MOST_WORKERS = 0, 1, 2, 64, 8, 8
TRACE, UNTRACE = 1, 2


class Failed(Exception):
    """This measurement has no result; says why."""


def pinned(cores):
    """For Popen: the child runs on these cores; None for all."""
    return (lambda: os.sched_setaffinity(0, cores)) if cores else None


def cores():
    """(where a target runs, where everything else does), for targets that keep one core busy."""
    there = sorted(os.sched_getaffinity(0))
    return ({there[0]}, set(there[1:])) if len(there) > 1 else (None, None)


class Target:
    def __init__(self, python, folder, program, *arguments, on=None):
        # The kernel lends a file by this name to the next target, too: zero it.
        path = os.path.join(folder, "words")
        with open(path, "wb") as file:
            file.truncate(PAGE)
        with open(path, "r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self.errors = open(os.path.join(folder, "target.log"), "w+")
        self.process = subprocess.Popen(
            [python, os.path.join(machine.FIXTURES, program), path, *map(str, arguments)], stdin=subprocess.DEVNULL,
            stdout=self.errors, stderr=self.errors, preexec_fn=pinned(on), env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        self.pid = self.process.pid
        try:
            self.until(lambda: self.words[READY], 30, "did not get ready")
        except Failed:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def check(self):
        """Fails when it is not running any more."""
        if self.process.poll() is not None:
            self.errors.seek(0)
            status = self.process.returncode
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
            raise Failed(f"the target was {how} {self.errors.read()[-300:].strip()}".strip())

    def until(self, condition, seconds, what):
        end = time.monotonic() + seconds
        while not condition():
            self.check()
            if time.monotonic() > end:
                raise Failed(f"the target {what} within {seconds} s")
            time.sleep(0.002)

    def sleep(self, seconds):
        time.sleep(seconds)
        self.check()

    def obey(self, command):
        self.words[COMMAND] = command
        self.until(lambda: not self.words[COMMAND], 60, "did not obey")

    def steps(self):
        return sum(self.words[WORKERS + STRIDE * worker] for worker in range(MOST_WORKERS))

    def longest_step(self):
        """In ns, since this was asked last."""
        words = [WORKERS + STRIDE * worker + 1 for worker in range(MOST_WORKERS)]
        longest = max(self.words[word] for word in words)
        for word in words:
            self.words[word] = 0
        return longest

    def cpu_ns(self):
        # CPUCLOCK_SCHED of another process, as clock_getcpuclockid(3) makes it.
        try:
            return time.clock_gettime_ns((~self.pid << 3) | 2)
        except OSError:
            self.check()
            raise

    def core_wait_ns(self):
        """How long its first thread was ready and waited for a core."""
        try:
            with open(f"/proc/{self.pid}/task/{self.pid}/schedstat") as file:
                return int(file.read().split()[1])
        except OSError:
            self.check()
            raise

    def resident(self):
        """Bytes of its resident set."""
        with open(f"/proc/{self.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))
