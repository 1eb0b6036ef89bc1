#!/usr/bin/env python3
"""Torture a repository with real processes that are killed at any moment.

  torture.py --petra target/release/petra [--store local|s3] [--seconds 300] [--seed N] [--dir DIR]

Four writers change volumes and snapshot them, a deleter deletes snapshots, one loop collects garbage without any
grace, one restores and compares; every few seconds one of the running commands gets SIGKILL. The program keeps a
ledger: what was acknowledged must stay, what was killed may be there or not. In the end every snapshot that is
listed must be in the ledger and come back byte for byte, every one that was acknowledged and not deleted must be
listed, `verify --read-data` must find nothing, and after a last collection the stored bytes must be within 5% of a
fresh repository with the same snapshots.

`--store s3` runs versitygw, a real S3 server over a directory, which must be on the PATH. Exit code 0: nothing
was lost. The seed decides what the volumes hold and who is killed, but not the schedule of the processes.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, Optional

MIB = 1 << 20
WRITERS = 4
VOLUME_BYTES = 192 * MIB  # three segments, mostly holes
EXTENT_BYTES = 96 << 10
KEPT = 8  # snapshots that are not deleted
RETRY = 4  # the exit code for what may succeed when it is tried again


@dataclass
class Snapshot:
    """What is known of one snapshot, by its name."""

    run: str
    name: str
    sha256: str
    acknowledged: bool = False
    deleting: bool = False
    deleted: bool = False


@dataclass
class World:
    """The repository, the ledger and the processes that run."""

    petra: str
    url: str
    environment: dict[str, str]
    directory: Path
    ledger: dict[str, Snapshot] = field(default_factory=dict)
    running: dict[int, tuple[str, subprocess.Popen]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def fail(self, text: str) -> None:
        with self.lock:
            self.failures.append(text)
        print(f"FAILED: {text}", flush=True)

    def run(self, *arguments: str, killable: bool = True) -> Optional[subprocess.CompletedProcess]:
        """Runs one command. None when it was killed."""
        process = subprocess.Popen(
            [self.petra, *arguments], env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if killable:
            with self.lock:
                self.running[process.pid] = (arguments[0], process)
        try:
            out, err = process.communicate()
        finally:
            with self.lock:
                self.running.pop(process.pid, None)
        if process.returncode == -signal.SIGKILL:
            self.count(f"{arguments[0]} killed")
            return None
        self.count(f"{arguments[0]} {'done' if process.returncode == 0 else f'exit {process.returncode}'}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def at(self, snapshot: Snapshot) -> str:
        return f"{self.url}#torture/{snapshot.run}/{snapshot.name}"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_extent(path: Path, random_: random.Random) -> None:
    """Writes noise, a text or zeros somewhere in the volume."""
    length = random_.randrange(1, EXTENT_BYTES)
    kind = random_.random()
    if kind < 0.6:
        data = random_.randbytes(length)
    elif kind < 0.9:
        data = (f"line of {random_.random()}\n" * (length // 20 + 1)).encode()[:length]
    else:
        data = bytes(length)
    # A few places, so that data is overwritten often.
    at = random_.randrange(160) * (VOLUME_BYTES // 160) + random_.randrange(4096)
    with open(path, "r+b") as file:
        file.seek(min(at, VOLUME_BYTES - length))
        file.write(data)


def writer(world: World, number: int, seed: int) -> None:
    random_ = random.Random(f"writer {number} {seed}")
    path = world.directory / f"volume-{number}.img"
    with open(path, "wb") as file:
        file.truncate(VOLUME_BYTES)
    for _ in range(160):
        write_extent(path, random_)
    turn = 0
    while not world.stop.is_set():
        turn += 1
        for _ in range(random_.randrange(1, 40)):
            write_extent(path, random_)
        snapshot = Snapshot(f"run-{number}", f"w{number}-{turn}", sha256(path))
        with world.lock:
            world.ledger[snapshot.name] = snapshot
        done = world.run("snapshot", f"v={path}", f"{world.url}#torture/{snapshot.run}",
                         "--name", snapshot.name, "--quiet", "--json")
        if done is None:
            continue
        # A collection without patience may take a slow writer for dead; it starts again by itself, three times.
        if done.returncode == 0:
            snapshot.acknowledged = True
        elif done.returncode != RETRY:
            world.fail(f"snapshot {snapshot.name}: exit {done.returncode}: {done.stderr.strip()}")


def live(world: World, random_: random.Random) -> Optional[Snapshot]:
    with world.lock:
        known = [s for s in world.ledger.values() if s.acknowledged and not s.deleting]
    return random_.choice(known) if known else None


def deleter(world: World, seed: int) -> None:
    random_ = random.Random(f"deleter {seed}")
    many = 0
    while not world.stop.is_set():
        # The more there are the faster: what is left in the end is all restored, and taken again.
        time.sleep(random_.random() / max(1, many - KEPT))
        with world.lock:
            many = sum(s.acknowledged and not s.deleting for s in world.ledger.values())
        snapshot = live(world, random_) if many > KEPT else None
        if snapshot is None:
            continue
        snapshot.deleting = True
        done = world.run("rm", world.at(snapshot), "--quiet")
        if done is not None and done.returncode == 0:
            snapshot.deleted = True
        elif done is not None:
            world.fail(f"rm {snapshot.name}: exit {done.returncode}: {done.stderr.strip()}")


def collector(world: World, seed: int) -> None:
    random_ = random.Random(f"collector {seed}")
    while not world.stop.is_set():
        time.sleep(random_.random() / 2)
        done = world.run("gc", world.url, "--grace", "0", "--silent", random_.choice(["2s", "10s", "1m"]),
                         "--max-waste", random_.choice(["0", "5", "30"]), "--quiet")
        if done is not None and done.returncode not in (0, RETRY):
            world.fail(f"gc: exit {done.returncode}: {done.stderr.strip()}")


def restorer(world: World, seed: int) -> None:
    random_ = random.Random(f"restorer {seed}")
    target = world.directory / "restored.img"
    while not world.stop.is_set():
        snapshot = live(world, random_)
        if snapshot is None:
            time.sleep(0.1)
            continue
        for stale in world.directory.glob("restored.img*"):
            stale.unlink()
        done = world.run("restore", world.at(snapshot), str(target), "--quiet")
        if done is None or snapshot.deleting:
            continue
        if done.returncode != 0:
            world.fail(f"restore {snapshot.name}: exit {done.returncode}: {done.stderr.strip()}")
        elif sha256(target) != snapshot.sha256:
            world.fail(f"restore {snapshot.name}: other bytes came back")


def killer(world: World, seed: int) -> None:
    random_ = random.Random(f"killer {seed}")
    while not world.stop.wait(random_.uniform(0.2, 3.0)):
        with world.lock:
            victims = sorted(world.running.items())
        if victims:
            pid, _ = random_.choice(victims)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def stored_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("packs/**/*") if path.is_file())


def judge(world: World, bucket: Path, fresh_url: str, fresh: Path) -> None:
    """After everything has stopped: nothing lost, nothing damaged, nothing left over."""
    def must(*arguments: str) -> str:
        done = world.run(*arguments, killable=False)
        if done is None or done.returncode != 0:
            world.fail(f"{' '.join(arguments)}: {done and done.stderr.strip()}")
        return done.stdout if done else ""

    for _ in range(2):
        must("gc", world.url, "--grace", "0", "--silent", "0", "--max-waste", "0", "--quiet")
    must("verify", world.url, "--read-data", "--quiet")
    survivors = []
    for number in range(WRITERS):
        listing = world.run("ls", f"{world.url}#torture/run-{number}", "--json", killable=False)
        if listing is None or listing.returncode != 0:
            continue  # a run without snapshots; what should be there is missed below
        survivors += [entry["name"] for entry in json.loads(listing.stdout)["snapshots"]]
    for snapshot in world.ledger.values():
        there = snapshot.name in survivors
        if snapshot.acknowledged and not snapshot.deleting and not there:
            world.fail(f"{snapshot.name} is lost")
        if snapshot.deleted and there:
            world.fail(f"{snapshot.name} was deleted and is there")
    must("init", fresh_url)
    target = world.directory / "judged.img"
    for name in survivors:
        snapshot = world.ledger.get(name)
        if snapshot is None:
            world.fail(f"{name} was never made")
            continue
        target.unlink(missing_ok=True)
        must("restore", world.at(snapshot), str(target), "--quiet")
        if not target.exists() or sha256(target) != snapshot.sha256:
            world.fail(f"{name} came back with other bytes")
            continue
        must("snapshot", f"v={target}", f"{fresh_url}#torture/{snapshot.run}", "--quiet")
    size, ideal = stored_bytes(bucket), stored_bytes(fresh)
    waste = size / max(ideal, 1) - 1
    print(f"{len(survivors)} snapshots in {size / MIB:.1f} MiB; a fresh repository takes {ideal / MIB:.1f} MiB: "
          f"{waste:+.1%}")
    if waste > 0.05:
        world.fail(f"{waste:.1%} more is stored than in a fresh repository")


@contextlib.contextmanager
def store(kind: str, directory: Path, environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """URLs of two places for repositories, `bucket` and `fresh` below the directory."""
    if kind == "local":
        yield f"file://{directory}/bucket", f"file://{directory}/fresh"
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("bucket", "fresh"):
        (directory / name).mkdir()
    environment |= {"AWS_ACCESS_KEY_ID": "torture", "AWS_SECRET_ACCESS_KEY": "torture-secret", "AWS_REGION": "us-east-1"}
    server = subprocess.Popen(
        ["versitygw", "--access", "torture", "--secret", "torture-secret", "--port", f"127.0.0.1:{port}",
         "--quiet", "posix", str(directory)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield tuple(f"s3://{name}?endpoint=http://127.0.0.1:{port}" for name in ("bucket", "fresh"))
    finally:
        server.kill()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--petra", required=True)
    parser.add_argument("--store", choices=["local", "s3"], default="local")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.store} store, {options.seconds:.0f} s", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="petra-torture-", dir=options.dir))
    environment = dict(os.environ)
    try:
        with store(options.store, directory, environment) as (url, fresh_url):
            world = World(str(Path(options.petra).resolve()), url, environment, directory)
            if world.run("init", url, killable=False).returncode != 0:
                return 2
            actors = [threading.Thread(target=writer, args=(world, n, options.seed)) for n in range(WRITERS)]
            actors += [threading.Thread(target=actor, args=(world, options.seed))
                       for actor in (deleter, collector, restorer, killer)]
            for actor in actors:
                actor.start()
            deadline = time.monotonic() + options.seconds
            while time.monotonic() < deadline and not world.failures and all(a.is_alive() for a in actors):
                time.sleep(0.2)
            if not all(actor.is_alive() for actor in actors):
                world.fail("an actor ended early")
            world.stop.set()
            for actor in actors:
                actor.join()
            judge(world, directory / "bucket", fresh_url, directory / "fresh")
        print(", ".join(f"{what}: {n}" for what, n in sorted(world.counts.items())))
        print("FAILED" if world.failures else "nothing was lost, nothing is damaged")
        return 1 if world.failures else 0
    finally:
        if not options.dir:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
