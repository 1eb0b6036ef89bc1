#!/usr/bin/env python3
"""Fail when Petra has become slower, by figures that the noise of a machine does not reach.

  gate.py --petra target/release/petra --hot-paths target/release/hot_paths [--update]

  instructions  of each hot path, counted by callgrind (valgrind): at most 3% more than in gate.json
  whole         requests and bytes of a first snapshot, a second one and a restore of generated data, with one thread:
                at most 1% more bytes and not one request more than in gate.json
  peer          wall time against restic on the same data, the median of three turns: at least the factors below

Instruction counts are of one compiler and one C compiler: after a new one, or a change that is meant, --update writes the
new figures, which the change then shows.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
FIGURES = Path(__file__).with_name("gate.json")
INSTRUCTIONS_TOLERANCE = 0.03
BYTES_TOLERANCE = 0.01
# Far below what an idle machine shows, far above what a lost stage of the pipeline would leave.
FACTORS = {"first snapshot": 2.0, "second snapshot": 2.0, "restore": 1.5}

# How the C library copies memory depends on the processor, and so would the counts.
COPIES = ":".join(f"glibc.cpu.x86_{kind}_threshold=1073741824" for kind in ("rep_movsb", "rep_stosb", "non_temporal"))


def call(*words: object, **variables: str) -> str:
    environment = {**os.environ, "RESTIC_PASSWORD": "x", **variables}
    done = subprocess.run([str(word) for word in words], env=environment, text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def instructions(hot_paths: Path, work: Path) -> dict[str, int]:
    counts = {}
    for name in call(hot_paths).split():
        out = work / "callgrind"
        call("valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*measured*",
             f"--callgrind-out-file={out}", hot_paths, name, GLIBC_TUNABLES=COPIES)
        found = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
        if not found or int(found[1]) == 0:
            sys.exit(f"callgrind counted nothing in {name}")
        counts[name] = int(found[1])
    return counts


def make_image(path: Path) -> None:
    """Noise, lines of text, and a hole: 224 MiB of data in 256 MiB."""
    noise = random.Random(1)
    with path.open("wb") as file:
        for _ in range(24):
            file.write(noise.randbytes(4 * MIB))
        file.seek(32 * MIB, os.SEEK_CUR)
        lines = b"".join(b"%d,user-%d,%d.%02d,ok\n" % (n, noise.randrange(4096), noise.randrange(200), n % 97)
                         for n in range(8 * MIB // 22))
        for n in range(16):
            file.write((b"part %d\n" % n + lines)[: 8 * MIB].ljust(8 * MIB, b"."))


def change_image(path: Path) -> None:
    """8 MiB in 64 places."""
    noise = random.Random(2)
    with path.open("r+b") as file:
        for _ in range(64):
            file.seek(noise.randrange(96 * MIB))
            file.write(noise.randbytes(MIB // 8))


def whole(petra: Path, work: Path) -> dict[str, int]:
    image, repository = work / "image", work / "repository"
    make_image(image)
    call(petra, "--quiet", "init", repository)

    def snapshot() -> dict[str, int]:
        return json.loads(call(petra, "--json", "--threads", "1", "snapshot", image, f"{repository}#e/r"))["stats"]

    first = snapshot()
    change_image(image)
    second = snapshot()
    restored = work / "restored"
    report = json.loads(call(petra, "--json", "--threads", "1", "restore", f"{repository}#e/r/@latest", restored))
    if call("cmp", image, restored):
        sys.exit("the restored image differs")
    report = report["volumes"][0]["report"]
    shutil.rmtree(repository)
    restored.unlink()
    image.unlink()
    return {"first snapshot, PUT": first["puts"], "first snapshot, bytes": first["stored_bytes"],
            "second snapshot, PUT": second["puts"], "second snapshot, bytes": second["stored_bytes"],
            "restore, GET": report["gets"], "restore, bytes": report["fetched_bytes"]}


def peer(petra: Path, work: Path) -> dict[str, float]:
    image, samples = work / "image", {stage: ([], []) for stage in FACTORS}
    for _ in range(3):
        make_image(image)
        ours, theirs, restored = work / "petra", work / "restic", work / "restored"
        call(petra, "--quiet", "init", ours)
        call("restic", "-q", "-r", theirs, "init")

        def timed(stage: str, *pair: tuple[object, ...]) -> None:
            for side, words in zip(samples[stage], pair):
                os.sync()
                begun = time.monotonic()
                call(*words)
                side.append(time.monotonic() - begun)

        snapshot = (petra, "--quiet", "snapshot", image, f"{ours}#e/r")
        backup = ("restic", "-q", "--no-cache", "-r", theirs, "backup", image)
        timed("first snapshot", snapshot, backup)
        change_image(image)
        timed("second snapshot", snapshot, backup)
        timed("restore", (petra, "--quiet", "restore", f"{ours}#e/r/@latest", restored),
              ("restic", "-q", "--no-cache", "-r", theirs, "restore", "latest", "--target", work / "tree"))
        for path in (ours, theirs, work / "tree"):
            shutil.rmtree(path)
        restored.unlink()
    return {stage: statistics.median(b / a for a, b in zip(*sides)) for stage, sides in samples.items()}


def check(what: str, measured: dict[str, int], known: dict[str, int], tolerance: dict[str, float]) -> bool:
    fine = measured.keys() == known.keys()
    print(f"{what:28}{'measured':>14}{'known':>14}")
    for name, value in measured.items():
        before = known.get(name)
        change = value / before - 1 if before else float("inf")
        allowed = tolerance.get(name, next(iter(tolerance.values())))
        worse = change > allowed
        fine &= not worse
        print(f"{name:28}{value:14,}{before or 0:14,}{change:+8.1%}{'  TOO MUCH' if worse else '  better: see --update' if change < -allowed else ''}")
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--petra", type=Path, required=True)
    parser.add_argument("--hot-paths", type=Path, required=True)
    parser.add_argument("--update", action="store_true", help="take what is measured as the figures of gate.json")
    options = parser.parse_args()
    petra, hot_paths = options.petra.resolve(), options.hot_paths.resolve()
    with tempfile.TemporaryDirectory(prefix="petra-gate-") as work:
        found: dict[str, Any] = {"instructions": instructions(hot_paths, Path(work)), "whole": whole(petra, Path(work))}
        if options.update:
            FIGURES.write_text(json.dumps(found, indent=2) + "\n")
        known = json.loads(FIGURES.read_text())
        fine = check("instructions", found["instructions"], known["instructions"], {"": INSTRUCTIONS_TOLERANCE})
        exact = {name: BYTES_TOLERANCE if "bytes" in name else 0.0 for name in found["whole"]}
        fine &= check("whole commands", found["whole"], known["whole"], exact)
        for stage, factor in peer(petra, Path(work)).items():
            worse = factor < FACTORS[stage]
            fine &= not worse
            print(f"{stage}: {factor:.2f} times as fast as restic, at least {FACTORS[stage]}{'  TOO SLOW' if worse else ''}")
    if not fine:
        sys.exit("slower than it was: find out why, or say in the change that brings it why that must be")


if __name__ == "__main__":
    main()
