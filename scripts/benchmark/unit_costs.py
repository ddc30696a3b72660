"""What one event, one attach and one detach cost: bursts of malloc and free timed in C, and gaps in a spinning thread."""
import os
import statistics
import subprocess
import time

from . import targets, variants
from .targets import Failed, Target

# Words of native/pairs.c and pauses.py.
GENERATION, DEPTH, PAIRS, PAUSE, PERIOD, LANES, CORES, PAIR, LANE_AT, LANE, KEPT = 16, 17, 18, 19, 20, 22, 23, 25, 1024, 16384, 4096
GAP_COUNT, GAPS, GAPS_KEPT = 8, 1024, 4096
# A burst's records fit into a ring with room to spare, and the pause lets the recorder catch up: this is what an event costs
# the thread, not what the recorder can take.
BURST, REST = 5_000, 8_000_000
DEPTHS = (5, 22, 102)
# By their numbers in native/pairs.c. Fewer of the last: each is two system calls.
OTHERS = {1: "calloc(1, 64) + free", 2: "realloc to 640 and to 64", 3: "malloc(640) + free", 4: "aligned_alloc(64, 640) + free",
          5: "mmap(64 KiB) + munmap"}
RATE = 2_000_000


def guarded(measurement):
    """Runs a measurement(...) whose failure is a result."""
    def run(*arguments):
        try:
            return measurement(*arguments)
        except Failed as why:
            return {"failed": str(why)}
    return run


class Bursts:
    """pairs.py under way."""

    def __init__(self, target):
        self.target = target

    def set(self, depth=5, pairs=BURST, pause=REST, period=0, lanes=0, pair=0):
        words = self.target.words
        words[DEPTH], words[PAIRS], words[PAUSE], words[PERIOD], words[LANES] = depth, pairs, pause, period, lanes
        there = sorted(os.sched_getaffinity(0))
        words[PAIR] = pair
        words[CORES], words[CORES + 1] = there[0], there[-1]
        words[GENERATION] += 1
        self.target.sleep(0.1)

    def made(self):
        return self.target.words[LANE_AT], self.target.words[LANE_AT + 1]

    def per_pair(self, seconds, lanes=1):
        """Median ns of a pair over the bursts of these seconds: by the clock, and of CPU time."""
        words = self.target.words
        starts = [LANE_AT + LANE * lane for lane in range(lanes)]
        first = [words[start] for start in starts]
        self.target.sleep(seconds)
        wall, cpu = [], []
        for start, begin in zip(starts, first):
            end = words[start]
            if end - begin < 5:
                raise Failed(f"{end - begin} bursts in {seconds} s")
            for burst in range(max(begin, end - KEPT + 1), end):
                at = start + 2 + burst % KEPT * 2
                wall.append(words[at] / words[PAIRS])
                cpu.append(words[at + 1] / words[PAIRS])
        return {"wall_ns": statistics.median(wall), "cpu_ns": statistics.median(cpu)}


@guarded
def pairs(variant, tools, library, seconds):
    """ns per pair at each depth, one thread and two; sustained."""
    on, others = targets.cores()
    recording = None
    with Target(tools.python, tools.folder, "pairs.py", library, on=on) as target:
        bursts, result = Bursts(target), {}
        try:
            for when in ("before", "during"):
                if when == "during":
                    recording = variants.start(variant, target, tools, others)
                    target.sleep(0.2)
                for depth in DEPTHS:
                    bursts.set(depth=depth)
                    result[f"{when}_{depth}"] = bursts.per_pair(seconds)
                for pair in OTHERS:
                    bursts.set(pair=pair, pairs=200 if pair == 5 else BURST)
                    result[f"{when}_pair_{pair}"] = bursts.per_pair(seconds / 2)
                if others:
                    for lanes in (1, 2):
                        bursts.set(lanes=lanes)
                        result[f"{when}_lanes_{lanes}"] = bursts.per_pair(seconds, lanes)
                bursts.set(pause=0)
                (_, done), begin = bursts.made(), time.perf_counter()
                target.sleep(seconds)
                (_, now), took = bursts.made(), time.perf_counter() - begin
                result[f"{when}_sustained_ns"] = took / (now - done) * 1e9
            bursts.set()
            if recording:
                recording.stop()
                result.update(counted(recording))
            bursts.set()
            result["after_5"] = bursts.per_pair(seconds)
            return result
        except Failed:
            if recording:
                recording.abandon()
            raise


def counted(recording):
    """What the capture says; the file is removed."""
    try:
        return {"capture_bytes": variants.settled_size(recording.capture), **recording.counted()}
    except (subprocess.CalledProcessError, ValueError) as problem:
        return {"uncounted": str(problem)}
    finally:
        os.unlink(recording.capture)


@guarded
def paced(variant, tools, library, seconds):
    """RATE events a second for so long: what is dropped."""
    on, others = targets.cores()
    with Target(tools.python, tools.folder, "pairs.py", library, on=on) as target:
        bursts = Bursts(target)
        bursts.set(pairs=RATE // 2 // 10_000, pause=0, period=100_000)
        recording = variants.start(variant, target, tools, others)
        try:
            (_, done), begin = bursts.made(), time.perf_counter()
            target.sleep(seconds)
            (_, now), took = bursts.made(), time.perf_counter() - begin
            recording.stop()
        except Failed:
            recording.abandon()
            raise
        return {"events_per_second": 2 * (now - done) / took, "seconds": took, "recorder_cpu": recording.recorder_cpu,
                "recorder_rss": recording.recorder_rss, **counted(recording)}


def gaps(target, begin, end):
    """Gaps that ended between these times (perf_counter_ns): (ns, ns of them spent waiting for a core)."""
    words, found = target.words, []
    count = words[GAP_COUNT]
    for number in range(max(0, count - GAPS_KEPT + 1), count):
        at = GAPS + number % GAPS_KEPT * 4
        if begin <= words[at] <= end:
            found.append((words[at + 1], words[at + 2]))
    return found


def summed(found):
    return {"longest_ns": max((gap for gap, _ in found), default=0),
            "longest_but_for_cores_ns": max((max(0, gap - waited) for gap, waited in found), default=0),
            "sum_ns": sum(gap for gap, _ in found if gap > 3_000_000)}


@guarded
def pauses(variant, tools, threads, cycles):
    """Attaches and detaches so often to one target; each cycle's gaps and times."""
    on, others = targets.cores()
    with Target(tools.python, tools.folder, "pauses.py", threads, on=on) as target:
        result = []
        for _ in range(cycles):
            target.sleep(0.3)
            idle, before = time.perf_counter_ns(), target.resident()
            target.sleep(0.3)
            begin = time.perf_counter_ns()
            recording = variants.start(variant, target, tools, others)
            try:
                target.sleep(0.15)
                attached, during = time.perf_counter_ns(), target.resident()
                target.sleep(0.15)
                leaving = time.perf_counter_ns()
                detach = recording.stop()
            except Failed:
                recording.abandon()
                raise
            target.sleep(0.15)
            left = time.perf_counter_ns()
            os.unlink(recording.capture)
            result.append({"idle": summed(gaps(target, idle, begin)), "attach": summed(gaps(target, begin, attached)),
                           "detach": summed(gaps(target, leaving, left)), "seconds_to_record": recording.seconds_to_record,
                           "seconds_to_detach": detach, "resident_more": during - before,
                           "resident_left": target.resident() - before})
        return {"cycles": result}
