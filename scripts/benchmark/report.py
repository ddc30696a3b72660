"""BENCHMARKS.md from a run's results. Figures come from the results alone: a cell without one says why, or is a dash."""
import statistics

from . import unit_costs, variants, workloads

MIB = 1024 * 1024


class Cells:
    """The results by key, with what failed left out and remembered."""

    def __init__(self, results):
        self.results, self.failures = results, []
        for key, rounds in results.items():
            for result in rounds:
                if "failed" in result:
                    self.failures.append((key, result["failed"]))

    def good(self, key):
        return [result for result in self.results.get(key, []) if "failed" not in result]

    def cell(self, key, figure, form="{:.2f}", spread=True):
        """Median of figure(result) over the rounds, with its range, as text."""
        if key not in self.results:
            return "-"
        values = [value for value in map(figure, self.good(key)) if value is not None]
        if not values:
            return "failed" if not self.good(key) else "-"
        text = form.format(statistics.median(values))
        if spread and len(values) > 1:
            text += f" <sub>{form.format(min(values))}–{form.format(max(values))}</sub>"
        missing = len(self.results[key]) - len(self.good(key))
        return text + (f" ({missing} of {len(self.results[key])} failed)" if missing else "")

    def median(self, key, figure):
        values = [value for value in map(figure, self.good(key)) if value is not None]
        return statistics.median(values) if values else None

    def of(self, names, prefix):
        """Which of names have results under prefix."""
        return [name for name in names if f"{prefix}/{name}" in self.results]


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def speed_of(result, when):
    """Steps a second, of the time in which the target was not kept waiting for its core by others on the machine. Where it has
    no core of its own, recorders are among the others, and all time counts."""
    return result[when]["per_second"] / (1 - result[when]["waited_for_core"] if result["own_core"] else 1)


def slowdown(result):
    """By the time a step takes without the recorder: half of it measured before, half after, so that a machine that gets faster or
    slower meanwhile is not taken for the recorder's doing."""
    return (1 / speed_of(result, "during")) / statistics.mean(1 / speed_of(result, when) for when in ("before", "after"))


def cpu(result):
    return result["during"]["cpu_per_step"] / statistics.mean(result[when]["cpu_per_step"] for when in ("before", "after"))


def recovered(result):
    return speed_of(result, "before") / speed_of(result, "after")


def get(*path, scale=1.0):
    """A figure that is a field, or None where there is none."""
    def figure(result):
        for name in path:
            result = result.get(name) if result else None
        return None if result is None else result * scale
    return figure


def by_workload(cells, figure, chosen, form="{:.2f}"):
    loads = [name for name in workloads.WORKLOADS if any(key.startswith(name + "/") for key in cells.results)]
    rows = [[variants.TITLES[variant]] + [cells.cell(f"{load}/{variant}", figure, form) for load in loads]
            for variant in chosen if any(f"{load}/{variant}" in cells.results for load in loads)]
    return table(["", *loads], rows) if rows else ""


def added_share(cells):
    """Time that heaptap adds to a step, in parts of what memray adds."""
    loads = [name for name in workloads.WORKLOADS if any(f"{name}/{peer}" in cells.results for peer in variants.MEMRAY)]
    rows = []
    for variant, peer in (("sampled", "memray"), ("exact", "memray"), ("exact-python", "memray-python"),
                          ("sampled-native", "memray-native"), ("exact-native", "memray-native")):
        row = [f"{variants.TITLES[variant]} / {variants.TITLES[peer]}"]
        for load in loads:
            ours, theirs = (cells.median(f"{load}/{name}", slowdown) for name in (variant, peer))
            row.append("-" if ours is None or theirs is None or theirs < 1.05 else f"{max(ours - 1, 0) / (theirs - 1):.2f}")
        if set(row[1:]) - {"-"}:
            rows.append(row)
    return table(["", *loads], rows) if rows else ""


def speed(cells):
    text = ["## Slowdown while recorded\n", "Time per step while recorded / without the recorder (mean of before and after), of the same process. Where the target has a "
            "core of its own (all but threads), the time in which another load of the machine kept it from that core is left out.\n",
            by_workload(cells, slowdown, variants.TITLES),
            "CPU time of the target per step, likewise. It leaves out all waiting, also for the recorder.\n",
            by_workload(cells, cpu, variants.TITLES)]
    share = added_share(cells)
    if share:
        text += ["Time added to a step, in parts of what the peer adds (medians; a dash where the peer adds less than 5 %).\n", share]
    text += ["Steps per second before / after the recorder has left.\n",
             by_workload(cells, recovered, [name for name in variants.TITLES if name != "bare"])]
    return text


def web(cells):
    chosen = cells.of(variants.TITLES, "web")
    if not chosen:
        return []
    rows = []
    for variant in chosen:
        key = f"web/{variant}"
        rows.append([variants.TITLES[variant]]
                    + [cells.cell(key, get(when, "per_second"), "{:,.0f}") for when in ("before", "during")]
                    + [cells.cell(key, get(when, name, scale=1e-6)) for name in ("p50_ns", "p99_ns") for when in ("before", "during")]
                    + [cells.cell(key, get(name, scale=1e-6), "{:.1f}") for name in ("longest_at_attach_ns", "longest_at_detach_ns")])
    head = ["", "requests/s bare", "recorded", "p50 bare, ms", "recorded", "p99 bare, ms", "recorded", "longest at attach, ms",
            "at detach, ms"]
    return ["## HTTP server under load\n", table(head, rows)]


def captures(cells):
    chosen = [name for name in variants.TITLES if name not in ("bare", "tracemalloc")]
    # The fixed part of a small file says nothing of its records.
    bytes_each = lambda r: r["capture_bytes"] / r["events"] * 1e6 / MIB if r.get("events", 0) > 10_000 else None  # noqa: E731
    events = lambda r: r["events"] / r["recorded_for"] / 1e3 if "events" in r else None  # noqa: E731
    growth = lambda r: r["capture_bytes"] / r["recorded_for"] / 1024  # noqa: E731
    parts = [
        ("MiB of capture per million allocations and frees; a dash where there were fewer than 10,000, or samples of them.",
         bytes_each, "{:.3f}"),
        ("KiB of capture per second.", growth, "{:,.0f}"),
        ("Thousand allocations and frees per second while recorded.", events, "{:,.0f}"),
        ("Records dropped.", get("dropped_events"), "{:,.0f}"),
        ("The recorder's own process: CPU seconds from its start to its end. memray's records are written by the target.",
         get("recorder_cpu"), "{:.2f}"),
        ("The recorder's own process: its peak resident set, MiB.", get("recorder_rss", scale=1 / MIB), "{:.0f}"),
    ]
    text = ["## Captures, and the recorder itself\n"]
    for title, figure, form in parts:
        tabled = by_workload(cells, figure, chosen, form)
        if tabled:
            text += [title + "\n", tabled]
    return text if len(text) > 1 else []


def each_cycle(path, scale=1.0, of=statistics.median):
    """Over the cycles of one target."""
    def figure(result):
        values = [get(*path, scale=scale)(cycle) for cycle in result["cycles"]]
        return of(values)
    return figure


def pauses(cells):
    text = []
    for threads in (1, 100):
        chosen = cells.of(variants.TITLES, f"pauses-{threads}")
        if not chosen:
            continue
        columns = [("longest gap at attach, ms", ("attach", "longest_ns"), 1e-6, "{:.2f}"),
                   ("less waiting for a core", ("attach", "longest_but_for_cores_ns"), 1e-6, "{:.2f}"),
                   ("sum of gaps over 3 ms", ("attach", "sum_ns"), 1e-6, "{:.1f}"),
                   ("longest gap at detach, ms", ("detach", "longest_ns"), 1e-6, "{:.2f}"),
                   ("less waiting for a core", ("detach", "longest_but_for_cores_ns"), 1e-6, "{:.2f}"),
                   ("longest gap with nothing going on, ms", ("idle", "longest_ns"), 1e-6, "{:.2f}"),
                   ("command to recording, s", ("seconds_to_record",), 1, "{:.3f}"),
                   ("detach, s", ("seconds_to_detach",), 1, "{:.3f}"),
                   ("resident set, MiB more", ("resident_more",), 1 / MIB, "{:.1f}"),
                   ("left", ("resident_left",), 1 / MIB, "{:.1f}")]
        rows = [[variants.TITLES[variant]]
                + [cells.cell(f"pauses-{threads}/{variant}", each_cycle(path, scale), form) for _, path, scale, form in columns]
                for variant in chosen]
        text += [f"A target of {'one thread' if threads == 1 else f'{threads} threads'}: one reads the clock and notes when it "
                 "stood still" + (", the others sleep.\n" if threads > 1 else ".\n"),
                 table(["", *(name for name, *_ in columns)], rows)]
    return text


def attaching(cells):
    chosen = [name for name in variants.TITLES if name != "bare"]
    recorders = [name for name in chosen if name != "tracemalloc"]
    before = lambda when: lambda r: (r[when]["resident"] - r["before"]["resident"]) / MIB  # noqa: E731
    text = pauses(cells)
    parts = [("Seconds from the command to the recording.", get("seconds_to_record"), "{:.2f}", recorders),
             ("Seconds from asking for the end to the recorder's exit.", get("seconds_to_detach"), "{:.2f}", recorders),
             ("Longest step or request around the attach, ms; the first row is the same without one.",
              get("longest_at_attach_ns", scale=1e-6), "{:.1f}", ["bare", *chosen]),
             ("The same around the detach.", get("longest_at_detach_ns", scale=1e-6), "{:.1f}", ["bare", *chosen]),
             ("MiB that the target's resident set is bigger while recorded.", before("during"), "{:.1f}", ["bare", *chosen]),
             ("MiB that it is bigger afterwards.", before("after"), "{:.1f}", ["bare", *chosen])]
    for title, figure, form, rows in parts:
        tabled = by_workload(cells, figure, rows, form)
        if tabled:
            text += [title + "\n", tabled]
    return ["## Attaching and leaving\n"] + text if text else []


def added(depth):
    return lambda r: r[f"during_{depth}"]["wall_ns"] - r[f"before_{depth}"]["wall_ns"]


def events(cells):
    chosen = cells.of(variants.TITLES, "pairs")
    text = ["## What one event costs\n"] if chosen or "paced/exact" in cells.results else []
    if chosen:
        rows = []
        for variant in chosen:
            key = f"pairs/{variant}"
            rows.append([variants.TITLES[variant]]
                        + [cells.cell(key, get(f"before_{depth}", "wall_ns"), "{:.1f}") for depth in unit_costs.DEPTHS[:1]]
                        + [cells.cell(key, added(depth), "{:.1f}") for depth in unit_costs.DEPTHS]
                        + [cells.cell(key, get("during_sustained_ns"), "{:.1f}"),
                           cells.cell(key, lambda r: r["after_5"]["wall_ns"] - r["before_5"]["wall_ns"], "{:.1f}")])
        head = ["", "bare", *(f"added at depth {depth}" for depth in unit_costs.DEPTHS), "without a rest, depth 5: whole",
                "added after detach"]
        text += [f"ns per pair of malloc(64) and free, called from C below a Python stack of that depth: median of bursts of "
                 f"{unit_costs.BURST:,}, with a rest of {unit_costs.REST / 1e6:.0f} ms after each.\n", table(head, rows)]
        head = ["", *(unit_costs.OTHERS[pair] for pair in unit_costs.OTHERS)]
        rows = [[variants.TITLES[variant]] + [cells.cell(f"pairs/{variant}", added(f"pair_{pair}"), "{:.1f}")
                                              for pair in unit_costs.OTHERS] for variant in chosen]
        rows.insert(0, ["bare"] + [cells.cell(f"pairs/{chosen[0]}", get(f"before_pair_{pair}", "wall_ns"), "{:.1f}")
                                   for pair in unit_costs.OTHERS])
        text += ["ns that other pairs take at depth 5, and what is added; of realloc two calls of one block.\n", table(head, rows)]
        text += two_threads(cells, chosen)
    if "paced/exact" in cells.results:
        head = ["", "events/s made", "records/s dropped", "frees or allocations found missing", "recorder's CPU, %",
                "recorder's peak resident set, MiB"]
        row = [cells.cell("paced/exact", figure, form) for figure, form in (
            (get("events_per_second"), "{:,.0f}"), (lambda r: r["dropped_events"] / r["seconds"] if "dropped_events" in r else None, "{:,.0f}"),
            (lambda r: r["missed_frees"] + r["missed_allocations"] if "missed_frees" in r else None, "{:,.0f}"),
            (lambda r: r["recorder_cpu"] / r["seconds"] * 100, "{:.0f}"), (get("recorder_rss", scale=1 / MIB), "{:.0f}"))]
        text += [f"{unit_costs.RATE / 1e6:.0f} million events per second from one thread, as steadily as it can.\n",
                 table(head, [[variants.TITLES["exact"], *row]])]
    return text


def two_threads(cells, chosen):
    rows = []
    for variant in chosen:
        key = f"pairs/{variant}"
        if not any("during_lanes_2" in result for result in cells.good(key)):
            continue
        lanes = [get(f"{when}_lanes_{count}", "cpu_ns") for when in ("before", "during") for count in (1, 2)]
        ratio = lambda r: r["during_lanes_2"]["cpu_ns"] / r["during_lanes_1"]["cpu_ns"]  # noqa: E731
        rows.append([variants.TITLES[variant]] + [cells.cell(key, figure, "{:.1f}") for figure in lanes] + [cells.cell(key, ratio)])
    head = ["", "bare: one thread", "two", "recorded: one thread", "two", "recorded: two / one"]
    return ["The same by native threads, each on a core of its own, beginning each burst together: ns of CPU time per pair.\n",
            table(head, rows)] if rows else []


def noise(cells):
    waits = [result["before"]["waited_for_core"] * 100 for key in cells.results for result in cells.good(key)
             if "before" in result and "waited_for_core" in result["before"] and not key.startswith("threads/")]
    if not waits:
        return ""
    return (f"While they were bare, targets of one thread waited for a core {statistics.median(waits):.1f} % of the time (median; at "
            f"most {max(waits):.1f} %): that is the load of others on the machine.\n")


def markdown(run):
    cells = Cells(run["results"])
    text = ["# Benchmarks\n",
            f"Written by `{' '.join(run['command'])}` on {run['started'][:16].replace('T', ' ')} UTC, in {run['seconds'] / 60:.0f} minutes; "
            "`scripts/bench --help` tells how to run it. Every figure is from that one run.\n",
            table(["", ""], [list(pair) for pair in run["machine"]]).replace("|---|--:|", "|---|---|"),
            f"Medians of {run['rounds']} fresh targets, small the lowest and the highest. Each cell: the target's speed for "
            f"{run['phase_seconds']} s bare, then as long recorded, then as long after. The row “{variants.TITLES['bare']}” "
            "is the noise.\n" + noise(cells),
            table(["workload", ""], [[name, what] for name, (_, _, what) in workloads.WORKLOADS.items()
                                     if any(key.startswith(name + "/") for key in run["results"])]).replace("--:", "---")]
    text += speed(cells) if any(key.split("/")[0] in workloads.WORKLOADS for key in run["results"]) else []
    text += web(cells) + events(cells) + attaching(cells) + captures(cells)
    if cells.failures:
        counts = {}
        for failure in cells.failures:
            counts[failure] = counts.get(failure, 0) + 1
        text += ["## What failed\n", table(["cell", "rounds", "why"], [[key, str(count), why.replace("|", "\\|")]
                                                                       for (key, why), count in counts.items()])]
    return "\n".join(part for part in text if part)
