"""The online speculator as a feature."""

from rl_accel.feature import Feature, Metric
from rl_accel.speculator.config import SpeculatorConfig

METHODS = {"recurrent": "auto", "eagle3": "head"}
"""Head -> how drafting asks it where nothing else is set."""

FEATURE = Feature(
    name="speculator",
    title="online speculator",
    config=SpeculatorConfig,
    samples=True,
    implies=lambda settings: {"draft": {"method": METHODS[settings.head]}} if settings.enabled else {},
    metrics=(
        Metric("version", "1", "max", "of the head that is served; a swap adds one"),
        Metric("swaps", "1", "sum", "versions that engines took over"),
        Metric("swap_ms", "ms", "max", "of a swap, mean"),
        Metric("weights_refused", "1", "sum", "since the start: versions that an engine did not take"),
        Metric(
            "rolled_back",
            "1",
            "sum",
            "since the start: versions that did worse than the one before and were taken back",
        ),
        Metric("alarms", "1", "sum", "since the start: versions whose drafts were hardly ever accepted"),
        Metric("heads_off", "engines", "sum", "since the start: engines whose head failed; they draft without it"),
        Metric("candidates_refused", "1", "sum", "since the start: candidates that the gate did not let through"),
        Metric("propose_ms", "ms", "max", "in the head, mean over steps in which it was asked"),
        Metric("num_asked", "steps", "max", "engine steps in which it was asked"),
        Metric("tap_ms", "ms", "max", "leaving traces, mean over engine steps"),
        Metric("traced_share", "1", "mean", "share of engine steps that leave traces"),
        Metric("rows_traced", "tokens", "sum", "that engines left traces of"),
        Metric(
            "rows_lost", "tokens", "sum", "since the start: traces that were overwritten before the trainer saw them"
        ),
        Metric("rows_from_trainer", "tokens", "sum", "traces of the trainer's pass of old log-probs that arrived"),
        Metric("trainer_tap_rows", "tokens", "mean", "traces that a training rank left in that pass"),
        Metric("trainer_tap_share", "1", "mean", "of the seconds of that pass, that leaving them took"),
        Metric("trainer_taps_off", "1", "mean", "training ranks whose tap failed; their passes go on without it"),
        Metric("train_steps", "1", "sum", "optimizer steps of the head"),
        Metric("train_s", "s", "sum", "processor time of the trainer"),
        Metric("train_share", "1", "mean", "share of the time that it may train"),
        Metric(
            "advance_s", "s", "mean", "by which learning may lengthen rollouts before it has to pay; -1: not known yet"
        ),
        Metric("train_slowdown", "1", "mean", "longer engine steps while it trains, as a share"),
        Metric(
            "saved_s", "s", "sum", "engine time that accepted tokens of the head saved, less what drafting them took"
        ),
        Metric("charged_s", "s", "sum", "by which engine steps were longer because the trainer trained"),
        Metric(
            "held_out_accept",
            "tokens",
            "mean",
            "that a draft of the last candidate can expect, on requests it does not learn from",
        ),
        Metric("served_accept", "tokens", "mean", "the same of the served version, at that time"),
        Metric("calibration", "1", "mean", "accepted tokens / those that the served version promised (eagle3: drafts)"),
        Metric("rejected_weight", "1", "mean", "extra weight of rejected tokens in the loss, as learned"),
        Metric("heads_not_saved", "engines", "sum", "since the start: heads that are not in a checkpoint"),
        Metric("heads_not_restored", "engines", "sum", "since the start: heads not restored on resume"),
        Metric("trainers_gone", "engines", "sum", "whose trainer has ended; they go on with the head that they have"),
    ),
    free=("learn", "trainer_tap", "threads", "nice", "max_share", "advance_s", "publish_s"),
    try_out=("enable=true",),
    driver="rl_accel.speculator.hosts.driver:SpeculatorDriver",
    engine="rl_accel.speculator.hosts.engine:SpeculatorEngine",
    rank="rl_accel.speculator.hosts.rank:SpeculatorRank",
    trainer="rl_accel.speculator.hosts.trainer:SpeculatorTrainer",
    probe="rl_accel.speculator.hosts.probe:SpeculatorProbe",
)
