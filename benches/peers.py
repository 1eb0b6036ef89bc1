#!/usr/bin/env python3
"""Compare Petra with restic and borg on the life of one machine-learning workspace.

  peers.py series DIR                       make the test series in DIR, once (root; about 3 minutes)
  peers.py run DIR --petra target/release/petra [--rounds 3] [--json F] [--markdown F]
  peers.py memory DIR --petra target/release/petra

`series` makes three 8 GiB sparse ext4 images, each a later point in time of one volume:
  s1.img  a Python environment, a large CSV file, incompressible images      2.6 GB allocated
  s2.img  + a filtered copy of the CSV, pickles, 200 random 4 KiB writes     3.1 GB
  s3.img  + two nearly equal checkpoints, one directory of images deleted    3.4 GB
Packages are pinned, everything else comes from fixed seeds. It needs e2fsprogs and network access to
a Python package index, and a Python from 3.9 to 3.12, for which all the pinned packages have wheels.

`run` snapshots the three images in order into a fresh local repository of each tool, then restores
the third and compares it byte for byte. It reports wall and CPU seconds, the time until everything written was on the
disk, peak RSS and stored bytes, as medians over the rounds, and how far Petra is ahead of the best peer. Within a round the tools take
turns at each stage, and each round starts with another tool, so that noise of the machine hits all
alike. Before a command is timed its input is read into the page cache and all dirty pages are
written back. `run` needs about 20 GB of disk in DIR/work, and 16 GB of memory to keep an image, a
repository and what is restored in the page cache. A virtual machine that hands free memory back to its
host makes fresh pages dear for the tool that needs them first: take three rounds there at least.

`memory` shows whether peak RSS grows with the address space: it snapshots and restores s1.img, and a
64 GiB volume that holds the same data spread out over eight places.
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn, Optional

MIB = 1 << 20
GIB = 1 << 30
IMAGE_SIZE = 8 * GIB
STAGES = ("s1", "s2", "s3")

# ---------------------------------------------------------------------------------------- the series

RECIPE = 1  # raise it with every change to what the series holds, so that old series are not reused
MARKER = "series.json"  # written last, so it marks a finished series

# About 1.3 GB installed. Dependencies are not resolved: these pins alone decide what is written.
PACKAGES = """
    numpy==2.0.2 pandas==2.2.3 scipy==1.13.1 scikit-learn==1.5.2 matplotlib==3.9.2 pyarrow==17.0.0
    polars==1.9.0 numba==0.60.0 llvmlite==0.43.0 sympy==1.13.3 h5py==3.12.1 transformers==4.45.2
    tokenizers==0.20.1 opencv-python-headless==4.10.0.84 jupyterlab==4.2.5 notebook==7.2.2
    ipython==8.18.1 pillow==10.4.0 fonttools==4.54.1 joblib==1.4.2 python-dateutil==2.9.0.post0
    pytz==2024.2 six==1.16.0
""".split()

CSV_ROWS = 4_600_000
IMAGES_TOTAL = 760_000_000
CHECKPOINT_VALUES = 37_500_000  # float32: 150 MB


def make_series(directory: Path) -> None:
    if holds_series(directory):
        print(f"{directory} already holds the series")
        return
    if os.geteuid() != 0:
        fail("`series` mounts its images, so it must run as root")
    if not (3, 9) <= sys.version_info[:2] <= (3, 12):
        fail("the pinned packages have wheels for Python 3.9 to 3.12: run `series` with one of these")
    enter_mount_namespace()

    directory.mkdir(parents=True, exist_ok=True)
    image, root = directory / "work.img", directory / "mnt"
    image.unlink(missing_ok=True)
    root.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    uuid = "5e77a000-0000-4000-8000-000000000001"
    call("mkfs.ext4", "-q", "-F", "-m", "0", "-U", uuid, "-E", f"hash_seed={uuid},lazy_itable_init=0", image)
    for stage in STAGES:
        started = time.monotonic()
        with mounted(image, root):
            if stage == "s1":
                python = make_environment(root)
            call(python, __file__, "fill", stage, root)
        # Unmounted, so the copy is a clean file system. Freed blocks stay allocated, as on a volume
        # that is not trimmed.
        copy = directory / f"{stage}.img"
        call("cp", "--reflink=auto", "--sparse=always", image, copy)
        print(f"{stage}.img: {allocated(copy) / 1e9:.2f} GB allocated, {time.monotonic() - started:.0f} s", flush=True)
    image.unlink()
    root.rmdir()
    os.sync()
    sizes = {stage: allocated(directory / f"{stage}.img") for stage in STAGES}
    (directory / MARKER).write_text(json.dumps({"recipe": RECIPE, "allocated": sizes}) + "\n")


def holds_series(directory: Path) -> bool:
    marker = directory / MARKER
    if not marker.exists():
        return False
    recipe = json.loads(marker.read_text())["recipe"]
    if recipe != RECIPE:
        fail(f"{directory} holds a series of recipe {recipe}, not {RECIPE}: remove it or choose another directory")
    return True


def enter_mount_namespace() -> None:
    """Run on in a mount namespace of our own: even if we are killed, the kernel then drops the mount
    and with it the loop device."""
    guard = "PEERS_MOUNT_NAMESPACE"
    if guard not in os.environ:
        os.environ[guard] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])


@contextlib.contextmanager
def mounted(image: Path, root: Path) -> Iterator[None]:
    call("mount", "-o", "loop,noatime", image, root)
    try:
        yield
    finally:
        with uninterrupted():
            call("umount", root)  # this also frees the loop device


def make_environment(root: Path) -> Path:
    call(sys.executable, "-m", "venv", root / "venv")
    python = root / "venv/bin/python"
    call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--only-binary", ":all:", *PACKAGES)
    return python


# What follows runs in the Python environment of the series, for numpy and pyarrow.

def fill_first(root: Path) -> None:
    (root / "data").mkdir()
    write_csv(root / "data/events.csv")
    rng = random.Random(2)
    written = number = 0
    while written < IMAGES_TOTAL:
        path = root / f"data/images/class-{number % 10}/{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = int(50_000 * 40 ** rng.random())  # 50 KB to 2 MB, small ones more often
        path.write_bytes(rng.randbytes(size))
        written += size
        number += 1


def write_csv(path: Path) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    rng = np.random.default_rng(1)
    syllables = ["ba", "cor", "da", "el", "fi", "gra", "ho", "in", "ka", "lu", "mer", "no", "pra", "ti", "ven", "zo"]
    vocabulary = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(5000)]
    countries = ["US", "IN", "BR", "DE", "FR", "GB", "JP", "IT", "ES", "GR"]

    def pick(words: list[str], indices: Any) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), words).cast(pa.string())

    def word(rows: int) -> Any:
        return pick(vocabulary, np.minimum(rng.zipf(1.3, rows), len(vocabulary)) - 1)

    tables = []
    clock = 1_700_000_000
    for first in range(0, CSV_ROWS, 200_000):
        rows = min(200_000, CSV_ROWS - first)
        times = clock + np.cumsum(rng.integers(0, 9, rows))
        clock = int(times[-1])
        tables.append(pa.table({
            "id": np.arange(first, first + rows),
            "time": pa.array(times, pa.timestamp("s")),
            "user": rng.integers(1, 200_000, rows),
            "country": pick(countries, rng.integers(0, len(countries), rows)),
            "product": word(rows),
            "quantity": rng.integers(1, 20, rows),
            "price": np.round(rng.gamma(2.0, 40.0, rows), 2),
            "latitude": np.round(rng.uniform(-60, 70, rows), 5),
            "longitude": np.round(rng.uniform(-180, 180, rows), 5),
            "score": np.round(rng.random(rows), 4),
            "comment": pc.binary_join_element_wise(*(word(rows) for _ in range(4)), " "),
        }))
    csv.write_csv(pa.concat_tables(tables), path, csv.WriteOptions(quoting_style="none"))


def fill_second(root: Path) -> None:
    import pickle

    import numpy as np
    from pyarrow import csv

    data = root / "data"
    with (data / "events.csv").open("rb") as source, (data / "events-kept.csv").open("wb") as target:
        target.write(source.readline())
        target.writelines(line for line in source if line.split(b",", 4)[3] in (b"US", b"GB", b"GR"))

    names = ["quantity", "price", "latitude", "longitude", "score"]
    options = csv.ConvertOptions(include_columns=["user", *names])
    table = csv.read_csv(data / "events.csv", convert_options=options)
    columns = [table[name].to_numpy().astype(np.float64) for name in names]
    scaled = [(column - column.min()) / (column.max() - column.min()) for column in columns]
    features = np.stack([a * b for a, b in itertools.combinations(scaled, 2)], axis=1)
    users, counts = np.unique(table["user"].to_numpy(), return_counts=True)
    activity = {f"user-{user}": {"events": count} for user, count in zip(users.tolist(), counts.tolist())}
    for name, value in {"features": features, "activity": activity}.items():
        with (data / f"{name}.pkl").open("wb") as file:
            pickle.dump(value, file, protocol=5)

    # Random writes spare the environment, which makes the checkpoints of the next stage.
    files = sorted(path for path in data.rglob("*") if path.suffix in (".csv", ".jpg"))
    blocks = [path.stat().st_size // 4096 for path in files]
    rng = random.Random(3)
    for path in rng.choices(files, blocks, k=200):  # as often as their sizes say
        with path.open("r+b") as file:
            file.seek(4096 * rng.randrange(path.stat().st_size // 4096))
            file.write(rng.randbytes(4096))


def fill_third(root: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(4)
    (root / "checkpoints").mkdir()
    weights = rng.standard_normal(CHECKPOINT_VALUES, dtype=np.float32) * np.float32(0.02)
    np.save(root / "checkpoints/step-1000.npy", weights)
    run = 256  # a step changes whole rows of an embedding: 2% of the values, in runs of 1 KiB
    for start in rng.integers(0, CHECKPOINT_VALUES // run, CHECKPOINT_VALUES // 50 // run) * run:
        weights[start:start + run] += rng.standard_normal(run, dtype=np.float32) * np.float32(0.001)
    np.save(root / "checkpoints/step-2000.npy", weights)
    shutil.rmtree(root / "data/images/class-7")


FILL = {"s1": fill_first, "s2": fill_second, "s3": fill_third}


# ---------------------------------------------------------------------------------------- the tools

@dataclass(frozen=True)
class Tool:
    """How to drive one tool. Snapshots run in a directory that holds `workspace.img`, restores in an
    empty one where they must make `workspace.img`."""
    name: str
    version: list[str]
    init: list[str]
    snapshot: Callable[[str], list[str]]  # by the name of the stage
    restore: Callable[[str], list[str]]


def petra(binary: str, repository: Path) -> Tool:
    url = repository.as_uri()
    return Tool(
        "petra", [binary, "--version"], [binary, "init", url],
        lambda stage: [binary, "snapshot", "workspace=workspace.img", f"{url}#bench/run-1", "--name", stage],
        lambda stage: [binary, "restore", f"{url}#bench/run-1/{stage}/workspace", "workspace.img"])


def restic(binary: str, repository: Path) -> Tool:
    command = [binary, "--repo", str(repository)]
    # Restic before 0.15 knows no --sparse and writes out the zeros.
    usage = subprocess.run([binary, "restore", "--help"], capture_output=True, text=True, check=True).stdout
    sparse = ["--sparse"] if "--sparse" in usage else []
    return Tool(
        "restic", [binary, "version"], [*command, "init"],
        lambda stage: [*command, "backup", "--tag", stage, "workspace.img"],
        lambda stage: [*command, "restore", "latest", "--tag", stage, "--target", ".", *sparse])


def borg(binary: str, repository: Path) -> Tool:
    return Tool(
        "borg", [binary, "--version"], [binary, "init", "--encryption", "none", str(repository)],
        # No `create --sparse`: it works with borg's chunker of fixed size only.
        lambda stage: [binary, "create", "--compression", "zstd,1", f"{repository}::{stage}", "workspace.img"],
        lambda stage: [binary, "extract", "--sparse", f"{repository}::{stage}"])


DRIVERS: dict[str, Callable[[str, Path], Tool]] = {"petra": petra, "restic": restic, "borg": borg}


def make_tools(names: str, petra_binary: Optional[str], work: Path) -> list[Tool]:
    tools = []
    for name in names.split(","):
        if name not in DRIVERS:
            fail(f"unknown tool {name!r}: choose from {', '.join(DRIVERS)}")
        if name == "petra" and not petra_binary:
            fail("say where petra is with --petra, or leave it out with --tools restic,borg")
        command = petra_binary if name == "petra" and petra_binary else name
        binary = shutil.which(command)
        if not binary:
            fail(f"{command} is not installed or not executable")
        tools.append(DRIVERS[name](os.path.abspath(binary), work / f"{name}-repository"))
    return tools


# ---------------------------------------------------------------------------------------- measuring

@dataclass
class Cost:
    wall: float  # seconds until the command returned
    durable: float  # seconds until all that it wrote was on the disk
    user: float  # CPU seconds
    system: float
    rss: float  # MiB, at its peak
    stored: float = 0  # MiB in the repository afterwards

    @property
    def cpu(self) -> float:
        return self.user + self.system


@dataclass
class Bench:
    """A scratch directory with fresh repositories, and the commands measured in it."""
    work: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        # Caches and settings of the user must neither help a tool nor be changed.
        home = self.work / "home"
        self.environment = {
            **os.environ, "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"), "XDG_CONFIG_HOME": str(home / "config"),
            "RESTIC_PASSWORD": "x", "RESTIC_CACHE_DIR": str(home / "restic"), "BORG_BASE_DIR": str(home / "borg")}

    def reset(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "home").mkdir(parents=True)
        (self.work / "current").mkdir()

    def init(self, tool: Tool) -> None:
        self.measure(tool.init, self.work)

    def snapshot(self, tool: Tool, image: Path, stage: str) -> Cost:
        # One name for all stages, so that tools find the parent. A hard link, not a symbolic one, since
        # tools store the latter as such.
        current = self.work / "current/workspace.img"
        current.unlink(missing_ok=True)
        os.link(image, current)
        read_all(current)
        cost = self.measure(tool.snapshot(stage), current.parent)
        cost.stored = sum(path.stat().st_size for path in self.repository_files(tool)) / MIB
        return cost

    def restore(self, tool: Tool, image: Path, stage: str) -> Cost:
        target = self.work / "restored"
        target.mkdir()
        for path in self.repository_files(tool):
            read_all(path)
        cost = self.measure(tool.restore(stage), target)
        call("cmp", image, target / "workspace.img")
        shutil.rmtree(target)
        return cost

    def repository_files(self, tool: Tool) -> list[Path]:
        return [path for path in (self.work / f"{tool.name}-repository").rglob("*") if path.is_file()]

    def measure(self, command: list[str], directory: Path) -> Cost:
        os.sync()  # the write-back of what ran before must not slow this command down
        log = self.work / "log"
        with log.open("wb") as output:
            started = time.monotonic()
            process = subprocess.Popen(command, cwd=directory, env=self.environment,
                                       stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            wall = time.monotonic() - started
            # Tools differ in what they leave to the kernel; whoever relies on a backup waits for all of it.
            os.sync()
            durable = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            fail(f"exit code {process.returncode} of: {' '.join(command)}\n{log.read_text(errors='replace').strip()}")
        # Linux counts our own peak before exec as the child's, so this script must stay small.
        return Cost(wall, durable, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / 1024)


def read_all(path: Path) -> None:
    """Bring a file into the page cache, holes and all: otherwise the first tool alone would pay for
    the zero pages of the holes."""
    buffer = bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


@contextlib.contextmanager
def bench(directory: Path) -> Iterator[Bench]:
    if not holds_series(directory):
        fail(f"{directory} holds no finished series: make it with `peers.py series {directory}`")
    bench = Bench(directory.resolve() / "work")
    with (directory / MARKER).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another benchmark is running in {directory}")
        bench.reset()
        try:
            yield bench
        finally:
            with uninterrupted():
                shutil.rmtree(bench.work, ignore_errors=True)


Round = dict[str, dict[str, Cost]]  # tool -> "s1", "s2", "s3" or "restore" -> cost


def run_round(bench: Bench, tools: list[Tool], directory: Path, shift: int) -> Round:
    bench.reset()
    order = tools[shift % len(tools):] + tools[:shift % len(tools)]
    costs: Round = {tool.name: {} for tool in tools}
    for tool in order:
        bench.init(tool)
    for stage in STAGES:
        for tool in order:
            costs[tool.name][stage] = bench.snapshot(tool, directory / f"{stage}.img", stage)
            progress(tool, f"snapshot {stage}", costs[tool.name][stage])
    for tool in order:
        costs[tool.name]["restore"] = bench.restore(tool, directory / "s3.img", "s3")
        progress(tool, "restore s3", costs[tool.name]["restore"])
    return costs


def progress(tool: Tool, step: str, cost: Cost) -> None:
    print(f"  {tool.name:8} {step:12} {cost.wall:7.2f} s, durable {cost.durable:7.2f} s {cost.cpu:7.2f} s CPU {cost.rss:6.0f} MiB RSS",
          file=sys.stderr, flush=True)


def median_round(rounds: list[Round]) -> Round:
    def median(tool: str, step: str) -> Cost:
        samples = [asdict(costs[tool][step]) for costs in rounds]
        return Cost(**{key: statistics.median(sample[key] for sample in samples) for key in samples[0]})

    return {tool: {step: median(tool, step) for step in steps} for tool, steps in rounds[0].items()}


# ---------------------------------------------------------------------------------------- reporting

Table = list[list[str]]


def peers_table(costs: Round) -> Table:
    table = [["tool", "snapshots, s", "durable, s", "CPU, s", "stored after each, MiB", "restore, s", "durable, s", "CPU, s",
              "peak RSS snapshot, MiB", "restore, MiB"]]
    for tool, steps in costs.items():
        snapshots, restore = [steps[stage] for stage in STAGES], steps["restore"]
        table.append([
            tool,
            " / ".join(f"{cost.wall:.2f}" for cost in snapshots),
            " / ".join(f"{cost.durable:.2f}" for cost in snapshots),
            " / ".join(f"{cost.cpu:.1f}" for cost in snapshots),
            " / ".join(f"{cost.stored:.0f}" for cost in snapshots),
            f"{restore.wall:.2f}", f"{restore.durable:.2f}", f"{restore.cpu:.1f}",
            f"{max(cost.rss for cost in snapshots):.0f}", f"{restore.rss:.0f}"])
    return table


def goals_table(costs: Round) -> Table:
    """Petra against the best peer in each discipline; empty if either is missing."""
    ours = costs.get("petra")
    peers = {tool: steps for tool, steps in costs.items() if tool != "petra"}
    if not ours or not peers:
        return []
    table = [["", "petra", "best peer", "ratio", "ratio until durable", "goal", "met"]]

    def best(step: str, attribute: str) -> tuple[str, float]:
        return min(((tool, getattr(steps[step], attribute)) for tool, steps in peers.items()), key=lambda pair: pair[1])

    for label, step, goal in (("first snapshot", "s1", 3), ("second snapshot", "s2", 4),
                              ("third snapshot", "s3", 4), ("restore of the third", "restore", 3)):
        peer, wall = best(step, "wall")
        _, durable = best(step, "durable")
        ratio = wall / ours[step].wall
        table.append([label, f"{ours[step].wall:.2f} s", f"{peer} {wall:.2f} s", f"{ratio:.2f}x faster",
                      f"{durable / ours[step].durable:.2f}x", f">= {goal}x faster", yes_no(ratio >= goal)])
    peer, stored = best("s3", "stored")
    ratio = ours["s3"].stored / stored
    table.append(["stored after the third", f"{ours['s3'].stored:.0f} MiB", f"{peer} {stored:.0f} MiB",
                  f"{ratio:.3f}", "", "<= 0.85", yes_no(ratio <= 0.85)])
    rss = max(cost.rss for cost in ours.values())
    table.append(["peak RSS", f"{rss:.0f} MiB", "", "", "", "<= 400 MiB", yes_no(rss <= 400)])
    return table


def yes_no(met: bool) -> str:
    return "yes" if met else "NO"


def as_markdown(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------- commands

def run(options: argparse.Namespace) -> None:
    directory = options.directory
    load = os.getloadavg()[0]  # tells a reader whether the machine had other work
    with bench(directory) as scratch:
        tools = make_tools(options.tools, options.petra, scratch.work)
        versions = {tool.name: output_of(tool.version) for tool in tools}
        rounds = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            rounds.append(run_round(scratch, tools, directory, number))
    medians = median_round(rounds)
    sizes = " / ".join(f"{allocated(directory / f'{stage}.img') / 1e9:.2f}" for stage in STAGES)
    report = "\n".join([
        f"Three 8 GiB images, {sizes} GB allocated; {os.cpu_count()} cores (load {load:.1f} before), "
        f"Linux {platform.release()}, warm page cache, local repository; median of {options.rounds} round(s). "
        f"{'; '.join(versions.values())}.\n",
        as_markdown(peers_table(medians)),
        as_markdown(goals) if (goals := goals_table(medians)) else ""])
    print(report)
    if options.markdown:
        options.markdown.write_text(report)
    if options.json:
        samples = {"versions": versions, "load": load, "median": medians, "rounds": rounds}
        options.json.write_text(json.dumps(samples, default=asdict, indent=1) + "\n")


def memory(options: argparse.Namespace) -> None:
    table = [["volume", "allocated, GB", "snapshot RSS, MiB", "restore RSS, MiB", "snapshot, s", "restore, s"]]
    with bench(options.directory) as scratch:
        small, large = options.directory / "s1.img", scratch.work / "large.img"
        [tool] = make_tools("petra", options.petra, scratch.work)
        for image, label in ((small, "8 GiB"), (large, "64 GiB")):
            scratch.reset()
            if image == large:
                spread_out(small, large, 8)
            scratch.init(tool)
            taken, restored = scratch.snapshot(tool, image, "s1"), scratch.restore(tool, image, "s1")
            table.append([label, f"{allocated(image) / 1e9:.2f}", f"{taken.rss:.0f}", f"{restored.rss:.0f}",
                          f"{taken.wall:.2f}", f"{restored.wall:.2f}"])
    print(as_markdown(table))


def spread_out(source: Path, target: Path, factor: int) -> None:
    """Copy the data of `source` into a file `factor` times its size: each of `factor` equal slices goes
    to the start of an equal part of the target, with a hole after it."""
    with source.open("rb") as reader, target.open("wb") as writer:
        size = source.stat().st_size
        writer.truncate(size * factor)
        end = 0
        while True:
            try:
                start = os.lseek(reader.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: no data after `end`
                return
            end = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            while start < end:
                piece = start // (size // factor)
                length = min(end, (piece + 1) * (size // factor)) - start
                copied = os.copy_file_range(reader.fileno(), writer.fileno(), length, start,
                                            start + piece * (size - size // factor))
                start += copied


# ---------------------------------------------------------------------------------------- helpers

@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """For cleaning up: an impatient second Ctrl-C must not keep us from it."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def call(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def fail(message: str) -> NoReturn:
    sys.exit(f"peers.py: {message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("series", "make the test series"), ("run", "compare the tools"),
                       ("memory", "peak RSS by the size of the volume")):
        command = commands.add_parser(name, help=text)
        command.add_argument("directory", type=Path, metavar="DIR")
        if name != "series":
            command.add_argument("--petra", metavar="BINARY", required=name == "memory")
        if name == "run":
            command.add_argument("--tools", default=",".join(DRIVERS), help="default: %(default)s")
            command.add_argument("--rounds", type=int, default=1)
            command.add_argument("--json", type=Path, metavar="FILE", help="write all samples")
            command.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    inner = commands.add_parser("fill")  # `series` runs this with the Python of the series
    inner.add_argument("stage", choices=STAGES)
    inner.add_argument("directory", type=Path)
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, to clean up
    try:
        if options.command == "series":
            make_series(options.directory)
        elif options.command == "fill":
            FILL[options.stage](options.directory)
        else:
            {"run": run, "memory": memory}[options.command](options)
    except subprocess.CalledProcessError as error:
        fail(f"exit code {error.returncode} of: {' '.join(error.cmd)}\n{error.stderr or ''}".strip())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
