"""The level `growth`: what a snapshot and a restore cost as things grow. Local repositories, whole images are looked at.

  volume      sparse images of 1 to 64 GiB: with 1 GiB of data whatever the size, and with a sixteenth of it
  change      an image of 2 GiB, all data, of which 0.1 % to 50 % was overwritten since the parent: in places of 4 KiB, the
              worst that applications do, and of 1 MiB
  repository  a volume with 256 MiB of data that changes by 8 MiB between snapshots: the next snapshot and its restore when
              1 to 300 are there, and a snapshot of unchanged data

Images and repositories are in the page cache, since they were just written.

Half of the data are bytes that don't compress, half are hexadecimal digits, in turns of 64 KiB. Points are medians of
three in `repository`, and single runs elsewhere: look at the course of the curve. It needs 12 GB of disk in DIR/work.
"""
from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from pathlib import Path
from typing import Any, Iterator

from .measure import GIB, KIB, MIB, Cost, Scratch, files, load_results, machine, note, scratch, store_results
from .tools import find, versions, petra as petra_tool

Point = dict[str, Any]


class Volumes:
    """Snapshots and restores of one image by Petra, and what they cost."""

    def __init__(self, bench: Scratch, petra: str) -> None:
        self.bench, self.petra = bench, petra
        self.repository, self.image = bench.work / "repository", bench.work / "image"

    def init(self) -> None:
        shutil.rmtree(self.repository, ignore_errors=True)
        self.bench.run(self.petra, "init", self.repository)

    def snapshot(self, name: str, parent: str = "") -> Point:
        words = [self.petra, "--json", "snapshot", f"v={self.image}", f"{self.repository}#e/r", "--name", name]
        cost = self.bench.measure([*words, *(["--parent", parent] if parent else [])], self.bench.work)
        stats = json.loads(self.bench.output)["stats"]
        return {**figures(cost), "requests": stats["puts"], "stored_mib": stats["stored_bytes"] / MIB}

    def restore(self, name: str) -> Point:
        target = self.bench.work / "restored"
        cost = self.bench.measure([self.petra, "--json", "restore", f"{self.repository}#e/r/{name}/v", str(target)], self.bench.work)
        report = json.loads(self.bench.output)["volumes"][0]["report"]
        target.unlink()
        return {**figures(cost), "requests": report["gets"], "fetched_mib": report["fetched_bytes"] / MIB}


def figures(cost: Cost) -> Point:
    return {"wall": cost.wall, "cpu": cost.cpu, "rss": cost.rss}


def data(length: int, seed: int) -> bytes:
    """Half of it compresses to a half. `length` is a multiple of 4 KiB."""
    noise = random.Random(seed)
    pieces = []
    for start in range(0, length, 128 * KIB):
        size = min(128 * KIB, length - start) // 2
        pieces += [noise.randbytes(size), noise.randbytes(size // 2).hex().encode()]
    return b"".join(pieces)


def write_image(path: Path, size: int, length: int) -> None:
    """`length` bytes of data in places of 4 MiB, spread evenly over a sparse file."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
        places = length // (4 * MIB)
        for place in range(places):
            file.seek(place * (size // places))
            file.write(data(4 * MIB, place))


def overwrite(path: Path, length: int, count: int, piece: int, seed: int) -> None:
    """Changes `count` pieces of the first `length` bytes, each somewhere else."""
    choice = random.Random(seed)
    with path.open("r+b") as file:
        for place in choice.sample(range(length // piece), count):
            file.seek(place * piece)
            file.write(data(piece, seed * 1_000_003 + place))


def volume(volumes: Volumes) -> Iterator[Point]:
    for curve in ("1 GiB of data", "a sixteenth is data"):
        for size in (1, 2, 4, 8, 16, 32, 64):
            volumes.init()
            write_image(volumes.image, size * GIB, GIB if curve.startswith("1") else size * GIB // 16)
            taken, restored = volumes.snapshot("s"), volumes.restore("s")
            yield {"curve": curve, "x": size, "snapshot": taken, "restore": restored}


def change(volumes: Volumes) -> Iterator[Point]:
    length = 2 * GIB
    volumes.init()
    write_image(volumes.image, length, length)
    base = volumes.bench.work / "base"
    volumes.image.rename(base)
    shutil.copyfile(base, volumes.image)
    volumes.snapshot("base")
    for piece, curve in ((4 * KIB, "in places of 4 KiB"), (MIB, "in places of 1 MiB")):
        for number, percent in enumerate((0.1, 0.5, 1, 2, 5, 10, 25, 50)):
            shutil.copyfile(base, volumes.image)
            overwrite(volumes.image, length, round(length / piece * percent / 100), piece, number + piece)
            name = f"{piece}-{number}"
            taken, restored = volumes.snapshot(name, "base"), volumes.restore(name)
            yield {"curve": curve, "x": percent, "snapshot": taken, "restore": restored}


def repository(volumes: Volumes) -> Iterator[Point]:
    length = 256 * MIB
    volumes.init()
    write_image(volumes.image, GIB, length)
    # The data lies at the start of 64 parts of the volume.
    taken: list[Point] = []
    for number in range(301):  # so many are there already, and of unchanged data three for each point before
        for piece in range(8):
            overwrite_part(volumes.image, GIB, (number * 8 + piece) % 64, number)
        taken.append(volumes.snapshot(f"s{number}"))
        if number in (1, 3, 10, 30, 100, 300):
            again = [volumes.snapshot(f"same-{number}-{turn}") for turn in range(3)]
            restored = [volumes.restore(f"s{number}") for _ in range(3)]
            stored = sum(path.stat().st_size for path in files(volumes.repository)) / MIB
            yield {"curve": "after so many snapshots", "x": number, "repository_mib": stored, "snapshot": middle(taken[1:][-3:]),
                   "unchanged": middle(again), "restore": middle(restored)}


def overwrite_part(path: Path, size: int, part: int, seed: int) -> None:
    """1 MiB at a place of the part that moves with each turn."""
    with path.open("r+b") as file:
        file.seek(part * (size // 64) + seed // 8 % 4 * MIB)
        file.write(data(MIB, seed * 64 + part))


def middle(points: list[Point]) -> Point:
    return {key: statistics.median(point[key] for point in points) for key in points[0]}


def show(point: Point) -> None:
    taken, restored = point["snapshot"], point["restore"]
    note(f"{point['curve']}: {point['x']}: snapshot {taken['wall']:.2f} s, {taken['rss']:.0f} MiB, {taken['requests']} PUT, "
         f"{taken['stored_mib']:.0f} MiB stored; restore {restored['wall']:.2f} s, {restored['rss']:.0f} MiB, {restored['requests']} GET")


PARTS = {"volume": volume, "change": change, "repository": repository}


def growth(options: argparse.Namespace) -> None:
    document = load_results("growth")
    petra = find("petra", options.petra)
    for part in options.only.split(",") if options.only else PARTS:
        with scratch(options.directory) as bench:
            points: list[Point] = []
            for point in PARTS[part](Volumes(bench, petra)):
                points.append(point)
                show(point)
                document = {"machine": machine(options.directory), "versions": versions([petra_tool(petra, bench.work)]),
                            "parts": {**document.get("parts", {}), part: points}}
                store_results("growth", document)
