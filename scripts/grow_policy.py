"""Write the quickstart policy with more layers that change nothing.

python scripts/grow_policy.py FOLDER [--layers 24]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rl_accel.quickstart.deep import LAYERS, POLICY, grow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--source", type=Path, default=POLICY)
    args = parser.parse_args()
    grow(args.source, args.folder, args.layers)
    print(args.folder)


if __name__ == "__main__":
    main()
