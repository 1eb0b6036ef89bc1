"""The level `hardware`: how much of the machine a snapshot gets out of what it must do.

The first snapshot of a volume of 4 GiB, all of it unique and incompressible, into a local repository, against a loop
that reads the same file, cuts it, hashes the chunks and writes them in files of 32 MiB, and does nothing else
(benches/src/bin/bare_loop.rs). Both with as many threads as there are processors, in turns, from the page cache. It needs
9 GB of disk in DIR/work, and 8 GB of memory.
"""
from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from .measure import GIB, fail, machine, note, read_all, scratch, store_results, write_noise
from .peers import Round
from .tools import find, versions, petra as petra_tool

SIZE = 4 * GIB


def hardware(options: argparse.Namespace) -> None:
    petra = find("petra", options.petra)
    bare = str(Path(petra).parent / "bare_loop")
    if not os.path.isfile(bare):
        fail(f"{bare} is missing: `cargo build --release -p petra-benches --bins` makes it")
    rounds: list[Round] = []
    with scratch(options.directory) as bench:
        image, repository, written = (bench.work / name for name in ("image", "repository", "written"))
        write_noise(image, SIZE, 1)
        for number in range(options.rounds):
            costs: Round = {}
            for what in ("bare", "petra") if number % 2 == 0 else ("petra", "bare"):
                read_all(image)
                if what == "bare":
                    written.mkdir()
                    costs[what] = {"s1": bench.measure([bare, str(image), str(written), str(os.cpu_count())], bench.work)}
                    shutil.rmtree(written)
                else:
                    bench.run(petra, "init", repository)
                    costs[what] = {"s1": bench.measure([petra, "--json", "snapshot", f"v={image}", f"{repository}#e/r"], bench.work)}
                    shutil.rmtree(repository)
            rounds.append(costs)
            loop, taken = costs["bare"]["s1"], costs["petra"]["s1"]
            note(f"bare {loop.wall:.2f} s, {loop.cpu:.2f} s CPU; petra {taken.wall:.2f} s, {taken.cpu:.2f} s CPU: "
                 f"{loop.wall / taken.wall:.2f}")
        store_results("hardware", {"machine": machine(options.directory), "versions": versions([petra_tool(petra, bench.work)]),
                                   "bytes": SIZE, "rounds": rounds})
