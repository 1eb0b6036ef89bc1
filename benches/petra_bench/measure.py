"""What all levels share: running a command and what it costs, scratch directories, images, result files."""
from __future__ import annotations

import contextlib
import fcntl
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
from typing import Any, Iterator, NoReturn

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

BENCHES = Path(__file__).resolve().parent.parent
PROGRAM = BENCHES / "run"
RESULTS = BENCHES / "results"
LOAD = os.getloadavg()[0]  # before anything began: tells a reader whether the machine had other work


# ---------------------------------------------------------------------------------------- commands

@dataclass
class Cost:
    wall: float  # seconds until the command returned
    durable: float  # seconds until all that it wrote was on the disk
    user: float  # CPU seconds
    system: float
    rss: float  # MiB, at its peak
    stored: float = 0  # MiB in the repository afterwards
    requests: float = 0  # of Petra: PUT of a snapshot, GET of a restore

    @property
    def cpu(self) -> float:
        return self.user + self.system


@dataclass
class Scratch:
    """A directory for one benchmark's repositories and images, and the commands measured in it."""
    work: Path
    environment: dict[str, str] = field(init=False)
    output: str = field(init=False, default="")  # standard output of the last command

    def __post_init__(self) -> None:
        # Caches and settings of the user must neither help a tool nor be changed.
        home = self.work / "home"
        self.environment = {
            **os.environ, "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"), "XDG_CONFIG_HOME": str(home / "config"),
            "RESTIC_PASSWORD": "x", "RESTIC_CACHE_DIR": str(home / "cache/restic"), "BORG_BASE_DIR": str(home / "borg"),
            "RUSTIC_PASSWORD": "x", "RUSTIC_NO_PROGRESS": "true",
            "KOPIA_PASSWORD": "x", "KOPIA_CONFIG_PATH": str(home / "kopia/config"), "KOPIA_LOG_DIR": str(home / "kopia/logs"),
            "KOPIA_CACHE_DIRECTORY": str(home / "cache/kopia"), "KOPIA_CHECK_FOR_UPDATES": "false",
            "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret", "AWS_REGION": "us-east-1"}

    def reset(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "home").mkdir(parents=True)
        (self.work / "current").mkdir()

    def forget_caches(self) -> None:
        """As on a machine that sees the repository for the first time."""
        shutil.rmtree(self.work / "home/cache", ignore_errors=True)

    def measure(self, command: list[str], directory: Path) -> Cost:
        os.sync()  # the write-back of what ran before must not slow this command down
        out, log = self.work / "out", self.work / "log"
        with out.open("wb") as output, log.open("wb") as errors:
            started = time.monotonic()
            process = subprocess.Popen(command, cwd=directory, env=self.environment,
                                       stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
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
        self.output = out.read_text(errors="replace")
        if process.returncode != 0:
            said = (self.output + log.read_text(errors="replace")).strip()
            fail(f"exit code {process.returncode} of: {' '.join(command)}\n{said}")
        # Linux counts our own peak before exec as the child's, so this program must stay small.
        return Cost(wall, durable, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / 1024)

    def run(self, *command: object) -> Any:
        """A command that is not measured; its document, if it prints one."""
        self.measure([str(word) for word in command], self.work)
        return json.loads(self.output) if self.output.startswith("{") else None


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Scratch]:
    """`work` in a directory, for one benchmark at a time; deleted in the end."""
    directory.mkdir(parents=True, exist_ok=True)
    scratch = Scratch(directory.resolve() / "work")
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another benchmark is running in {directory}")
        scratch.reset()
        try:
            yield scratch
        finally:
            with uninterrupted():
                shutil.rmtree(scratch.work, ignore_errors=True)
    finally:
        os.close(lock)


def median_cost(costs: list[Cost]) -> Cost:
    samples = [asdict(cost) for cost in costs]
    return Cost(**{key: statistics.median(sample[key] for sample in samples) for key in samples[0]})


def note(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """For cleaning up: an impatient second Ctrl-C must not keep us from it."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def call(*command: object, **options: Any) -> None:
    subprocess.run([str(word) for word in command], check=True, **options)


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def fail(message: str) -> NoReturn:
    sys.exit(f"benches/run: {message}")


# ---------------------------------------------------------------------------------------- files and images

def read_all(path: Path) -> None:
    """Bring a file into the page cache, holes and all: otherwise the first tool alone would pay for
    the zero pages of the holes."""
    buffer = bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def enter_mount_namespace() -> None:
    """Run on in a mount namespace of our own: even if we are killed, the kernel then drops the mount
    and with it the loop device."""
    guard = "BENCH_MOUNT_NAMESPACE"
    if guard not in os.environ:
        os.environ[guard] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])


def make_ext4(image: Path, length: int, uuid: str) -> None:
    """An empty file system that is the same at every run."""
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(length)
    call("mkfs.ext4", "-q", "-F", "-m", "0", "-U", uuid, "-E", f"hash_seed={uuid},lazy_itable_init=0", image)


@contextlib.contextmanager
def mounted(image: Path, root: Path) -> Iterator[None]:
    call("mount", "-o", "loop,noatime", image, root)
    try:
        yield
    finally:
        with uninterrupted():
            call("umount", root)  # this also frees the loop device


def write_noise(path: Path, length: int, seed: int, at: int = 0) -> None:
    """Bytes that don't compress."""
    noise = random.Random(seed)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.seek(at)
        for start in range(0, length, 4 * MIB):
            file.write(noise.randbytes(min(4 * MIB, length - start)))


# ---------------------------------------------------------------------------------------- results

VECTORS = (("avx512vbmi", "AVX-512 VBMI"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))


def machine(directory: Path) -> dict[str, Any]:
    """What a reader must know of the machine to judge the times. Bytes and requests don't depend on it."""
    cpu = Path("/proc/cpuinfo").read_text()
    names = [line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name")]
    flags = next((line.split() for line in cpu.splitlines() if line.startswith("flags")), [])
    # What the searches for cuts and the hashes can use decides a good part of all times.
    vectors = next((name for flag, name in VECTORS if flag in flags), "")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * KIB
    return {"processor": names[0] if names else platform.machine(), "vectors": vectors, "cores": os.cpu_count(),
            "memory_gib": round(memory / GIB), "kernel": platform.release().partition("-")[0], "load_before": LOAD,
            "file_system": output_of(["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(directory)]).split()[-1]}


def load_results(level: str) -> dict[str, Any]:
    path = RESULTS / f"{level}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def store_results(level: str, document: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(rounded(document), indent=1, default=asdict) + "\n"
    (RESULTS / f"{level}.json").write_text(text)


def rounded(value: Any) -> Any:
    """More digits than are true would only make the files long."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return rounded(asdict(value)) if isinstance(value, Cost) else value
