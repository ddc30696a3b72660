"""Who records the target: command lines, how each is told to begin and to end, how its capture is counted."""
import json
import os
import select
import signal
import subprocess
import time

from . import targets
from .targets import Failed

# Longer than any of them took that came back at all.
PATIENCE = 60
HEAPTAP = {
    "sampled": [],
    "exact": ["--exact"],
    "exact-python": ["--exact", "--python-allocators"],
    "sampled-native": ["--native"],
    "exact-native": ["--exact", "--native"],
    "trap": ["--breakpoints", "trap"],
}
MEMRAY = {"memray": [], "memray-python": ["--trace-python-allocators"], "memray-native": ["--native"]}
TITLES = {
    "bare": "nothing attached",
    "sampled": "heaptap, sampled",
    "exact": "heaptap --exact",
    "exact-python": "heaptap --exact --python-allocators",
    "sampled-native": "heaptap, sampled, --native",
    "exact-native": "heaptap --exact --native",
    "trap": "heaptap --breakpoints trap",
    "memray": "memray attach",
    "memray-python": "memray attach --trace-python-allocators",
    "memray-native": "memray attach --native",
    "tracemalloc": "tracemalloc, 1 frame",
}
USUAL = [name for name in TITLES if name != "trap" and not name.endswith("-native")]


class Tools:
    """Where the programs are."""

    def __init__(self, heaptap, python, folder):
        self.heaptap, self.python, self.folder = heaptap, python, folder
        self.memray = os.path.join(os.path.dirname(python), "memray")


def start(variant, target, tools, on=None):
    """Attaches to the target; what is under way, or None for "bare"."""
    if variant == "bare":
        return None
    kind = Heaptap if variant in HEAPTAP else Memray if variant in MEMRAY else Tracemalloc
    return kind(variant, target, tools, on)


class Recording:
    """What all have. seconds_to_record: from the command to the moment when it says that it records."""

    capture = None
    recorder_cpu = recorder_rss = None

    def __init__(self, variant, target, tools, on):
        self.variant, self.target, self.tools, self.on = variant, target, tools, on
        self.began = time.perf_counter()
        self.start()
        self.recording_since = time.perf_counter()
        self.seconds_to_record = self.recording_since - self.began

    def stop(self):
        """Ends it; seconds that took."""
        began = time.perf_counter()
        self.recorded_for = began - self.recording_since
        self.end()
        self.target.check()
        return time.perf_counter() - began

    def abandon(self):
        """After a failure: nothing of it goes on."""

    def run(self, arguments):
        """Runs a command that is to come back; fails when it does not, or with an error."""
        with open(os.path.join(self.tools.folder, "recorder.log"), "w+") as log:
            child = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                     preexec_fn=targets.pinned(self.on), start_new_session=True)
            if not ended(child, PATIENCE):
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                raise Failed(f"{' '.join(arguments[:2])} did not come back within {PATIENCE} s")
            usage = reap(child)
            if child.returncode:
                log.seek(0)
                raise Failed(f"{os.path.basename(arguments[0])} failed: {' '.join(log.read().split())[-300:]}")
            return usage


def ended(child, seconds):
    """Waits for its end without taking its status."""
    handle = os.pidfd_open(child.pid)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def reap(child):
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage


class Heaptap(Recording):
    def start(self):
        self.capture = os.path.join(self.tools.folder, "capture.heaptap")
        self.log = open(os.path.join(self.tools.folder, "recorder.log"), "w+")
        self.child = subprocess.Popen(
            [self.tools.heaptap, "attach", "--pid", str(self.target.pid), "--force", "--quiet", "-o", self.capture,
             *HEAPTAP[self.variant]],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, preexec_fn=targets.pinned(self.on), bufsize=0)
        line = b""
        while not line.startswith(b"recording process"):
            ready = select.select([self.child.stdout], [], [], PATIENCE)[0]
            line = self.child.stdout.readline() if ready else b""
            if not line:
                self.fail("did not say that it records")

    def fail(self, what):
        self.abandon()
        self.log.seek(0)
        said = " ".join(self.log.read().split())[-300:]
        self.target.check()
        raise Failed(f"heaptap {what}: {said}" if said else f"heaptap {what}")

    def end(self):
        self.child.send_signal(signal.SIGINT)
        if not ended(self.child, PATIENCE):
            self.fail(f"did not end within {PATIENCE} s")
        usage = reap(self.child)
        self.said = self.child.stdout.read().decode(errors="replace")
        self.recorder_cpu = usage.ru_utime + usage.ru_stime
        self.recorder_rss = usage.ru_maxrss * 1024
        if self.child.returncode:
            self.fail(f"ended with {self.child.returncode}")

    def abandon(self):
        if self.child.returncode is None:
            self.child.kill()
            self.child.wait()

    def counted(self):
        stats = json.loads(subprocess.check_output([self.tools.heaptap, "stats", "--json", self.capture],
                                                   stderr=subprocess.DEVNULL))
        run, result = stats["run"], {}
        for name in ("dropped_events", "missed_frees", "missed_allocations", "sampling_mean_bytes"):
            result[name] = run.get(name)
        # Those of a sampled capture are estimates, not records.
        if run.get("sampling_mean_bytes") is None:
            result["events"] = sum(stats[name] for name in ("total_allocations", "frees", "frees_from_before", "unmaps"))
        return result


class Memray(Recording):
    def start(self):
        self.capture = os.path.join(self.tools.folder, "capture.memray")
        self.usage = self.run([self.tools.memray, "attach", *MEMRAY[self.variant], "--method", "gdb", "--force", "-o",
                               self.capture, str(self.target.pid)])

    def end(self):
        usage = self.run([self.tools.memray, "detach", "--method", "gdb", str(self.target.pid)])
        self.recorder_cpu = sum(u.ru_utime + u.ru_stime for u in (usage, self.usage))
        self.recorder_rss = max(usage.ru_maxrss, self.usage.ru_maxrss) * 1024

    def counted(self):
        # The header's total counts frees, too; it is written when the capture is closed, shortly after detach came back.
        code = "import sys, memray; print(memray.FileReader(sys.argv[1]).metadata.total_allocations)"
        return {"events": int(subprocess.check_output([self.tools.python, "-c", code, self.capture]))}


class Tracemalloc(Recording):
    def start(self):
        self.target.obey(targets.TRACE)

    def end(self):
        self.target.obey(targets.UNTRACE)


def settled_size(path):
    """Bytes of a file once it has stopped growing or shrinking."""
    size, since = -1, time.monotonic()
    while time.monotonic() - since < 0.2:
        now = os.path.getsize(path)
        if now != size:
            size, since = now, time.monotonic()
        time.sleep(0.02)
    return size
