"""What the benchmark runs on and with: heaptap's release build, the peers' environment, the compiled helpers, the description
of the machine. Knows nothing of what is measured."""
import json
import os
import platform
import subprocess
import sys

import kept

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FIXTURES = os.path.join(ROOT, "fixtures", "bench")
# numpy in whichever version there is for the interpreter; the others so that runs can be compared.
PACKAGES = ["memray==1.20.0", "uvicorn==0.54.0", "starlette==1.10.0", "numpy"]


class Unusable(Exception):
    """The benchmark can't run here."""


def command(arguments, what, **options):
    try:
        subprocess.run(arguments, check=True, stdout=sys.stderr, **options)
    except (OSError, subprocess.CalledProcessError) as problem:
        raise Unusable(f"{what}: {problem}") from problem


def heaptap():
    """Builds it; its path."""
    command(["cargo", "build", "--release", "--quiet", "--bin", "heaptap"], "heaptap does not build", cwd=ROOT)
    folder = os.environ.get("CARGO_TARGET_DIR") or os.path.join(ROOT, "target")
    return os.path.join(folder, "release", "heaptap")


def environment(python):
    """A virtual environment of that interpreter with the peers, made once and kept; its python."""
    try:
        version = subprocess.check_output([python, "-c", "import platform; print(platform.python_version())"], text=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        raise Unusable(f"{python} does not run: {problem}") from problem
    cache = os.environ.get("HEAPTAP_PYTHONS") or os.path.expanduser("~/.cache/heaptap/pythons")
    try:
        return kept.environment(python, os.path.join(cache, ".bench", version.strip()), PACKAGES)
    except (OSError, subprocess.CalledProcessError) as problem:
        raise Unusable(f"no environment with {' '.join(PACKAGES)} for {python}: {problem}") from problem


def helpers(folder):
    """Compiles the C helpers into that folder; the paths of the library and of the HTTP clients."""
    native = os.path.join(FIXTURES, "native")
    library, clients = os.path.join(folder, "pairs.so"), os.path.join(folder, "clients")
    flags = ["cc", "-O2", "-Wall"]
    command([*flags, "-shared", "-fPIC", "-pthread", "-o", library, os.path.join(native, "pairs.c")], "no C compiler")
    command([*flags, "-o", clients, os.path.join(native, "clients.c")], "no C compiler")
    return library, clients


def first_line(arguments):
    try:
        return subprocess.check_output(arguments, text=True, stderr=subprocess.DEVNULL).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def changed_commit():
    """The commit that is measured, and whether the sources differ from it."""
    changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True).stdout
    return first_line(["git", "-C", ROOT, "describe", "--always", "--abbrev=12"]) + (" and changes" if changed else "")


def description(python, binary):
    """The machine and the versions, as (what, value) pairs. What is not there, and was not needed, is left out."""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) / 1024 / 1024
    code = ("import json, platform, importlib.metadata as m\n"
            "def version(name):\n"
            "    try: return ' '.join([name, m.version(name)])\n"
            "    except m.PackageNotFoundError: pass\n"
            "print(json.dumps([platform.python_version(), platform.libc_ver()]"
            " + [version(n) for n in ('memray', 'numpy', 'uvicorn', 'starlette')]))")
    version, libc, memray, *packages = json.loads(subprocess.check_output([python, "-c", code]))
    virtual = first_line(["systemd-detect-virt", "--vm"])
    cores = f"{len(os.sched_getaffinity(0))} cores"
    pairs = [
        ("CPU", f"{model}, {cores}" + ("" if virtual in ("none", "unknown") else f" ({virtual})")),
        ("Memory", f"{memory:.0f} GiB"),
        ("System", f"Linux {platform.release()} {platform.machine()}, {' '.join(libc)}"),
        ("Target", ", ".join([f"CPython {version}", *filter(None, packages)])),
    ]
    if binary:
        pairs.append(("heaptap", f"{first_line([binary, '--version'])}, commit {changed_commit()}"))
    if memray:
        pairs.append(("Peers", f"{memray}, attached with {first_line(['gdb', '--version'])}; tracemalloc of the same CPython"))
    return pairs
