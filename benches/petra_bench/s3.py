"""The level `s3`: snapshots into a bucket and restores from it, at a distance.

One image of the series (`--image`, s1 by default), versitygw on loopback, and before it a proxy that adds a delay for each
round trip and limits the bits a second each way. For each point: a snapshot into an empty repository and its restore,
compared byte for byte. Petra runs at all points, the peers that speak S3 at one (30 ms, 1 Gbit/s). Everybody restores
without caches, as another machine would. The proxy counts round trips and bytes for all alike.

"Share of the bandwidth" is what went along the way in the direction of the data, divided by what could have gone in that
time. All of proxy, server and tool share the processors, so without a limit to the bits the machine is the limit.
"""
from __future__ import annotations

import argparse
import itertools
import shutil
from typing import Any

from .measure import MIB, Cost, Scratch, load_results, machine, note, scratch, store_results
from .peers import require_series, restore, snapshot
from .server import Way, s3_server, slow_way
from .tools import DRIVERS, SPEAK_S3, Bucket, Tool, installed, versions

DELAYS_MS = (0, 10, 30, 100)
RATES_MBIT = (0, 1000, 200)  # 0: no limit
PEERS_AT = (30, 1000)


def s3(options: argparse.Namespace) -> None:
    require_series(options.directory)
    image = options.directory / f"{options.image}.img"
    if options.at:
        points = [tuple(int(number) for number in point.split("x")) for point in options.at.split(",")]
    else:
        points = list(itertools.product(DELAYS_MS, RATES_MBIT))
    binaries = {name: binary for name, binary in installed(options.tools, options.petra).items() if name in SPEAK_S3}
    with scratch(options.directory) as bench, s3_server(bench.work) as port:
        for delay, rate in points:
            with slow_way(port, delay / 1000, rate * 1e6) as way:
                for name, binary in binaries.items():
                    if name != "petra" and (delay, rate) != PEERS_AT:
                        continue
                    tool = DRIVERS[name](binary, Bucket(f"127.0.0.1:{way.port}", "bucket", f"{name}-{delay}-{rate}"))
                    found = point(bench, tool, way, image, rate)
                    keep(options, tool, {"tool": name, "delay_ms": delay, "mbit_per_s": rate, "image": options.image, **found})
                    empty(bench)


def point(bench: Scratch, tool: Tool, way: Way, image: Any, rate: int) -> dict[str, Any]:
    for command in tool.init:
        bench.measure(command, bench.work)
    way.reset()
    taken = sides(snapshot(bench, tool, image, "s1"), way, rate)
    bench.forget_caches()
    way.reset()
    restored = sides(restore(bench, tool, image, "s1"), way, rate)
    note(f"{tool.name}: " + "; ".join(
        f"{what} {side['wall']:.2f} s, {side['round_trips']} round trips, {max(side['sent_mib'], side['received_mib']):.0f} MiB, "
        f"{side['share'] * 100:.0f} % of the bandwidth" for what, side in (("snapshot", taken), ("restore", restored))))
    return {"snapshot": taken, "restore": restored}


def sides(cost: Cost, way: Way, rate: int) -> dict[str, Any]:
    moved = max(way.sent_bytes, way.received_bytes)
    return {"wall": cost.wall, "cpu": cost.cpu, "rss": cost.rss, "round_trips": way.round_trips,
            "sent_mib": way.sent_bytes / MIB, "received_mib": way.received_bytes / MIB,
            "share": moved * 8 / (rate * 1e6 * cost.wall) if rate else 0}


def empty(bench: Scratch) -> None:
    """What the server and the tool keep."""
    for path in (bench.work / "s3/bucket").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(bench.work / "home")
    (bench.work / "home").mkdir()


def keep(options: argparse.Namespace, tool: Tool, found: dict[str, Any]) -> None:
    """Each point at once: a run in several pieces is whole in the end."""
    document = load_results("s3")
    key = ("tool", "delay_ms", "mbit_per_s", "image")
    others = [point for point in document.get("points", []) if any(point[word] != found[word] for word in key)]
    points = sorted([*others, found], key=lambda point: (point["tool"] != "petra", point["tool"], point["mbit_per_s"], point["delay_ms"]))
    store_results("s3", {
        "machine": machine(options.directory), "versions": {**document.get("versions", {}), **versions([tool])},
        "commands": {**document.get("commands", {}), tool.name: tool.commands("s1")}, "points": points})
