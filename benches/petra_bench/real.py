"""Series of real data, each of three 4 GiB sparse ext4 images, which are points in time of one volume:

  python-1..3       a Python environment, then a second and a third beside it with other versions of the same packages
  checkpoints-1..3  a training run that keeps its checkpoints: float32 weights and the two moments of Adam, 300 MB each; of
                    the weights 30 % are frozen, all others change in their low bits. Synthetic, from fixed seeds
  postgres-1..3     the data directory of a PostgreSQL server that was stopped: after `pgbench -i`, after 5,000 and after
                    50,000 transactions more

It needs root, e2fsprogs, network access to a Python package index, a Python from 3.9 to 3.12, and PostgreSQL with pgbench.

The level `settings` snapshots these series with every chunking that `petra init` offers, and reports what it costs. The
length of frames and the search of zstd are constants of the program: to compare them, build one with others, and
run `settings --petra BINARY --chunking cdc-16k --label "frames of 512 KiB"`; its rows join those that are there.
"""
from __future__ import annotations

import argparse
import glob
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

from .measure import (GIB, MIB, PROGRAM, Scratch, allocated, call, enter_mount_namespace, fail, files, load_results, machine,
                      make_ext4, mounted, note, read_all, scratch, store_results)
from .tools import find, petra as petra_tool, versions

IMAGE_SIZE = 4 * GIB
STAGES = (1, 2, 3)

# Side by side, as in one notebook server: some packages are the same in two environments, some newer.
ENVIRONMENTS = {
    1: "numpy==1.26.4 pandas==2.1.4 scipy==1.11.4 scikit-learn==1.3.2 matplotlib==3.8.2 pyarrow==14.0.2 pillow==10.1.0 sympy==1.12",
    2: "numpy==1.26.4 pandas==2.2.3 scipy==1.13.1 scikit-learn==1.5.2 matplotlib==3.9.2 pyarrow==17.0.0 pillow==10.4.0 sympy==1.12",
    3: "numpy==2.0.2 pandas==2.2.3 scipy==1.13.1 scikit-learn==1.5.2 matplotlib==3.9.2 pyarrow==17.0.0 pillow==10.4.0 sympy==1.13.3",
}
VALUES = 25_000_000  # float32: 100 MB for the weights, and as much for each moment
TENSOR = 500_000  # values that are stored, and frozen, together


def make_series(directory: Path) -> None:
    if os.geteuid() != 0:
        fail("`real` mounts its images, so it must run as root")
    if not (3, 9) <= sys.version_info[:2] <= (3, 12):
        fail("the pinned packages have wheels for Python 3.9 to 3.12: run `real` with one of these")
    enter_mount_namespace()
    directory.mkdir(parents=True, exist_ok=True)
    for name, fill in FILL.items():
        if all((directory / f"{name}-{stage}.img").exists() for stage in STAGES):
            print(f"{directory} already holds the series {name}")
            continue
        image, root = directory / "work.img", directory / "mnt"
        root.mkdir(exist_ok=True)
        make_ext4(image, IMAGE_SIZE, "5e77a000-0000-4000-8000-000000000002")
        for stage in STAGES:
            started = time.monotonic()
            with mounted(image, root):
                fill(root, stage)
            copy = directory / f"{name}-{stage}.img"
            call("cp", "--reflink=auto", "--sparse=always", image, copy)
            print(f"{copy.name}: {allocated(copy) / 1e9:.2f} GB allocated, {time.monotonic() - started:.0f} s", flush=True)
        image.unlink()
        root.rmdir()


def fill_python(root: Path, stage: int) -> None:
    install(root / f"environment-{stage}", ENVIRONMENTS[stage])


def install(environment: Path, packages: str) -> Path:
    call(sys.executable, "-m", "venv", environment)
    python = environment / "bin/python"
    call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--only-binary", ":all:", *packages.split())
    return python


def fill_checkpoints(root: Path, stage: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        python = install(Path(directory) / "environment", "numpy==2.0.2")
        call(python, PROGRAM, "fill-checkpoints", str(stage), root)


def write_checkpoint(stage: int, root: Path) -> None:
    """In the Python of an environment with numpy. Adam with gradients of noise; 200 steps between two checkpoints are
    done as four large ones."""
    import numpy as np

    rng = np.random.default_rng(stage)
    if stage == 1:
        weights = np.random.default_rng(0).standard_normal(VALUES, dtype=np.float32) * np.float32(0.02)
        first, second = np.zeros(VALUES, np.float32), np.full(VALUES, 1e-8, np.float32)
    else:
        state = np.load(root / f"step-{(stage - 1) * 200}.npz")
        weights, first, second = (state[name] for name in ("weights", "first", "second"))
    for _ in range(4):
        gradient = rng.standard_normal(VALUES, dtype=np.float32) * np.float32(1e-4)
        first = np.float32(0.9) * first + np.float32(0.1) * gradient
        second = np.float32(0.999) * second + np.float32(0.001) * gradient * gradient
        change = np.float32(1e-5) * first / (np.sqrt(second) + np.float32(1e-8))
        for start in range(0, VALUES, TENSOR):
            if start // TENSOR % 10 >= 3:  # the others are frozen
                weights[start:start + TENSOR] -= change[start:start + TENSOR]
    for start in range(0, VALUES, TENSOR):
        if start // TENSOR % 10 < 3:
            first[start:start + TENSOR] = second[start:start + TENSOR] = 0
    np.savez(root / f"step-{stage * 200}.npz", weights=weights, first=first, second=second)


def fill_postgres(root: Path, stage: int) -> None:
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not found:
        fail("PostgreSQL is not installed in /usr/lib/postgresql")
    programs, data = Path(found[-1]), root / "data"

    def run(program: str, *words: object) -> None:
        call("runuser", "-u", "postgres", "--", programs / program, *words, cwd="/", stdout=sys.stderr)

    # A short path, since a socket's may have 107 bytes.
    with tempfile.TemporaryDirectory(dir="/tmp") as sockets:
        shutil.chown(sockets, "postgres")
        if stage == 1:
            data.mkdir()
            shutil.chown(data, "postgres")
            run("initdb", "--pgdata", data, "--no-sync", "--auth=trust")
            (data / "postgresql.auto.conf").write_text("max_wal_size = 256MB\nshared_buffers = 256MB\nlisten_addresses = ''\n")
        run("pg_ctl", "--pgdata", data, "--wait", "--silent", "-o", f"-k {sockets}", "-l", data / "log", "start")
        try:
            if stage == 1:
                run("pgbench", "-h", sockets, "--initialize", "--quiet", "--scale", 50, "postgres")
            else:
                transactions = {2: 1_250, 3: 12_500}[stage]
                run("pgbench", "-h", sockets, "--client", 4, "--transactions", transactions, f"--random-seed={stage}", "postgres")
        finally:
            run("pg_ctl", "--pgdata", data, "--wait", "--silent", "--mode", "fast", "stop")


FILL: dict[str, Callable[[Path, int], None]] = {
    "python": fill_python, "checkpoints": fill_checkpoints, "postgres": fill_postgres}


# ---------------------------------------------------------------------------------------- the level `settings`

CHUNKINGS = ("cdc-8k", "cdc-16k", "cdc-32k", "cdc-64k", "fixed-4k", "fixed-8k", "fixed-16k", "fixed-64k")


def settings(options: argparse.Namespace) -> None:
    petra = find("petra", options.petra)
    for name in options.only.split(",") if options.only else FILL:
        images = [options.directory / f"{name}-{stage}.img" for stage in STAGES]
        if not all(image.exists() for image in images):
            fail(f"{options.directory} holds no series {name}: make it with `benches/run real {options.directory}`")
        document = load_results("settings")
        found = document.get("series", {}).get(name, {}).get("settings", {})
        with scratch(options.directory) as bench:
            for chunking in options.chunking.split(",") if options.chunking else CHUNKINGS:
                setting = f"{chunking}, {options.label}" if options.label else chunking
                found[setting] = measure_setting(bench, petra, chunking, images)
                note(f"{name}, {setting}: {found[setting]}")
            tool = petra_tool(petra, bench.work)
            store_results("settings", {
                "machine": machine(options.directory), "versions": versions([tool]),
                "series": {**document.get("series", {}), name: {
                    "allocated_bytes": [allocated(image) for image in images], "settings": found}}})


def measure_setting(bench: Scratch, petra: str, chunking: str, images: list[Path]) -> dict[str, Any]:
    bench.reset()
    repository, target = bench.work / "repository", bench.work / "restored"
    bench.run(petra, "init", "--chunking", chunking, repository)
    walls, rss, puts = [], 0.0, 0
    for number, image in enumerate(images):
        read_all(image)
        cost = bench.measure([petra, "--json", "snapshot", f"v={image}", f"{repository}#e/r", "--name", f"s{number}"], bench.work)
        walls.append(cost.wall)
        rss = max(rss, cost.rss)
        puts += json.loads(bench.output)["stats"]["puts"]
    stored = sum(path.stat().st_size for path in files(repository)) / MIB
    cost = bench.measure([petra, "--json", "restore", f"{repository}#e/r/s{len(images) - 1}/v", str(target)], bench.work)
    report = json.loads(bench.output)["volumes"][0]["report"]
    return {"walls": walls, "rss": rss, "puts": puts, "stored_mib": stored, "restore_wall": cost.wall,
            "restore_rss": cost.rss, "gets": report["gets"], "fetched_mib": report["fetched_bytes"] / MIB}
