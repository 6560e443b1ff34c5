"""Stands where an engine is for test_process.py: starts a trainer, leaves traces, prints its process and waits."""

from __future__ import annotations

import time

from world import LAYOUT, SHAPE, rows_of

from rl_accel.speculator.client import TrainerClient
from rl_accel.speculator.config import SpeculatorConfig
from rl_accel.speculator.head import first_weights

if __name__ == "__main__":
    client = TrainerClient(SHAPE, LAYOUT, SpeculatorConfig(enable=True, depth=3), first_weights(SHAPE, 0))
    client.start()
    client.ask("serve", version=1)
    client.ring.put(rows_of(60, 24))
    print(client.pid, flush=True)
    time.sleep(60)
