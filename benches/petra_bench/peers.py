"""The level `peers`: Petra against other tools on the life of one machine-learning workspace.

It snapshots the three images of the series in order into a fresh local repository of each tool, then restores the third
and compares it byte for byte. It reports wall and CPU seconds, the time until everything written was on the disk, peak
RSS and stored bytes, as medians over the rounds, and how far Petra is ahead of the best peer. Within a round the tools
take turns at each stage, and each round starts with another tool, so that noise of the machine hits all alike. Before a
command is timed its input is read into the page cache and all dirty pages are written back.

Ratios are those within one round: a tool against Petra beside it, the median over the rounds in which the tool took
part. So rounds with a few tools each (`--tools petra,borg`, then `--append --tools petra,kopia`) add up to one report.

It needs some 4 GB of disk for each tool in DIR/work, and 16 GB of memory to keep an image, a repository and what is
restored in the page cache. A virtual machine that hands free memory back to its host makes fresh pages dear for the tool
that needs them first: take three rounds there at least.

The level `memory` shows whether peak RSS grows with the address space: it snapshots and restores s1.img, and a 64 GiB
volume that holds the same data spread out over eight places.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from .measure import (MIB, Cost, Scratch, allocated, call, fail, files, load_results, machine, note, read_all, scratch,
                      store_results)
from .series import STAGES, holds_series
from .tools import DRIVERS, Tool, installed, versions


def snapshot(bench: Scratch, tool: Tool, image: Path, stage: str) -> Cost:
    # One name for all stages, so that tools find the parent. A hard link, not a symbolic one, since tools store the
    # latter as such.
    current = bench.work / "current/workspace.img"
    current.unlink(missing_ok=True)
    os.link(image, current)
    read_all(current)
    cost = bench.measure(tool.snapshot(stage), current.parent)
    if isinstance(tool.place, Path):
        cost.stored = sum(path.stat().st_size for path in files(tool.place)) / MIB
    if tool.name == "petra":
        cost.requests = json.loads(bench.output)["stats"]["puts"]
    return cost


def restore(bench: Scratch, tool: Tool, image: Path, stage: str) -> Cost:
    target = bench.work / "restored"
    target.mkdir()
    if isinstance(tool.place, Path):
        for path in files(tool.place):
            read_all(path)
    cost = bench.measure(tool.restore(stage), target)
    if tool.name == "petra":
        cost.requests = json.loads(bench.output)["volumes"][0]["report"]["gets"]
    call("cmp", image, target / "workspace.img")
    shutil.rmtree(target)
    return cost


def make_tools(bench: Scratch, binaries: dict[str, str]) -> list[Tool]:
    return [DRIVERS[name](binary, bench.work / f"{name}-repository") for name, binary in binaries.items()]


Round = dict[str, dict[str, Cost]]  # tool -> "s1", "s2", "s3" or "restore" -> cost


def run_round(bench: Scratch, tools: list[Tool], directory: Path, shift: int) -> Round:
    bench.reset()
    order = tools[shift % len(tools):] + tools[:shift % len(tools)]
    costs: Round = {tool.name: {} for tool in tools}
    for tool in order:
        for command in tool.init:
            bench.measure(command, bench.work)
    for stage in STAGES:
        for tool in order:
            costs[tool.name][stage] = snapshot(bench, tool, directory / f"{stage}.img", stage)
            progress(tool, f"snapshot {stage}", costs[tool.name][stage])
    for tool in order:
        costs[tool.name]["restore"] = restore(bench, tool, directory / "s3.img", "s3")
        progress(tool, "restore s3", costs[tool.name]["restore"])
    return costs


def progress(tool: Tool, step: str, cost: Cost) -> None:
    note(f"{tool.name:8} {step:12} {cost.wall:7.2f} s, durable {cost.durable:7.2f} s {cost.cpu:7.2f} s CPU "
         f"{cost.rss:6.0f} MiB RSS {cost.stored:6.0f} MiB stored")


def peers(options: argparse.Namespace) -> None:
    directory = options.directory
    require_series(directory)
    before = load_results("peers") if options.append else {}
    rounds: list[Any] = before.get("rounds", [])
    with scratch(directory) as bench:
        tools = make_tools(bench, installed(options.tools, options.petra))
        for number in range(options.rounds):
            note(f"round {number + 1} of {options.rounds}")
            rounds.append(run_round(bench, tools, directory, len(rounds)))
            store_results("peers", {
                "machine": machine(directory),
                "allocated_bytes": {stage: allocated(directory / f"{stage}.img") for stage in STAGES},
                "versions": {**before.get("versions", {}), **versions(tools)},
                "commands": {**before.get("commands", {}), **{tool.name: tool.commands("s3") for tool in tools}},
                "rounds": rounds})


def require_series(directory: Path) -> None:
    if not holds_series(directory):
        fail(f"{directory} holds no finished series: make it with `benches/run series {directory}`")


def memory(options: argparse.Namespace) -> None:
    require_series(options.directory)
    rows = []
    with scratch(options.directory) as bench:
        small, large = options.directory / "s1.img", bench.work / "large.img"
        for image, size in ((small, 8), (large, 64)):
            bench.reset()
            if image == large:
                spread_out(small, large, 8)
            [tool] = make_tools(bench, installed("petra", options.petra))
            bench.measure(tool.init[0], bench.work)
            taken, restored = snapshot(bench, tool, image, "s1"), restore(bench, tool, image, "s1")
            rows.append({"volume_gib": size, "allocated_bytes": allocated(image), "snapshot": taken, "restore": restored})
            note(f"{size} GiB: RSS {taken.rss:.0f} and {restored.rss:.0f} MiB, {taken.wall:.1f} and {restored.wall:.1f} s")
        store_results("memory", {"machine": machine(options.directory), "versions": versions([tool]), "rows": rows})


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
