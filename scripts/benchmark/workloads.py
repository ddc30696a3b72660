"""The workloads: each cell is one fresh target, its speed before, while and after it is recorded."""
import os
import select
import subprocess
import time

from . import targets, variants
from .targets import Failed, Target

# name: (program, whether it keeps one core busy, what it does)
WORKLOADS = {
    "json": ("json_documents.py", True, "loads and dumps of a nested document"),
    "bytes": ("bytes_ring.py", True, "objects of 600 to 5000 bytes in a ring of 4096"),
    "numpy": ("numpy_temporaries.py", True, "array arithmetic with temporaries of 1.6 KB to 1.6 MB"),
    "calls": ("calls.py", True, "recursive and method calls, next to no allocation"),
    "threads": ("threads.py", False, "8 threads: json, bytes and calls"),
    "deep": ("deep.py", True, "as bytes, at a stack depth of 200"),
    "zigzag": ("zigzag.py", True, "allocation on the way down and up a recursion of 40 levels"),
    "web": ("web.py", True, "uvicorn and starlette, JSON in and out, 8 keep-alive clients"),
}
USUAL = [name for name in WORKLOADS if name != "zigzag"]
# Between a change and what is measured after it.
SETTLE = 0.25
# Share of the time that a target may wait for its core.
STARVED = 0.8


class Load:
    """The HTTP clients, on another core than the server."""

    def __init__(self, clients, port, on):
        self.child = subprocess.Popen([clients, str(port), "8"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      preexec_fn=targets.pinned(on), bufsize=0)

    def tell(self):
        """(requests, seconds, p50, p99, longest), latencies in ns, since this was asked last."""
        self.child.stdin.write(b"\n")
        if not select.select([self.child.stdout], [], [], 20)[0]:
            raise Failed("the HTTP clients do not answer")
        words = self.child.stdout.readline().split()
        if len(words) != 5:
            raise Failed("the HTTP clients ended: the server let go of them")
        return int(words[0]), float(words[1]), *map(int, words[2:])

    def close(self):
        self.child.kill()
        self.child.wait()


def phase(target, load, seconds):
    """The speed for so many seconds."""
    if load:
        load.tell()
    steps, begin, cpu, waited = target.steps(), time.perf_counter_ns(), target.cpu_ns(), target.core_wait_ns()
    target.sleep(seconds)
    done, took = target.steps() - steps, (time.perf_counter_ns() - begin) / 1e9
    latencies = {}
    cpu, waited = (target.cpu_ns() - cpu) / 1e9, (target.core_wait_ns() - waited) / 1e9
    if load:
        done, took, *rest = load.tell()
        latencies = dict(zip(("p50_ns", "p99_ns", "longest_ns"), rest))
    if not done:
        raise Failed(f"the target did not move within {seconds} s")
    if waited / took > STARVED:
        raise Failed(f"others took the target's core for {waited / took:.0%} of the time: nothing can be measured")
    return {"per_second": done / took, "cpu_per_step": cpu / done, "waited_for_core": waited / took,
            "resident": target.resident(), **latencies}


def longest(target, load):
    """The longest step, or answer, in ns since this was asked last."""
    return load.tell()[4] if load else target.longest_step()


def measure(workload, variant, tools, clients, seconds):
    """One cell: what is known of it, or {"failed": why}."""
    program, one_core, _ = WORKLOADS[workload]
    on, others = targets.cores() if one_core else (None, None)
    load = recording = None
    try:
        with Target(tools.python, tools.folder, program, on=on) as target:
            try:
                if workload == "web":
                    load = Load(clients, target.words[targets.TOLD], others)
                target.sleep(SETTLE)
                result = {"own_core": bool(on), "before": phase(target, load, seconds)}
                longest(target, load)
                recording = variants.start(variant, target, tools, others)
                target.sleep(SETTLE)
                result["longest_at_attach_ns"] = longest(target, load)
                result["during"] = phase(target, load, seconds)
                longest(target, load)
                detach = recording.stop() if recording else None
                target.sleep(SETTLE)
                result["longest_at_detach_ns"] = longest(target, load)
                result["after"] = phase(target, load, seconds)
                if recording:
                    result.update(told(recording, detach))
                return result
            finally:
                if load:
                    load.close()
    except Failed as why:
        if recording:
            recording.abandon()
        return {"failed": str(why)}


def told(recording, detach):
    """What is known of a recording that has ended."""
    result = {"seconds_to_record": recording.seconds_to_record, "seconds_to_detach": detach,
              "recorded_for": recording.recorded_for, "recorder_cpu": recording.recorder_cpu,
              "recorder_rss": recording.recorder_rss}
    if recording.capture:
        result["capture_bytes"] = variants.settled_size(recording.capture)
        try:
            result.update(recording.counted())
        except (subprocess.CalledProcessError, ValueError) as problem:
            result["uncounted"] = str(problem)
        os.unlink(recording.capture)
    return result
