"""Lookahead decoding as a feature."""

from rl_accel.feature import Feature, Metric
from rl_accel.lookahead.config import LookaheadConfig

COUNTED = (
    ("texts", "texts", "generations"),
    ("drafted_texts", "texts", "of these, written with drafts"),
    ("failed_texts", "texts", "of these, whose steps failed; written without drafts"),
    ("drafts_lost", "texts", "of these, whose draft server failed; they went on without it"),
    ("steps", "steps", "of texts with drafts"),
    ("steps_from_draft", "steps", "of these, that a draft agreed with"),
    ("target_steps", "steps", "that the policy began to write for them, cancelled ones included"),
    ("draft_steps", "steps", "that the draft model began to write"),
    ("late_drafts", "steps", "drafts that were not there when the policy's step was"),
)
"""Of rollouts and of validation: name, unit, meaning."""

FEATURE = Feature(
    name="lookahead",
    title="lookahead",
    config=LookaheadConfig,
    lossy=lambda settings: settings.enabled and not settings.lossless,
    implies=lambda settings: {"draft": {"method": "das"}} if settings.enabled and settings.hint else {},
    metrics=tuple(
        Metric(f"{phase}/{name}", unit, "sum", f"{meaning}, in {phase}")
        for phase in ("training", "validation")
        for name, unit, meaning in COUNTED
    )
    + tuple(
        Metric(f"{phase}/agreement", "1", "mean", f"steps that a draft agreed with / steps, in {phase}")
        for phase in ("training", "validation")
    )
    + (
        Metric("gain/*", "1", "mean", "measured speed-up by drafts at about so many texts of a worker at a time"),
        Metric("verifier_calls", "calls", "sum", "of a verifier that asks a server"),
        Metric("verifier_s", "s", "sum", "that these took"),
        Metric("verifier_failures", "calls", "sum", "since the start: without a verdict; the policy's step stood"),
    ),
    free=("depth", "width", "adaptive", "draft_args", "draft_gpus"),
    driver="rl_accel.lookahead.hosts.driver:LookaheadDriver",
    agent_loop="rl_accel.lookahead.hosts.agent_loop:LookaheadAgentLoop",
    trainer="rl_accel.lookahead.hosts.trainer:LookaheadTrainer",
    probe="rl_accel.lookahead.hosts.probe:LookaheadProbe",
)
