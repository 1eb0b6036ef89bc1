"""The level `volumes`: pauses, changes found from extent maps, clones that start at once.

DIR is a directory with 40 GB of room (and 8 GB of memory), where pools, images and repositories are made and deleted. It needs root, fio,
restic, versitygw (a real S3 server), btrfs-progs and xfsprogs. Every figure is one against another of the same run:

  pause        how long applications wait for a snapshot while fio writes 200 MB/s, on both kinds of pools; and with an
               image of very many extents
  group        the same for three volumes at one point in time
  latency      what snapshots, and then their deletion, add to writes of 4 KiB to volumes of very many extents
  uploads      fio on a volume while a snapshot of it uploads to a repository in memory, after the snapshot, and before it
  incremental  64 MiB changed in a volume of 8 GiB, little of it or nearly all of it data, and in one of 256 GiB; against
               restic, which reads the image (from the page cache)
  scattered    20,000 writes of 4 KiB in 2 GiB of data, as a database does it, and then 64 MiB changed in such a volume, on both
               kinds of pools; against restic
  clones       from the command to a mounted file system: by reference; lazily from S3 on loopback, with and without
               30 ms more for each request, 8 GiB and 1 TiB; then find and cat; and hydration without readers against
               a restore into the same pool
  device       fio on a volume, right after a snapshot too, and on a lazy clone whose data is all there; in turns with a raw
               file of the same disk and a plain loop device
"""
from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator

from .measure import GIB, MIB, load_results, machine, read_all, store_results, write_noise
from .server import ACCESS, SECRET, s3_server, slow_way
from .tools import find, petra as petra_tool, versions

KINDS = ("btrfs", "xfs")


class Bench:
    def __init__(self, petra: str, directory: Path) -> None:
        self.petra, self.directory = petra, directory
        self.rows: list[tuple[str, str, str]] = []
        self.environment = {**os.environ, "RESTIC_PASSWORD": "x", "AWS_ACCESS_KEY_ID": ACCESS,
                            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}

    def row(self, what: str, measured: str, goal: str = "") -> None:
        print(f"{what}: {measured}  {goal}", file=sys.stderr, flush=True)
        self.rows.append((what, measured, goal))

    def call(self, *words: object) -> str:
        done = subprocess.run([str(word) for word in words], env=self.environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode != 0:
            sys.exit(f"failed: {' '.join(map(str, words))}\n{done.stderr.strip()}")
        return done.stdout.strip()

    def run(self, *words: object) -> Any:
        out = self.call(self.petra, "--json", *words)
        return json.loads(out) if out else None

    def timed(self, *words: object) -> float:
        os.sync()
        begun = time.monotonic()
        self.call(self.petra, "--quiet", *words)
        return time.monotonic() - begun

    @contextlib.contextmanager
    def pool(self, kind: str, name: str = "pool", size: str = "24G") -> Iterator[Path]:
        root = self.directory / f"{name}-{kind}"
        self.run("pool", "init", f"{root}.img", "--size", size, "--at", root, "--filesystem", kind, "--overcommit", "10000")
        try:
            yield root
        finally:
            for volume in self.run("volume", "ls", "--pool", root)["volumes"]:
                self.call(self.petra, "volume", "unmount", "--pool", root, volume["name"])
            end_agent(root)
            self.call("umount", root)
            Path(f"{root}.img").unlink()

    def fio(self, target: Path, *options: str, seconds: int = 10) -> dict[str, Any]:
        out = self.call("fio", "--name=x", f"--filename={target}", "--output-format=json", "--direct=1",
                        "--ioengine=io_uring", "--time_based", f"--runtime={seconds}", *options)
        job: dict[str, Any] = json.loads(out[out.index("{"):])["jobs"][0]
        return job

    @contextlib.contextmanager
    def writing(self, target: Path, size: str, rate: str, block: str = "128k") -> Iterator[None]:
        """Something that writes all the time."""
        load = subprocess.Popen(
            ["fio", "--thread", "--name=x", f"--filename={target}", f"--size={size}", f"--bs={block}", "--rw=randwrite", "--direct=1",
             "--ioengine=io_uring", "--iodepth=8", f"--rate={rate}", "--time_based", "--runtime=600"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            load.kill()
            load.wait()
            # The kernel closes what io_uring had open a little later.
            time.sleep(1)

    def pauses(self, root: Path, *volumes: str) -> list[float]:
        """How long the applications waited, in ms, for each of 20 snapshots."""
        pauses = []
        for _ in range(20):
            taken = self.run("volume", "snapshot", "--pool", root, *volumes, f"{self.directory}/repo#e/r", "--later")
            pauses.append(taken["pause_ms"])
            self.run("volume", "upload", "--pool", root, "--give-up", taken["upload"])
            # The room of a deleted copy is given back in the background, which would slow the next snapshot down.
            time.sleep(2)
        return pauses


def end_agent(root: Path) -> None:
    """The agent of a pool that goes away need not wait until it is idle."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"agent" in words and os.fsencode(root) in words:
                os.kill(int(entry.parent.name), signal.SIGTERM)
    time.sleep(0.5)


# ------------------------------------------------------------------------------------------------- pauses

def pause(bench: Bench) -> None:
    for kind in KINDS:
        with bench.pool(kind) as root:
            bench.run("volume", "create", "--pool", root, "v", "--size", "6G")
            bench.run("volume", "mount", "--pool", root, "v", bench.directory / "at")
            write_noise(bench.directory / "at/file", 3 * GIB, 2)
            for label, prepare in (("", False), (", very many extents", True)):
                if prepare:
                    # What is shared with a copy gets a place of its own when it is overwritten.
                    kept = bench.run("volume", "snapshot", "--pool", root, "v", f"{bench.directory}/repo#e/r", "--later")
                    bench.fio(bench.directory / "at/file", "--size=3G", "--bs=4k", "--rw=randwrite", "--iodepth=32",
                              seconds=30)
                    bench.run("volume", "upload", "--pool", root, "--give-up", kept["upload"])
                extents = bench.run("volume", "info", "--pool", root, "v")["usage"]["extents"]
                with bench.writing(bench.directory / "at/file", "3G", "200m"):
                    time.sleep(2)
                    pauses = bench.pauses(root, "v")
                bench.row(f"pause on {kind}{label} ({extents} extents), fio writing 200 MB/s", spread(pauses), "<= 100 ms at p99")


def group(bench: Bench) -> None:
    names = ("a", "b", "c")
    for kind in KINDS:
        with bench.pool(kind) as root, contextlib.ExitStack() as loads:
            for name in names:
                at = bench.directory / f"at-{name}"
                bench.run("volume", "create", "--pool", root, name, "--size", "4G")
                bench.run("volume", "mount", "--pool", root, name, at)
                write_noise(at / "file", GIB, 2)
                loads.enter_context(bench.writing(at / "file", "1G", "66m"))
            time.sleep(2)
            pauses = bench.pauses(root, *names)
            bench.row(f"pause of three volumes on {kind}, fio writing 66 MB/s to each", spread(pauses), "<= 100 ms at p99")


def spread(pauses: list[float]) -> str:
    return f"median {statistics.median(pauses):.0f} ms, worst of {len(pauses)} {max(pauses):.0f} ms"


# ------------------------------------------------------------------------------------------------- latency

def latency(bench: Bench) -> None:
    for kind in KINDS:
        with bench.pool(kind) as root, contextlib.ExitStack() as stack:
            names = ("a", "b", "c")
            for name in names:
                bench.run("volume", "create", "--pool", root, name, "--size", "2G")
                bench.run("volume", "mount", "--pool", root, name, bench.directory / f"at-{name}")
                write_noise(bench.directory / f"at-{name}/file", GIB, 2)
            # What is shared with a copy gets a place of its own when it is overwritten.
            kept = bench.run("volume", "snapshot", "--pool", root, *names, f"{bench.directory}/repo#e/r", "--later")
            for name in names:
                bench.fio(bench.directory / f"at-{name}/file", "--size=1G", "--bs=4k", "--rw=randwrite", "--iodepth=32", seconds=20)
            extents = sum(bench.run("volume", "info", "--pool", root, name)["usage"]["extents"] for name in names)
            # Two others write all the time.
            for name in names[1:]:
                stack.enter_context(bench.writing(bench.directory / f"at-{name}/file", "1G", "4m", block="4k"))
            time.sleep(2)

            def measure(meanwhile: Callable[[], object]) -> dict[str, float]:
                with concurrent.futures.ThreadPoolExecutor() as pool:
                    found = pool.submit(bench.fio, bench.directory / "at-a/file", "--size=1G", "--bs=4k", "--rw=randwrite",
                                        "--iodepth=1", "--rate_iops=1000", seconds=20)
                    time.sleep(2)
                    while not found.done():
                        meanwhile()
                percentiles: dict[str, float] = found.result()["write"]["clat_ns"]["percentile"]
                return {share: percentiles[f"{float(share):.6f}"] / 1e6 for share in ("50", "99", "99.9")}

            def snapshot() -> None:
                taken.append(bench.run("volume", "snapshot", "--pool", root, *names, f"{bench.directory}/repo#e/r", "--later"))
                time.sleep(2)

            def delete() -> None:
                if taken:
                    bench.run("volume", "upload", "--pool", root, "--give-up", taken.pop(0)["upload"])
                time.sleep(2)

            taken = [kept]
            alone = measure(lambda: time.sleep(0.1))
            for what, meanwhile in (("while all three are snapshotted every 2 s", snapshot), ("while those copies are deleted", delete)):
                beside = measure(meanwhile)
                bench.row(f"{kind}: 1,000 writes of 4 KiB a second, three volumes of {extents:,} extents, {what}", ", ".join(
                    f"p{share} {beside[share]:.2f} ms ({alone[share]:.2f} before)" for share in alone))
            while taken:
                delete()


# ------------------------------------------------------------------------------------------------- uploads

def uploads(bench: Bench) -> None:
    # In memory, which stands for a bucket: one on the same disk would take its share of that, whatever the priority.
    repository = Path(tempfile.mkdtemp(dir="/dev/shm")) / "repository"
    try:
        for kind in KINDS:
            with bench.pool(kind) as root:
                uploads_from(bench, kind, root, repository)
    finally:
        shutil.rmtree(repository.parent)


def uploads_from(bench: Bench, kind: str, root: Path, repository: Path) -> None:
    mix = ("--size=1G", "--bs=4k", "--rw=randrw", "--rwmixread=50", "--iodepth=8")
    jobs = (("a mix of 4 KiB, as fast as it goes", mix), ("the same at 5,000 IOPS each way", (*mix, "--rate_iops=5000")),
            ("1 MiB writes at 200 MB/s", ("--size=1G", "--bs=1m", "--rw=write", "--iodepth=4", "--rate=200m")))
    at = bench.directory / "at"
    bench.run("volume", "create", "--pool", root, "v", "--size", "8G")
    bench.run("volume", "mount", "--pool", root, "v", at)
    write_noise(at / "file", GIB, 2)
    write_noise(at / "data", 5 * GIB, 3)
    for job, options in jobs:
        def measure() -> tuple[float, float]:
            found = bench.fio(at / "file", *options, seconds=15)
            sides = [found[side] for side in ("read", "write") if found[side]["total_ios"]]
            return (sum(side["bw_bytes"] for side in sides) / MIB,
                    max(side["clat_ns"]["percentile"]["99.000000"] for side in sides) / 1e6)

        bench.run("init", repository)
        alone = measure()
        # What is written after a snapshot has no place yet.
        taken = bench.run("volume", "snapshot", "--pool", root, "v", f"{repository}#e/r", "--later")
        upload = subprocess.Popen([bench.petra, "volume", "upload", "--pool", str(root), taken["upload"], "--quiet"],
                                  env=bench.environment, stdout=subprocess.DEVNULL)
        beside = measure()
        still = upload.poll() is None
        upload.wait()
        kept = bench.run("volume", "snapshot", "--pool", root, "v", f"{repository}#e/r", "--later")
        after = measure()
        bench.run("volume", "upload", "--pool", root, "--give-up", kept["upload"])
        shutil.rmtree(repository)
        for what, (rate, latency) in (("while it uploads" + ("" if still else ", which ended before"), beside),
                                      ("after a snapshot, no upload", after)):
            bench.row(f"{kind}: {job}, {what}", f"{rate / alone[0]:.2f} of {alone[0]:.0f} MiB/s; "
                      f"p99 {latency / alone[1]:.2f} x {alone[1]:.2f} ms", ">= 0.9; <= 1.3 x")


# ------------------------------------------------------------------------------------------------- changes

def incremental(bench: Bench) -> None:
    walls = {}
    for size, data in ((8, 2), (256, 2), (8, 7)):
        with bench.pool("btrfs", size="30G") as root:
            bench.run("volume", "create", "--pool", root, "v", "--size", f"{size}G")
            bench.run("volume", "mount", "--pool", root, "v", bench.directory / "at")
            write_noise(bench.directory / "at/data", data * GIB, 1)
            repository = bench.directory / "repo"
            bench.run("init", repository)
            bench.run("volume", "snapshot", "--pool", root, "v", f"{repository}#e/r")
            samples = []
            for turn in range(5):
                overwrite(bench.directory / "at/data", data * GIB, 64, turn)
                os.sync()
                samples.append(bench.timed("volume", "snapshot", "--pool", root, "v", f"{repository}#e/r"))
            wall = walls[size, data] = statistics.median(samples)
            image = bench.directory / "image"
            if size == 8:
                bench.call(bench.petra, "volume", "unmount", "--pool", root, "v")
                shutil.copyfile(root / "volumes/v/live/image", image)
        shutil.rmtree(repository)
        if size == 8:
            other = whole_image(bench, image, lambda file, seed: overwrite(file, 2 * GIB, 64, seed, at=3 * GIB))
            bench.row(f"64 MiB changed of 8 GiB ({data} GiB of data): petra, restic", f"{wall:.2f} s, {other:.2f} s: "
                      f"{other / wall:.1f}x", ">= 50x")
        else:
            bench.row(f"the same in a volume of {size} GiB", f"{wall:.2f} s: {wall / walls[8, data]:.2f} of that of 8 GiB", "<= 1.5")


def whole_image(bench: Bench, image: Path, change: Callable[[Path, int], None]) -> float:
    """Seconds that restic takes for a change in an image that it knows, and has to read."""
    bench.call("restic", "-q", "-r", bench.directory / "restic", "init")
    backup = ("restic", "-q", "--no-cache", "-r", bench.directory / "restic", "backup", image)
    bench.call(*backup)
    samples = []
    for turn in range(3):
        change(image, 9 + turn)
        read_all(image)
        os.sync()
        begun = time.monotonic()
        bench.call(*backup)
        samples.append(time.monotonic() - begun)
    image.unlink()
    shutil.rmtree(bench.directory / "restic")
    return statistics.median(samples)


def scattered(bench: Bench) -> None:
    image = bench.directory / "image"
    changes = {"20,000 writes of 4 KiB": scatter, "then 64 MiB": lambda file, seed: overwrite(file, 2 * GIB, 64, seed)}
    walls = {}
    for kind in KINDS:
        with bench.pool(kind, size="30G") as root:
            bench.run("volume", "create", "--pool", root, "v", "--size", "8G")
            bench.run("volume", "mount", "--pool", root, "v", bench.directory / "at")
            write_noise(bench.directory / "at/data", 2 * GIB, 1)
            repository = bench.directory / "repo"
            bench.run("init", repository)
            bench.run("volume", "snapshot", "--pool", root, "v", f"{repository}#e/r")
            for what, change in changes.items():
                samples = []
                for turn in range(3):
                    change(bench.directory / "at/data", turn)
                    os.sync()
                    samples.append(bench.timed("volume", "snapshot", "--pool", root, "v", f"{repository}#e/r"))
                walls[kind, what] = statistics.median(samples)
        shutil.rmtree(repository)
    for what, change in changes.items():
        write_noise(image, 2 * GIB, 1)
        other = whole_image(bench, image, change)
        for kind in KINDS:
            wall = walls[kind, what]
            bench.row(f"{what} in 2 GiB of data, {kind}: petra, restic", f"{wall:.2f} s, {other:.2f} s: {other / wall:.1f}x")


def scatter(path: Path, seed: int) -> None:
    """Changes 20,000 blocks of 4 KiB in 2 GiB, each somewhere else."""
    noise = random.Random(seed)
    with path.open("r+b") as file:
        for _ in range(20_000):
            file.seek(noise.randrange(2 * GIB // 4096) * 4096)
            file.write(noise.randbytes(4096))


def overwrite(path: Path, length: int, count: int, seed: int, at: int = 0) -> None:
    """Changes `count` MiB, each somewhere else."""
    noise = random.Random(seed)
    with path.open("r+b") as file:
        for _ in range(count):
            file.seek(at + noise.randrange(length // MIB) * MIB)
            file.write(noise.randbytes(MIB))


# ------------------------------------------------------------------------------------------------- clones

def clones(bench: Bench) -> None:
    def url(port: int) -> str:
        return f"s3://bucket/p?endpoint=http://127.0.0.1:{port}&path-style=true"

    with (s3_server(bench.directory) as port, slow_way(port, 0.03, connecting=False) as slow,
          bench.pool("btrfs") as near, bench.pool("btrfs", "far") as far):
        bench.run("init", url(port))
        at = bench.directory / "at"
        for size, name in ((8, "8g"), (1024, "1t")):
            bench.run("volume", "create", "--pool", near, name, "--size", f"{size}G")
            bench.run("volume", "mount", "--pool", near, name, at)
            (at / "files").mkdir()
            for n in range(100):
                write_noise(at / f"files/{n}", 4 * MIB, n)
            write_noise(at / "large", 600 * MIB, 7)
            bench.run("volume", "snapshot", "--pool", near, name, f"{url(port)}#e/{name}", "--name", "s")
            bench.run("volume", "unmount", "--pool", near, name)
        reference = f"{url(port)}#e/8g/s"
        samples, mounts = [], []
        for n in range(7):
            cloned = bench.timed("clone", "--pool", near, reference, f"c{n}")
            mounted = bench.timed("volume", "mount", "--pool", near, f"c{n}", at)
            bench.run("volume", "unmount", "--pool", near, f"c{n}")
            samples.append((cloned + mounted) * 1000)
            # The call alone, of a clone that was never mounted either.
            bench.run("clone", "--pool", near, reference, f"m{n}")
            device = bench.run("volume", "attach", "--pool", near, f"m{n}")["device"]
            os.sync()
            mounts.append(mount_call(device, at) * 1000)
            bench.call("umount", at)
            bench.run("volume", "detach", "--pool", near, f"m{n}")
        whole, call = statistics.median(samples), statistics.median(mounts)
        bench.row("clone by reference, two commands, to mounted", f"{whole:.0f} ms, of which mount(2) {call:.0f} ms: {whole - call:.0f} ms "
                  "beyond it", "<= 50 ms")
        for name in ("8g", "1t"):
            for label, way, goal in (("", port, "<= 500 ms"), (", 30 ms more for each request", slow.port, "<= 1 s")):
                samples = []
                # The first one writes the start list.
                for n in range(4):
                    samples.append(bench.timed("mount", "--pool", far, f"{url(way)}#e/{name}/s", at))
                    time.sleep(4 if n == 0 else 0)
                    bench.run("unmount", "--pool", far, at)
                bench.row(f"lazy mount of {name} from S3{label}", f"{statistics.median(samples[1:]) * 1000:.0f} ms "
                          f"(the first, without a start list: {samples[0] * 1000:.0f} ms)", goal)
        restored = bench.timed("restore", reference, far / "restored.img")
        (far / "restored.img").unlink()
        os.sync()
        begun = time.monotonic()
        bench.call(bench.petra, "--quiet", "mount", "--pool", far, reference, at)
        bench.call("sh", "-c", f"find {at} | wc -l && cat {at}/files/? {at}/files/1? > /dev/null")
        bench.row("mount, find, cat of 80 MiB, against a whole restore", f"{time.monotonic() - begun:.2f} s, {restored:.2f} s")
        bench.run("unmount", "--pool", far, at)
        # Both end when all is durable in the same file system, and nobody reads meanwhile.
        pairs = [(bench.timed("restore", reference, far / f"restored-{n}.img"), hydration(bench, far, reference, f"h{n}"))
                 for n in range(3)]
        restored, hydrated = (statistics.median(side) for side in zip(*pairs))
        ratios = ", ".join(f"{restored / hydrated:.2f}" for restored, hydrated in pairs)
        bench.row("hydration, from the command, against a restore into a file of the same pool",
                  f"{hydrated:.2f} s, {restored:.2f} s: {ratios} of the rate", ">= 0.8")


def mount_call(device: str, at: Path) -> float:
    """How long mount(2) takes for an ext4, in seconds."""
    libc = ctypes.CDLL(None, use_errno=True)
    begun = time.monotonic()
    if libc.mount(device.encode(), os.fsencode(at), b"ext4", 0, None) != 0:
        sys.exit(f"mount(2) of {device}: {os.strerror(ctypes.get_errno())}")
    return time.monotonic() - begun


def hydration(bench: Bench, pool: Path, reference: str, name: str) -> float:
    """How long it takes until all of a lazy clone that nobody reads is there, and durable."""
    os.sync()
    begun = time.monotonic()
    bench.call(bench.petra, "--quiet", "clone", "--pool", pool, reference, name)
    bench.call(bench.petra, "--quiet", "volume", "attach", "--pool", pool, name)
    # Not with the program, which would take its share of the processor.
    state = pool / "volumes" / name / "volume.json"
    while not json.loads(state.read_text())["lazy"].get("hydrated"):
        time.sleep(0.01)
    hydrated = time.monotonic() - begun
    bench.call(bench.petra, "--quiet", "volume", "detach", "--pool", pool, name)
    return hydrated


# ------------------------------------------------------------------------------------------------- devices

def device(bench: Bench) -> None:
    # Each against a plain file or loop device in turns: a disk that others share is twice as fast in one minute as in the next.
    jobs = (("reads of 1 MiB", "read", 1), ("writes of 1 MiB", "write", 1),
            ("random reads of 4 KiB", "randread", 0), ("random writes of 4 KiB", "randwrite", 0))
    found: dict[tuple[str, str], list[float]] = {}

    def measure(job: str, rw: str, sequential: int, what: str, target: Path) -> None:
        options = ("--bs=1m", "--iodepth=8") if sequential else ("--bs=4k", "--iodepth=32")
        side = bench.fio(target, "--size=2G", f"--rw={rw}", *options, seconds=3)["read" if "read" in job else "write"]
        found.setdefault((job, what), []).append(side["bw_bytes"] / MIB if sequential else side["iops"])

    with contextlib.ExitStack() as open_things:
        pools = {kind: open_things.enter_context(bench.pool(kind)) for kind in KINDS}
        raw = pools["xfs"] / "raw"
        write_noise(raw, 2 * GIB, 3)
        loop = bench.call("losetup", "--find", "--show", "--direct-io=on", raw)
        open_things.callback(bench.call, "losetup", "-d", loop)
        targets = {"file on XFS": raw, "loop on XFS": Path(loop)}
        for kind, root in pools.items():
            bench.run("volume", "create", "--pool", root, "v", "--size", "2G", "--filesystem", "raw")
            targets[kind] = Path(bench.run("volume", "attach", "--pool", root, "v")["device"])
            open_things.callback(bench.run, "volume", "detach", "--pool", root, "v")
            write_noise(targets[kind], 2 * GIB, 4)
        targets["lazy"] = lazy_device(bench, pools["btrfs"])
        open_things.callback(bench.run, "volume", "detach", "--pool", pools["btrfs"], "lazy")
        for _ in range(5):
            for job, rw, sequential in jobs:
                for what, target in targets.items():
                    measure(job, rw, sequential, what, target)
                for kind, root in pools.items():
                    taken = bench.run("volume", "snapshot", "--pool", root, "v", f"{bench.directory}/repo#e/r", "--later")
                    measure(job, rw, sequential, f"{kind}, right after a snapshot", targets[kind])
                    bench.run("volume", "upload", "--pool", root, "--give-up", taken["upload"])
    for job, _, sequential in jobs:
        base, goal = ("file on XFS", ">= 0.95") if sequential else ("loop on XFS", ">= 0.85")
        plain = found[job, base]
        unit = "MiB/s" if sequential else "IOPS"
        for what in (*KINDS, *(f"{kind}, right after a snapshot" for kind in KINDS), "lazy"):
            ratios = sorted(value / other for value, other in zip(found[job, what], plain))
            name = "a lazy clone whose data is there, through its server," if what == "lazy" else f"a volume on {what},"
            bench.row(f"{job}: {name} against a {base}", f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of "
                      f"{statistics.median(plain):,.0f} {unit}", "" if what == "lazy" else goal)


def lazy_device(bench: Bench, root: Path) -> Path:
    """A lazy clone whose data is all there, and which its server still serves."""
    image, repository = bench.directory / "image", f"{bench.directory}/lazy"
    write_noise(image, 2 * GIB, 5)
    bench.run("init", repository)
    bench.run("snapshot", f"v={image}", f"{repository}#e/r", "--name", "s")
    image.unlink()
    bench.run("clone", "--pool", root, f"{repository}#e/r/s", "lazy")
    attached = bench.run("volume", "attach", "--pool", root, "lazy")
    while any(volume["lazy"] for volume in bench.run("volume", "ls", "--pool", root)["volumes"]):
        time.sleep(0.1)
    return Path(attached["device"])


PARTS = {"pause": pause, "group": group, "latency": latency, "uploads": uploads, "incremental": incremental, "scattered": scattered, "clones": clones, "device": device}


def volumes(options: argparse.Namespace) -> None:
    work = options.directory.resolve() / "volumes-work"
    work.mkdir(parents=True)
    petra = find("petra", options.petra)
    bench = Bench(petra, work)
    document = load_results("volumes")
    parts = options.only.split(",") if options.only else list(PARTS)
    try:
        if set(parts) & {"pause", "group", "latency", "device"}:
            bench.run("init", f"{work}/repo")
        for part in parts:
            bench.rows = []
            PARTS[part](bench)
            document = {"machine": machine(work), "versions": versions([petra_tool(petra, work)]),
                        "parts": {**document.get("parts", {}), part: bench.rows}}
            store_results("volumes", document)
    finally:
        shutil.rmtree(work, ignore_errors=True)
