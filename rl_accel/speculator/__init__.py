"""A draft model that learns from rollouts while they run, and is swapped without stopping the engine.

`head.py`: the model; `served.py`: as an engine runs it; `traces.py`, `weights.py`: shared memory between engine and
trainer; `replay.py`, `learner.py`, `gate.py`, `pace.py`, `process.py`: the trainer, a process of its own; `watch.py`,
`ledger.py`: the engine's eye on both. Guide: docs/speculator.md.
"""
