"""What scripts make once and keep in the cache folder: it counts as made when it is on the disk, and is looked at before it is used
again. A machine may be cut off at any moment, and then a file can be shorter than it was, although what was written later is there."""
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

# Run by an environment's own python: what is not as the RECORDs say, and packages that are missing. The RECORDs are read here
# since importlib.metadata leaves out missing files from 3.12 on.
CHECK = """
import base64, csv, hashlib, importlib.metadata, marshal, re, sys, sysconfig
def complaint(path, told, size):
    try:
        with open(path, 'rb') as file:
            data = file.read()
    except OSError as problem:
        return str(problem)
    if size and len(data) != int(size):
        return '%d bytes instead of %s' % (len(data), size)
    if told:
        kind, _, told = told.partition('=')
        if base64.urlsafe_b64encode(hashlib.new(kind, data).digest()).rstrip(b'=').decode() != told:
            return 'other bytes'
    elif path.endswith('.pyc'):
        try:
            marshal.loads(data[16:])
        except (EOFError, ValueError, TypeError):
            return 'cut off'
plain = lambda name: re.sub('[-_.]+', '-', name).lower()
there = set()
places = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
for distribution in importlib.metadata.distributions(path=list(places)):
    there.add(plain(distribution.metadata['Name'] or ''))
    rows = list(csv.reader((distribution.read_text('RECORD') or '').splitlines()))
    if not rows:
        print('%s: no RECORD' % distribution.metadata['Name'])
    for row in rows:
        why = complaint(str(distribution.locate_file(row[0])), *row[1:]) if len(row) == 3 else 'RECORD is cut off'
        if why:
            print('%s: %s' % (row[0] if row else '?', why))
for name in sys.argv[1:]:
    if plain(re.split('[=<>!~;[ ]', name)[0]) not in there:
        print('%s: not installed' % name)
"""


def stamp(path, text):
    """Writes the sign that something is made, whole or not at all, once everything that was made is on the disk."""
    os.sync()
    with open(path + ".new", "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.rename(path + ".new", path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def read(path):
    """A stamp's text; None where there is none."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return None


def environment(python, folder, packages, options=()):
    """The python of a virtual environment with these packages, made unless it is there and whole.

    Raises OSError or subprocess.CalledProcessError."""
    os.makedirs(folder, exist_ok=True)
    sign, inside, wanted = os.path.join(folder, "installed"), os.path.join(folder, "bin", "python"), "\n".join(packages)
    with open(os.path.join(folder, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_there = read(sign) == wanted
        damage = damage_of(inside, packages) if is_there else []
        if damage:
            # A program may run from it: it goes only if a second look finds the same.
            time.sleep(1)
            damage = [line for line in damage_of(inside, packages) if line in damage]
        if damage:
            print("%s is damaged and made anew: %s" % (folder, "; ".join(damage[:5])), file=sys.stderr)
        if damage or not is_there:
            clear(folder)
            subprocess.run([python, "-m", "venv", folder], check=True, stdout=sys.stderr)
            pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
            subprocess.run([*pip, *packages], check=True, stdout=sys.stderr)
            stamp(sign, wanted)
    return inside


def damage_of(inside, packages):
    """What is wrong with an environment, a line for each file."""
    try:
        done = subprocess.run([inside, "-I", "-c", CHECK, *packages], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as problem:
        return [str(problem)]
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return lines if done.returncode == 0 else lines[-1:] or ["its python ends with %d" % done.returncode]


def clear(folder):
    """Takes everything out but the lock that is held; the sign first, so that what is half gone is not taken for whole."""
    for name in sorted(os.listdir(folder), key=lambda name: name != "installed"):
        path = os.path.join(folder, name)
        if name == ".lock":
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def list_files(folder, path):
    """Writes the sizes of all files in a folder to a stamp. What is made later, or by who runs it, does not count."""
    sizes = {}
    for place, folders, names in os.walk(folder):
        passing = {"__pycache__"} | ({"dev", "proc", "tmp", "var"} if place == folder else set())
        folders[:] = [name for name in folders if name not in passing]
        for name in names:
            file = os.path.join(place, name)
            if os.path.isfile(file) and not os.path.islink(file) and not name.startswith(("shim.so", "embed")):
                sizes[os.path.relpath(file, folder)] = os.path.getsize(file)
    stamp(path, json.dumps(sizes, indent=0, sort_keys=True))


def damaged_files(folder, path):
    """Files that are not as the list says. Without one nothing is known, and nothing is told."""
    def size(name):
        try:
            return os.lstat(os.path.join(folder, name)).st_size
        except OSError:
            return None

    return [name for name, wanted in json.loads(read(path) or "{}").items() if size(name) != wanted]
