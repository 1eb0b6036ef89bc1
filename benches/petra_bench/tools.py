"""How to drive Petra and its peers: a fresh repository, a snapshot of one image file, a restore of it.

Each tool runs with its own defaults, but for compression: who has none by default gets the fastest zstd.
"""
from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Union

from .measure import fail, output_of


@dataclass(frozen=True)
class Bucket:
    """A prefix in a bucket of an S3 server without TLS."""
    endpoint: str  # host:port
    bucket: str
    prefix: str


Place = Union[Path, Bucket]  # where a repository is


@dataclass(frozen=True)
class Tool:
    """Snapshots run in a directory that holds `workspace.img`, restores in an empty one where they must make
    `workspace.img`. They are called by the name of a stage; what is restored is the last stage."""
    name: str
    version: list[str]
    init: list[list[str]]
    snapshot: Callable[[str], list[str]]
    restore: Callable[[str], list[str]]
    place: Place
    words: dict[str, str] = field(default_factory=dict)  # for the report: what stands for a path or address

    def commands(self, stage: str) -> list[str]:
        """As the report shows them."""
        shown = []
        for command in (*self.init, self.snapshot(stage), self.restore(stage)):
            line = " ".join(os.path.basename(word) if os.path.isabs(word) and os.path.isfile(word) else word for word in command)
            for text, name in self.words.items():
                line = line.replace(text, name)
            shown.append(line)
        return shown


def words(place: Place) -> dict[str, str]:
    if isinstance(place, Bucket):
        return {place.endpoint: "HOST", place.prefix: "PREFIX"}
    return {place.as_uri(): "file://REPOSITORY", str(place): "REPOSITORY", str(place.parent / "current"): "SOURCE"}


def petra(binary: str, place: Place) -> Tool:
    url = (f"s3://{place.bucket}/{place.prefix}?endpoint=http://{place.endpoint}&path-style=true"
           if isinstance(place, Bucket) else place.as_uri())
    return Tool(
        "petra", [binary, "--version"], [[binary, "init", url]],
        lambda stage: [binary, "--json", "snapshot", "workspace=workspace.img", f"{url}#bench/run-1", "--name", stage],
        lambda stage: [binary, "--json", "restore", f"{url}#bench/run-1/{stage}/workspace", "workspace.img"],
        place, words(place))


def restic(binary: str, place: Place) -> Tool:
    repository = (f"s3:http://{place.endpoint}/{place.bucket}/{place.prefix}" if isinstance(place, Bucket) else str(place))
    command = [binary, "--repo", repository]
    # Restic before 0.15 knows no --sparse and writes out the zeros.
    usage = subprocess.run([binary, "restore", "--help"], capture_output=True, text=True, check=True).stdout
    sparse = ["--sparse"] if "--sparse" in usage else []
    return Tool(
        "restic", [binary, "version"], [[*command, "init"]],
        lambda stage: [*command, "backup", "--tag", stage, "workspace.img"],
        lambda stage: [*command, "restore", "latest", "--tag", stage, "--target", ".", *sparse],
        place, words(place))


def borg(binary: str, place: Place) -> Tool:
    return Tool(
        "borg", [binary, "--version"], [[binary, "init", "--encryption", "none", str(place)]],
        # No `create --sparse`: it works with borg's chunker of fixed size only.
        lambda stage: [binary, "create", "--compression", "zstd,1", f"{place}::{stage}", "workspace.img"],
        lambda stage: [binary, "extract", "--sparse", f"{place}::{stage}"],
        place, words(place))


def casync(binary: str, place: Place) -> Tool:
    store = f"--store={place}/store.castr"
    return Tool(
        "casync", [binary, "--version"], [["mkdir", str(place)]],
        lambda stage: [binary, "make", store, f"{place}/{stage}.caibx", "workspace.img"],
        lambda stage: [binary, "extract", store, f"{place}/{stage}.caibx", "workspace.img"],
        place, words(place))


def kopia(binary: str, place: Place) -> Tool:
    if isinstance(place, Bucket):
        at = ["s3", "--endpoint", place.endpoint, "--bucket", place.bucket, "--prefix", f"{place.prefix}/", "--disable-tls"]
    else:
        at = ["filesystem", "--path", str(place)]
    return Tool(
        "kopia", [binary, "--version"],
        [[binary, "repository", "create", *at],
         [binary, "policy", "set", "--global", "--compression", "zstd-fastest"]],
        lambda stage: [binary, "snapshot", "create", "--no-progress", "--tags", f"stage:{stage}", "."],
        lambda stage: [binary, "restore", "--no-progress", "--write-sparse-files", "../current", "."],
        place, words(place))


def rustic(binary: str, place: Place) -> Tool:
    if isinstance(place, Bucket):
        options = {"ENDPOINT": f"http://{place.endpoint}", "BUCKET": place.bucket, "ROOT": f"/{place.prefix}", "REGION": "us-east-1"}
        command = ["env", *(f"OPENDAL_{name}={value}" for name, value in options.items()), binary, "-r", "opendal:s3"]
    else:
        command = [binary, "-r", str(place)]
    return Tool(
        "rustic", [binary, "--version"], [[*command, "init"]],
        lambda stage: [*command, "backup", "--tag", stage, "workspace.img"],
        lambda stage: [*command, "restore", "latest", "."],
        place, words(place))


DRIVERS: dict[str, Callable[[str, Place], Tool]] = {
    "petra": petra, "restic": restic, "borg": borg, "casync": casync, "kopia": kopia, "rustic": rustic}
SPEAK_S3 = ("petra", "restic", "kopia", "rustic")


def find(name: str, petra_binary: str) -> str:
    """The absolute path of a tool's program; empty if it is not installed."""
    if name not in DRIVERS:
        fail(f"unknown tool {name!r}: choose from {', '.join(DRIVERS)}")
    return os.path.abspath(found) if (found := shutil.which(petra_binary if name == "petra" else name)) else ""


def installed(names: str, petra_binary: str) -> dict[str, str]:
    """Programs by the names of tools, which is a list with commas, or `all` that are installed."""
    binaries = {name: find(name, petra_binary) for name in (DRIVERS if names == "all" else names.split(","))}
    for name, binary in binaries.items():
        if not binary and (names != "all" or name == "petra"):
            fail(f"{petra_binary if name == 'petra' else name} is not installed or not executable")
    return {name: binary for name, binary in binaries.items() if binary}


def versions(tools: list[Tool]) -> dict[str, str]:
    found = {}
    for tool in tools:
        line = output_of(tool.version).splitlines()[0].split(" build:")[0]
        found[tool.name] = line if tool.name in line else f"{tool.name} {line}"
    return found
