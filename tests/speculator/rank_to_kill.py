"""A training rank with a ring: writes rows, and more on a signal.

Arguments: run, first request, number of requests, rows of each.
"""

from __future__ import annotations

import signal
import sys

from world import LAYOUT, rows_of

from rl_accel.speculator.tap_rings import make_ring


def main() -> None:
    run, first, count, length = sys.argv[1], *map(int, sys.argv[2:])
    ring = make_ring(LAYOUT, run)
    ring.put(rows_of(count, length, first=first, policy=3))
    print("written", flush=True)
    sys.stdin.readline()
    ring.put(rows_of(1, length, first=1000 if first < 10 else 1001, policy=3))
    print("more", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
