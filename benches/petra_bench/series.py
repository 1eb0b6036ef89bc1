"""The test series: three 8 GiB sparse ext4 images, each a later point in time of one machine-learning workspace.

  s1.img  a Python environment, a large CSV file, incompressible images      2.6 GB allocated
  s2.img  + a filtered copy of the CSV, pickles, 200 random 4 KiB writes     3.1 GB
  s3.img  + two nearly equal checkpoints, one directory of images deleted    3.4 GB

Packages are pinned, everything else comes from fixed seeds. It needs root, e2fsprogs and network access to a Python
package index, a Python from 3.9 to 3.12, for which all the pinned packages have wheels, and about 3 minutes.
"""
from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from .measure import GIB, PROGRAM, allocated, call, enter_mount_namespace, fail, make_ext4, mounted

IMAGE_SIZE = 8 * GIB
STAGES = ("s1", "s2", "s3")

RECIPE = 1  # raise it with every change to what the series holds, so that old series are not reused
MARKER = "series.json"  # written last, so it marks a finished series

# About 1.3 GB installed. Dependencies are not resolved: these pins alone decide what is written.
PACKAGES = """
    numpy==2.0.2 pandas==2.2.3 scipy==1.13.1 scikit-learn==1.5.2 matplotlib==3.9.2 pyarrow==17.0.0
    polars==1.9.0 numba==0.60.0 llvmlite==0.43.0 sympy==1.13.3 h5py==3.12.1 transformers==4.45.2
    tokenizers==0.20.1 opencv-python-headless==4.10.0.84 jupyterlab==4.2.5 notebook==7.2.2
    ipython==8.18.1 pillow==10.4.0 fonttools==4.54.1 joblib==1.4.2 python-dateutil==2.9.0.post0
    pytz==2024.2 six==1.16.0
""".split()

CSV_ROWS = 4_600_000
IMAGES_TOTAL = 760_000_000
CHECKPOINT_VALUES = 37_500_000  # float32: 150 MB


def make_series(directory: Path) -> None:
    if holds_series(directory):
        print(f"{directory} already holds the series")
        return
    if os.geteuid() != 0:
        fail("`series` mounts its images, so it must run as root")
    if not (3, 9) <= sys.version_info[:2] <= (3, 12):
        fail("the pinned packages have wheels for Python 3.9 to 3.12: run `series` with one of these")
    enter_mount_namespace()

    directory.mkdir(parents=True, exist_ok=True)
    image, root = directory / "work.img", directory / "mnt"
    root.mkdir(exist_ok=True)
    make_ext4(image, IMAGE_SIZE, "5e77a000-0000-4000-8000-000000000001")
    for stage in STAGES:
        started = time.monotonic()
        with mounted(image, root):
            if stage == "s1":
                python = make_environment(root)
            call(python, PROGRAM, "fill", stage, root)
        # Unmounted, so the copy is a clean file system. Freed blocks stay allocated, as on a volume
        # that is not trimmed.
        copy = directory / f"{stage}.img"
        call("cp", "--reflink=auto", "--sparse=always", image, copy)
        print(f"{stage}.img: {allocated(copy) / 1e9:.2f} GB allocated, {time.monotonic() - started:.0f} s", flush=True)
    image.unlink()
    root.rmdir()
    os.sync()
    sizes = {stage: allocated(directory / f"{stage}.img") for stage in STAGES}
    (directory / MARKER).write_text(json.dumps({"recipe": RECIPE, "allocated": sizes}) + "\n")


def holds_series(directory: Path) -> bool:
    marker = directory / MARKER
    if not marker.exists():
        return False
    recipe = json.loads(marker.read_text())["recipe"]
    if recipe != RECIPE:
        fail(f"{directory} holds a series of recipe {recipe}, not {RECIPE}: remove it or choose another directory")
    return True


def make_environment(root: Path) -> Path:
    call(sys.executable, "-m", "venv", root / "venv")
    python = root / "venv/bin/python"
    call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--only-binary", ":all:", *PACKAGES)
    return python


# What follows runs in the Python environment of the series, for numpy and pyarrow.

def fill_first(root: Path) -> None:
    (root / "data").mkdir()
    write_csv(root / "data/events.csv")
    rng = random.Random(2)
    written = number = 0
    while written < IMAGES_TOTAL:
        path = root / f"data/images/class-{number % 10}/{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = int(50_000 * 40 ** rng.random())  # 50 KB to 2 MB, small ones more often
        path.write_bytes(rng.randbytes(size))
        written += size
        number += 1


def write_csv(path: Path) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    rng = np.random.default_rng(1)
    syllables = ["ba", "cor", "da", "el", "fi", "gra", "ho", "in", "ka", "lu", "mer", "no", "pra", "ti", "ven", "zo"]
    vocabulary = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(5000)]
    countries = ["US", "IN", "BR", "DE", "FR", "GB", "JP", "IT", "ES", "GR"]

    def pick(words: list[str], indices: Any) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), words).cast(pa.string())

    def word(rows: int) -> Any:
        return pick(vocabulary, np.minimum(rng.zipf(1.3, rows), len(vocabulary)) - 1)

    tables = []
    clock = 1_700_000_000
    for first in range(0, CSV_ROWS, 200_000):
        rows = min(200_000, CSV_ROWS - first)
        times = clock + np.cumsum(rng.integers(0, 9, rows))
        clock = int(times[-1])
        tables.append(pa.table({
            "id": np.arange(first, first + rows),
            "time": pa.array(times, pa.timestamp("s")),
            "user": rng.integers(1, 200_000, rows),
            "country": pick(countries, rng.integers(0, len(countries), rows)),
            "product": word(rows),
            "quantity": rng.integers(1, 20, rows),
            "price": np.round(rng.gamma(2.0, 40.0, rows), 2),
            "latitude": np.round(rng.uniform(-60, 70, rows), 5),
            "longitude": np.round(rng.uniform(-180, 180, rows), 5),
            "score": np.round(rng.random(rows), 4),
            "comment": pc.binary_join_element_wise(*(word(rows) for _ in range(4)), " "),
        }))
    csv.write_csv(pa.concat_tables(tables), path, csv.WriteOptions(quoting_style="none"))


def fill_second(root: Path) -> None:
    import pickle

    import numpy as np
    from pyarrow import csv

    data = root / "data"
    with (data / "events.csv").open("rb") as source, (data / "events-kept.csv").open("wb") as target:
        target.write(source.readline())
        target.writelines(line for line in source if line.split(b",", 4)[3] in (b"US", b"GB", b"GR"))

    names = ["quantity", "price", "latitude", "longitude", "score"]
    options = csv.ConvertOptions(include_columns=["user", *names])
    table = csv.read_csv(data / "events.csv", convert_options=options)
    columns = [table[name].to_numpy().astype(np.float64) for name in names]
    scaled = [(column - column.min()) / (column.max() - column.min()) for column in columns]
    features = np.stack([a * b for a, b in itertools.combinations(scaled, 2)], axis=1)
    users, counts = np.unique(table["user"].to_numpy(), return_counts=True)
    activity = {f"user-{user}": {"events": count} for user, count in zip(users.tolist(), counts.tolist())}
    for name, value in {"features": features, "activity": activity}.items():
        with (data / f"{name}.pkl").open("wb") as file:
            pickle.dump(value, file, protocol=5)

    # Random writes spare the environment, which makes the checkpoints of the next stage.
    files = sorted(path for path in data.rglob("*") if path.suffix in (".csv", ".jpg"))
    blocks = [path.stat().st_size // 4096 for path in files]
    rng = random.Random(3)
    for path in rng.choices(files, blocks, k=200):  # as often as their sizes say
        with path.open("r+b") as file:
            file.seek(4096 * rng.randrange(path.stat().st_size // 4096))
            file.write(rng.randbytes(4096))


def fill_third(root: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(4)
    (root / "checkpoints").mkdir()
    weights = rng.standard_normal(CHECKPOINT_VALUES, dtype=np.float32) * np.float32(0.02)
    np.save(root / "checkpoints/step-1000.npy", weights)
    run = 256  # a step changes whole rows of an embedding: 2% of the values, in runs of 1 KiB
    for start in rng.integers(0, CHECKPOINT_VALUES // run, CHECKPOINT_VALUES // 50 // run) * run:
        weights[start:start + run] += rng.standard_normal(run, dtype=np.float32) * np.float32(0.001)
    np.save(root / "checkpoints/step-2000.npy", weights)
    shutil.rmtree(root / "data/images/class-7")


FILL = {"s1": fill_first, "s2": fill_second, "s3": fill_third}
