"""Compares two result files of one device: python -m fmkernels bench --compare OLD.json NEW.json

Machines differ from day to day. A time is therefore taken relative to a copy measured in the same run: the case's own,
else the one in the pause after it, else, in older files, as it is. What changed by less than the two spreads together
is no change. Ratios to a peer need no such care: both sides met the same machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fmkernels import _info

from . import peers, solvers
from .measure import family, short

SCHEMA = 1  # of the result files; raised where a row's meaning changes
MEASURES = (  # what a time is relative to, by which field, and whether that is a time or a speed
    ("its copy", "copy_s", 1),
    ("its best copy", "copy_gb_per_s", -1),
    ("a copy after it", "pause_s", 1),
)
PEERS = (*peers.FAMILIES, *solvers.FAMILIES)


@dataclass(frozen=True)
class Change:
    """A case in both files; ``ratio`` is the new time over the old, each relative to its copy."""

    key: tuple[str, str, str]  # op, size, dtype
    ratio: float
    spread: float  # of both runs together, relative
    measure: str  # what times are relative to
    peers: dict[str, tuple[float, float]]  # how many times as long each takes, then and now

    @property
    def verdict(self) -> str:
        if self.ratio > 1 + self.spread:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.spread) else ""


def load(path: Path) -> dict:
    """A result file; ends with a message where it is none."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        sys.exit(f"fmkernels: {path}: {error.strerror}")
    except ValueError as error:
        sys.exit(f"fmkernels: {path}: expected JSON that bench --json wrote, got {error}")
    if not isinstance(found, dict) or not isinstance(found.get("results"), list) or "device" not in found:
        sys.exit(f'fmkernels: {path}: expected JSON that bench --json wrote, with "device" and "results"')
    if found.get("schema", 1) != SCHEMA:
        sys.exit(f"fmkernels: {path}: expected schema {SCHEMA}, got {found['schema']}: measure again with this version")
    return found


def together(old: dict, new: dict) -> tuple[list[Change], list[str], list[str]]:
    """What is in both, and the names of what is in one alone or failed there."""
    then, now = ({(row["op"], row["size"], row["dtype"]): row for row in run["results"]} for run in (old, new))
    changes = [change(key, then[key], now[key]) for key in now if key in then and good(then[key]) and good(now[key])]
    compared = {one.key for one in changes}
    return changes, *(["-".join(key) for key in rows if key not in compared] for rows in (then, now))


def good(row: dict) -> bool:
    return "error" not in row and "median_s" in row


def change(key: tuple[str, str, str], then: dict, now: dict) -> Change:
    measure, scale = "–", 1.0
    for name, field, power in MEASURES:
        if field in then and field in now:
            measure, scale = name, (then[field] / now[field]) ** power
            break
    both = [name for name in now["peers"] if name in then["peers"] and family(name) in PEERS]
    ratios = {name: (then["peers"][name]["ratio"], now["peers"][name]["ratio"]) for name in both}
    spread = sum(row["iqr_s"] / row["median_s"] for row in (then, now))
    return Change(key, now["median_s"] / then["median_s"] * scale, spread, measure, ratios)


def differences(old: dict, new: dict) -> Iterator[str]:
    """What else differs between the runs."""
    for name in dict.fromkeys((*old.get("versions", {}), *new.get("versions", {}))):
        pair = [run.get("versions", {}).get(name) for run in (old, new)]
        if pair[0] != pair[1]:
            yield f"{name} {pair[0] or 'missing'} → {pair[1] or 'missing'}"
    for when, run in (("old", old), ("new", new)):
        yield from (f"the {when} run was noisy: {text}" for text in run.get("machine", {}).get("warnings", []))


def show(old: dict, new: dict, changes: list[Change]) -> None:
    """The table, slowest first, with the peers that both runs met."""
    found = {family(name) for one in changes for name in one.peers}
    families = [name for name in PEERS if name in found]
    table = []
    for one in sorted(changes, key=lambda one: -one.ratio):
        best: dict[str, tuple[float, float]] = {}
        for name, pair in one.peers.items():
            best[family(name)] = min(best.get(family(name), pair), pair, key=lambda both: both[1])
        cells = [f"{best[name][0]:.2f}x → {best[name][1]:.2f}x" if name in best else "–" for name in families]
        op, size, dtype = one.key
        table.append(
            [op, size, short(dtype), one.verdict, f"{one.ratio:.2f}", f"{one.spread:.0%}", one.measure, *cells]
        )
    print(f"{old['device']}; {old.get('commit') or 'no commit'} → {new.get('commit') or 'no commit'}")
    header = ("op", "size", "dtype", "", "time", "spread", "relative to", *families)
    _info.print_table("New time over old; and how many times as long each peer takes, old → new", header, table, left=4)


def compare(old_path: Path, new_path: Path, fail_on_regression: float | None = None) -> int:
    """Print what changed. Status 1 where something is slower, beyond the spread, by more percent than is given."""
    old, new = load(old_path), load(new_path)
    if old["device"] != new["device"]:
        sys.exit(f"fmkernels: --compare: expected results of one device, got {old['device']!r} and {new['device']!r}")
    changes, gone, added = together(old, new)
    if not changes:
        sys.exit(f"fmkernels: --compare: {old_path} and {new_path} have no case in common")
    show(old, new, changes)
    for text in differences(old, new):
        print(f"note: {text}")
    for what, names in (("old", gone), ("new", added)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            print(f"only in the {what} file, or failed: {', '.join(names[:4])}{more}")
    slower = [one for one in changes if one.verdict == "slower"]
    worst = [one for one in slower if one.ratio > 1 + (fail_on_regression or 0) / 100]
    print(f"{len(changes)} cases compared, {len(slower)} slower beyond the spread, "
          f"{sum(one.verdict == 'faster' for one in changes)} faster")  # fmt: skip
    if fail_on_regression is not None:
        print(f"{len(worst)} slower by more than {fail_on_regression:g} %")
        return int(bool(worst))
    return 0
