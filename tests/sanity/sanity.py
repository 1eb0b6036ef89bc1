#!/usr/bin/env python3
"""Run the conformance suite of the Container Storage Interface against petra-csi, on a real XFS pool.

  sanity.py --petra target/release/petra --petra-csi target/release/petra-csi [--store local|s3] [--access mount|block]

It needs root, xfsprogs, csi-sanity and, for --store s3, versitygw. It fails if a spec fails, if one is skipped that is not
of an alpha capability, and if anything is left: a volume, a mount, a loop device, a process.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator

# Words of specs for what the specification marks alpha.
MAY_BE_SKIPPED: tuple[str, ...] = ()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def s3_server(work: Path, environment: dict[str, str]) -> Iterator[str]:
    port = free_port()
    (work / "s3/bucket").mkdir(parents=True)
    environment |= {"AWS_ACCESS_KEY_ID": "sanity", "AWS_SECRET_ACCESS_KEY": "sanity-secret", "AWS_REGION": "us-east-1"}
    server = subprocess.Popen(["versitygw", "--access", "sanity", "--secret", "sanity-secret", "--port", f"127.0.0.1:{port}",
                               "--quiet", "posix", str(work / "s3")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("the S3 server", lambda: can_connect(("127.0.0.1", port)))
        yield f"s3://bucket/p?endpoint=http://127.0.0.1:{port}&path-style=true"
    finally:
        server.kill()
        server.wait()


def can_connect(address: Any, family: int = socket.AF_INET) -> bool:
    with socket.socket(family) as probe, contextlib.suppress(OSError):
        probe.connect(address)
        return True
    return False


def wait_for(what: str, is_there: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > end:
            sys.exit(f"{what} does not come")
        time.sleep(0.05)


def left(pool: Path) -> list[str]:
    """What should not be there any more."""
    found = [f"volume {entry.name}" for entry in (pool / "volumes").iterdir()]
    found += [f"upload {entry.name}" for entry in (pool / "uploads").glob("*.json")] if (pool / "uploads").exists() else []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if f"{pool}/" in (text := backing.read_text()):
                found.append(f"loop device of {text.strip()}")
    # The pool's own mount is not left, but what is below it is.
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return found + [f"mount {at}" for at in mounts if at.startswith(str(pool.parent)) and at != str(pool)]


def run(options: argparse.Namespace, work: Path) -> bool:
    petra, driver = options.petra.resolve(), options.petra_csi.resolve()
    environment = dict(os.environ)
    pool, endpoint = work / "pool", work / "csi.sock"
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(s3_server(work, environment)) if options.store == "s3" else f"file://{work}/repository"

        def call(*words: object) -> None:
            subprocess.run([str(word) for word in words], env=environment, check=True, stdout=subprocess.DEVNULL)

        call(petra, "--quiet", "init", url)
        call(petra, "--quiet", "pool", "init", work / "pool.img", "--size", "20G", "--at", pool, "--filesystem", "xfs",
             "--overcommit", "2000")
        stack.callback(lambda: subprocess.run(["umount", str(pool)], check=False))
        log = stack.enter_context((work / "log").open("w"))
        server = subprocess.Popen([str(driver), "--role=all", "--max-volumes=4", f"--endpoint=unix://{endpoint}", f"--pool={pool}", "--node-name=sanity",
                                   f"--repository=main={url}", f"--petra={petra}"], env=environment, stdout=log, stderr=log)
        try:
            wait_for("the driver", lambda: can_connect(str(endpoint), socket.AF_UNIX))
            report = work / "report.json"
            (work / "mutable").write_text("experiment: other\n")
            suite = subprocess.run(
                ["csi-sanity", f"--csi.endpoint={endpoint}", f"--csi.testvolumeaccesstype={options.access}",
                 "--csi.testnodevolumeattachlimit", "--csi.testvolumemutableparameters="f"{work}/mutable",
                 f"--csi.mountdir={work}/mount", f"--csi.stagingdir={work}/staging", f"--ginkgo.json-report={report}",
                 "--ginkgo.seed=1", *options.more],
                env=environment, check=False)
            passed = judge(report) and suite.returncode == 0
            # What was deleted goes in the background.
            end = time.monotonic() + 10
            while (remains := left(pool)) and time.monotonic() < end:
                time.sleep(0.2)
        finally:
            server.terminate()
            code = server.wait()
            subprocess.run(["pkill", "-f", f"pool agent --until-idle --pool {pool}"], check=False)
        for what in remains:
            print(f"left: {what}")
        if code != 0:
            print(f"the driver ended with {code}")
        passed = passed and not remains and code == 0
    if not passed:
        print("the driver's log ends with:\n" + "".join((work / "log").open().readlines()[-60:]))
    return passed


def judge(report: Path) -> bool:
    specs = [spec for suite in json.loads(report.read_text()) for spec in suite["SpecReports"] if spec["LeafNodeType"] == "It"]
    name = lambda spec: " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])  # noqa: E731
    states: dict[str, list[str]] = {}
    for spec in specs:
        states.setdefault(spec["State"], []).append(f"{name(spec)}: {spec.get('Failure', {}).get('Message', '')}"
                                                    if spec["State"] == "skipped" else name(spec))
    wrong = [text for text in states.get("skipped", []) if not any(word.lower() in text.lower() for word in MAY_BE_SKIPPED)]
    for state, texts in sorted(states.items()):
        print(f"{state}: {len(texts)}")
    for text in states.get("skipped", []):
        print(f"skipped{' though it should not be' if text in wrong else ''}: {text}")
    # The suite itself calls one of its specs pending.
    return not wrong and set(states) <= {"passed", "skipped", "pending"} and bool(states.get("passed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--petra", type=Path, required=True)
    parser.add_argument("--petra-csi", type=Path, required=True)
    parser.add_argument("--store", choices=("local", "s3"), default="local")
    parser.add_argument("--access", choices=("mount", "block"), default="mount")
    parser.add_argument("more", nargs="*", help="more options of csi-sanity")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="petra-sanity-"))
    try:
        passed = run(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
