"""The report: tables between markers of docs/benchmarks.md and docs/format.md, and plots, from the results of the levels.

What is between `<!-- NAME: written by benches/report -->` and `<!-- end -->` is written here, everything else by hand. A
part whose level has no results is left as it is.
"""
from __future__ import annotations

import re
import statistics
from typing import Any, Callable

from . import plot
from .measure import BENCHES, fail, load_results

DOCS = BENCHES.parent / "docs"
Table = list[list[str]]
Point = dict[str, Any]


def write() -> None:
    pages = {name: (DOCS / name).read_text() for name in ("benchmarks.md", "format.md")}
    for level, (page, render) in PARTS.items():
        if results := load_results(level):
            pages[page] = fill(pages[page], page, level, render(results))
    for name, text in pages.items():
        (DOCS / name).write_text(text)


def fill(text: str, page: str, name: str, content: str) -> str:
    marker = re.compile(rf"(<!-- {name}: written by benches/report -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marker.search(text):
        fail(f"docs/{page} has no place for {name}")
    return marker.sub(lambda match: f"{match[1]}\n{content.strip()}\n\n{match[2]}", text)


def picture(name: str, alt: str, svg: str) -> str:
    (DOCS / "plots").mkdir(exist_ok=True)
    (DOCS / f"plots/{name}.svg").write_text(svg)
    return f"![{alt}](plots/{name}.svg)\n"


def as_markdown(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def where(results: dict[str, Any]) -> str:
    """The machine and the programs."""
    found = results["machine"]
    warning = " **The machine had other work: requests and bytes are true, times are not.**"
    busy = found["load_before"] > found["cores"] / 2
    processor = ", ".join(filter(None, (found["processor"], found.get("vectors"))))
    return (f"{found['cores']} cores ({processor}), {found['memory_gib']} GiB of memory, Linux {found['kernel']}, "
            f"{found['file_system']}, load {found['load_before']:.1f} before. {'; '.join(results['versions'].values())}."
            f"{warning if busy else ''}")


def commands(results: dict[str, Any]) -> str:
    lines = [line for tool in results["commands"].values() for line in tool]
    return "\n".join(["<details><summary>Commands</summary>\n", "```text", *lines, "```\n", "</details>\n"])


# ---------------------------------------------------------------------------------------- peers

STEPS = (("s1", "first snapshot", 5), ("s2", "second snapshot", 8), ("s3", "third snapshot", 8), ("restore", "restore of the third", 4))


def peers(results: dict[str, Any]) -> str:
    rounds = results["rounds"]
    tools = list(dict.fromkeys(tool for costs in rounds for tool in costs))
    sizes = " / ".join(f"{size / 1e9:.2f}" for size in results["allocated_bytes"].values())
    counts = sorted({sum(tool in costs for costs in rounds) for tool in tools if tool != "petra"} or {len(rounds)})
    text = (f"Three 8 GiB images, {sizes} GB allocated; {where(results)} Warm page cache, "
            f"local repository; medians of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} round(s) a peer, and "
            f"{sum('petra' in costs for costs in rounds)} of petra.")
    parts = [text + "\n", picture("peers", "Snapshots, restore and stored bytes of each tool", peers_plot(rounds, tools)),
             as_markdown(peers_table(rounds, tools))]
    if "petra" in tools and len(tools) > 1:
        parts.append(as_markdown(goals_table(rounds, tools)))
    if "petra" in tools:
        puts = " / ".join(f"{middle(rounds, 'petra', step, 'requests'):.0f}" for step, _, _ in STEPS[:3])
        parts.append(f"Petra's requests: {puts} PUT, {middle(rounds, 'petra', 'restore', 'requests'):.0f} GET. They are the same for any store.\n")
    return "\n".join([*parts, commands(results)])


def value(costs: dict[str, Any], step: str, what: str) -> float:
    cost: dict[str, float] = costs[step]
    return cost["user"] + cost["system"] if what == "cpu" else cost[what]


def middle(rounds: list[Any], tool: str, step: str, what: str) -> float:
    return statistics.median(value(costs[tool], step, what) for costs in rounds if tool in costs)


def ratio(rounds: list[Any], tool: str, step: str, what: str) -> float:
    """The tool's figure for one of Petra's, side by side."""
    return statistics.median(value(costs[tool], step, what) / value(costs["petra"], step, what)
                             for costs in rounds if tool in costs and "petra" in costs)


def peers_table(rounds: list[Any], tools: list[str]) -> Table:
    table = [["tool", "snapshots, s", "durable, s", "CPU, s", "stored after each, MiB", "restore, s", "durable, s", "CPU, s",
              "peak RSS snapshot, MiB", "restore, MiB"]]
    for tool in tools:
        def each(what: str, form: str, tool: str = tool) -> str:
            return " / ".join(format(middle(rounds, tool, step, what), form) for step, _, _ in STEPS[:3])

        table.append([tool, each("wall", ".2f"), each("durable", ".2f"), each("cpu", ".1f"), each("stored", ".0f"),
                      *(format(middle(rounds, tool, "restore", what), form) for what, form in (("wall", ".2f"), ("durable", ".2f"), ("cpu", ".1f"))),
                      f"{max(middle(rounds, tool, step, 'rss') for step, _, _ in STEPS[:3]):.0f}",
                      f"{middle(rounds, tool, 'restore', 'rss'):.0f}"])
    return table


def goals_table(rounds: list[Any], tools: list[str]) -> Table:
    """Petra against the best peer in each discipline."""
    table = [["", "petra", "best peer", "ratio", "ratio until durable", "goal", "met"]]
    others = [tool for tool in tools if tool != "petra" and any(tool in costs and "petra" in costs for costs in rounds)]

    def best(step: str, what: str) -> tuple[str, float]:
        return min(((tool, ratio(rounds, tool, step, what)) for tool in others), key=lambda pair: pair[1])

    for step, label, goal in STEPS:
        peer, faster = best(step, "wall")
        table.append([label, f"{middle(rounds, 'petra', step, 'wall'):.2f} s", f"{peer} {middle(rounds, peer, step, 'wall'):.2f} s",
                      f"{faster:.2f}x faster", f"{best(step, 'durable')[1]:.2f}x", f">= {goal}x faster", yes_no(faster >= goal)])
    peer, less = best("s1", "cpu")
    table.append(["CPU time of the first", f"{middle(rounds, 'petra', 's1', 'cpu'):.1f} s", f"{peer} {middle(rounds, peer, 's1', 'cpu'):.1f} s",
                  f"{1 / less:.2f}", "", "<= 0.5", yes_no(1 / less <= 0.5)])
    peer, less = best("s3", "stored")
    table.append(["stored after the third", f"{middle(rounds, 'petra', 's3', 'stored'):.0f} MiB",
                  f"{peer} {middle(rounds, peer, 's3', 'stored'):.0f} MiB", f"{1 / less:.3f}", "", "<= 0.80", yes_no(1 / less <= 0.8)])
    for label, steps in (("peak RSS, snapshots", STEPS[:3]), ("peak RSS, restore", STEPS[3:])):
        rss = max(cost["petra"][step]["rss"] for cost in rounds if "petra" in cost for step, _, _ in steps)
        table.append([label, f"{rss:.0f} MiB", "", "", "", "<= 256 MiB", yes_no(rss <= 256)])
    return table


def yes_no(met: bool) -> str:
    return "yes" if met else "NO"


def peers_plot(rounds: list[Any], tools: list[str]) -> str:
    def bars(title: str, unit: str, step: str, what: str) -> plot.Bars:
        return plot.Bars(title, unit, {tool: middle(rounds, tool, step, what) for tool in tools})

    return plot.bars(
        "Petra and other tools on three states of one 8 GiB volume", "Shorter is better. In brackets: how many times Petra's.",
        [bars("First snapshot", "seconds", "s1", "wall"), bars("Third snapshot, whole image read", "seconds", "s3", "wall"),
         bars("Restore of the third", "seconds", "restore", "wall"), bars("Stored after the third", "MiB", "s3", "stored"),
         bars("Processor time of the first snapshot", "seconds", "s1", "cpu"), bars("Peak memory of the first snapshot", "MiB", "s1", "rss")])


def memory(results: dict[str, Any]) -> str:
    table = [["volume", "allocated, GB", "snapshot RSS, MiB", "restore RSS, MiB", "snapshot, s", "restore, s"]]
    for row in results["rows"]:
        taken, restored = row["snapshot"], row["restore"]
        table.append([f"{row['volume_gib']} GiB", f"{row['allocated_bytes'] / 1e9:.2f}", f"{taken['rss']:.0f}", f"{restored['rss']:.0f}",
                      f"{taken['wall']:.2f}", f"{restored['wall']:.2f}"])
    return as_markdown(table)


def hardware(results: dict[str, Any]) -> str:
    rounds, size = results["rounds"], results["bytes"]
    table = [["", "s", "MB/s", "CPU, s"]]
    for what, label in (("bare", "read, cut, hash, write in a bare loop"), ("petra", "first snapshot")):
        wall, cpu = (middle(rounds, what, "s1", figure) for figure in ("wall", "cpu"))
        table.append([label, f"{wall:.2f}", f"{size / wall / 1e6:.0f}", f"{cpu:.2f}"])
    shares = sorted(ratio([costs], "bare", "s1", "wall") for costs in rounds)
    return (f"{size >> 30} GiB of incompressible unique data; {where(results)} Medians of {len(rounds)} rounds.\n\n{as_markdown(table)}\n"
            f"Share: {statistics.median(shares):.2f} (rounds: {shares[0]:.2f} to {shares[-1]:.2f}; goal: at least 0.8).\n")


# ---------------------------------------------------------------------------------------- growth

GROWTH = {
    "volume": ("As the volume grows", "size of the volume, GiB", "size, GiB"),
    "change": ("As more of 2 GiB changes", "changed since the parent, %", "changed, %"),
    "repository": ("As the repository fills", "snapshots in the repository", "snapshots"),
}


def growth(results: dict[str, Any]) -> str:
    parts = [where(results) + "\n"]
    for part, (title, x_label, x_head) in GROWTH.items():
        if points := results["parts"].get(part):
            parts += [f"### {title}\n", picture(f"growth-{part}", title, growth_plot(points, title, x_label)),
                      "<details><summary>Figures</summary>\n", as_markdown(growth_table(points, x_head)), "</details>\n"]
    return "\n".join(parts)


def growth_plot(points: list[Point], title: str, x_label: str) -> str:
    unchanged = any("unchanged" in point for point in points)
    several = len({point["curve"] for point in points}) > 1

    def curves(steps: dict[str, str], what: str) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for step, label in steps.items():
            for point in points:
                if step in point and what in point[step]:
                    found.setdefault(f"{label}, {point['curve']}" if several else label, []).append((point["x"], point[step][what]))
        return found

    both = {"snapshot": "snapshot", "restore": "restore", **({"unchanged": "snapshot of unchanged data"} if unchanged else {})}
    panels = [plot.Lines(label, unit, curves(both, what), x_label) for label, unit, what in
              (("Time", "seconds", "wall"), ("Peak memory", "MiB", "rss"), ("Requests", "PUT and GET", "requests"))]
    panels.append(plot.Lines("Stored by the snapshot", "MiB", curves({"snapshot": "snapshot"}, "stored_mib"), x_label))
    return plot.lines(title, "One image in a local repository; the whole image is looked at.", panels)


def growth_table(points: list[Point], x_head: str) -> Table:
    table = [["curve", x_head, "snapshot, s", "RSS, MiB", "PUT", "stored, MiB", "restore, s", "RSS, MiB", "GET"]]
    for point in points:
        taken, restored = point["snapshot"], point["restore"]
        table.append([point["curve"], f"{point['x']:g}", f"{taken['wall']:.2f}", f"{taken['rss']:.0f}", f"{taken['requests']}",
                      f"{taken['stored_mib']:.1f}", f"{restored['wall']:.2f}", f"{restored['rss']:.0f}", f"{restored['requests']:.0f}"])
        if "unchanged" in point:
            same = point["unchanged"]
            table.append(["the same, nothing changed", f"{point['x']:g}", f"{same['wall']:.2f}", f"{same['rss']:.0f}", f"{same['requests']}",
                          f"{same['stored_mib']:.1f}", "", "", ""])
    return table


# ---------------------------------------------------------------------------------------- S3

def s3(results: dict[str, Any]) -> str:
    points = results["points"]
    ours = [point for point in points if point["tool"] == "petra"]
    parts = [where(results) + "\n", picture("s3", "Snapshot and restore by latency and bandwidth", s3_plot(ours))]
    parts.append(as_markdown(s3_table(ours, False)))
    if (at := [point for point in points if any(other["tool"] != "petra" and same_place(point, other) for other in points)]):
        parts += [picture("s3-peers", "Tools on one way to a bucket", s3_peers_plot(at)), as_markdown(s3_table(at, True))]
    return "\n".join([*parts, commands(results)])


def same_place(one: Point, other: Point) -> bool:
    return all(one[key] == other[key] for key in ("delay_ms", "mbit_per_s", "image"))


def rate_name(mbit: int) -> str:
    return "no limit" if not mbit else f"{mbit / 1000:g} Gbit/s" if mbit >= 1000 else f"{mbit} Mbit/s"


def s3_table(points: list[Point], tools: bool) -> Table:
    table = [["tool", "round trip", "bandwidth", "snapshot, s", "round trips", "sent, MiB", "of the bandwidth",
              "restore, s", "round trips", "received, MiB", "of the bandwidth"]]
    for point in points:
        taken, restored = point["snapshot"], point["restore"]
        share = [f"{side['share'] * 100:.0f} %" if point["mbit_per_s"] else "" for side in (taken, restored)]
        table.append([point["tool"], f"{point['delay_ms']} ms", rate_name(point["mbit_per_s"]),
                      f"{taken['wall']:.2f}", str(taken["round_trips"]), f"{taken['sent_mib']:.0f}", share[0],
                      f"{restored['wall']:.2f}", str(restored["round_trips"]), f"{restored['received_mib']:.0f}", share[1]])
    return table if tools else [row[1:] for row in table]


def s3_plot(points: list[Point]) -> str:
    def curves(side: str) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            found.setdefault(rate_name(point["mbit_per_s"]), []).append((point["delay_ms"], point[side]["wall"]))
        return found

    panels = [plot.Lines(title, "seconds", curves(side), "round trip, ms", logarithmic=False)
              for side, title in (("snapshot", "First snapshot of the image"), ("restore", "Restore"))]
    return plot.lines("A bucket at a distance", "Flat lines are good: then latency doesn't matter, and the bandwidth is used.", panels)


def s3_peers_plot(points: list[Point]) -> str:
    place = f"{points[0]['delay_ms']} ms, {rate_name(points[0]['mbit_per_s'])}"

    def bars(title: str, unit: str, side: str, what: str) -> plot.Bars:
        return plot.Bars(title, unit, {point["tool"]: point[side][what] for point in points})

    return plot.bars(f"Tools on one way to a bucket: {place}", "Shorter is better. In brackets: how many times Petra's.",
                     [bars("First snapshot", "seconds", "snapshot", "wall"), bars("Restore", "seconds", "restore", "wall"),
                      bars("Snapshot", "round trips", "snapshot", "round_trips"), bars("Restore", "round trips", "restore", "round_trips")])


# ---------------------------------------------------------------------------------------- settings, volumes

def settings(results: dict[str, Any]) -> str:
    parts = []
    for name, series in results["series"].items():
        sizes = " / ".join(f"{size / 1e9:.2f}" for size in series["allocated_bytes"])
        table = [[f"{name}: {sizes} GB", "stored, MiB", "snapshots, s", "PUT", "restore of the third, s", "GET", "fetched, MiB",
                  "peak RSS, MiB"]]
        for chunking, found in series["settings"].items():
            row = [chunking, f"{found['stored_mib']:,.0f}", " / ".join(f"{wall:.2f}" for wall in found["walls"]), str(found["puts"]),
                   f"{found['restore_wall']:.2f}", str(found["gets"]), f"{found['fetched_mib']:,.0f}",
                   f"{max(found['rss'], found['restore_rss']):.0f}"]
            table.append([f"**{cell}**" for cell in row] if chunking == "cdc-16k" else row)
        parts.append(as_markdown(table))
    plotted = picture("settings", "Stored bytes by chunking", settings_plot(results["series"]))
    return "\n".join([where(results) + "\n", plotted, *parts])


def settings_plot(series: dict[str, Any]) -> str:
    panels = [plot.Bars(f"Series {name}", "MiB", {chunking: found["stored_mib"] for chunking, found in one["settings"].items()}, "cdc-16k")
              for name, one in series.items()]
    return plot.bars("Stored after three snapshots, by chunking", "Shorter is better. In brackets: times the default, cdc-16k.", panels)


def volumes(results: dict[str, Any]) -> str:
    table = [["what", "measured", "goal"], *(row for rows in results["parts"].values() for row in rows)]
    return f"{where(results)}\n\n{as_markdown(table)}"


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "peers": ("benchmarks.md", peers), "hardware": ("benchmarks.md", hardware),
    "memory": ("benchmarks.md", memory), "growth": ("benchmarks.md", growth),
    "s3": ("benchmarks.md", s3), "volumes": ("benchmarks.md", volumes), "settings": ("format.md", settings)}
