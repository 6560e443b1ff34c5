"""Drafting as a feature."""

from rl_accel.draft.config import HEAD_METHODS, DraftConfig
from rl_accel.feature import Feature, Metric

DAS_PROPOSER = "rl_accel.draft.hosts.proposer.DASProposer"
"""What vLLM's `speculative_config["model"]` is for drafting by DAS."""

_END = "at the end of the step: "

FEATURE = Feature(
    name="draft",
    title="speculative decoding",
    config=DraftConfig,
    samples=True,
    claims=frozenset({"vllm.speculative_config"}),
    register="rl_accel.draft.hosts.first_step:register",
    implies=lambda settings: {"speculator": {"enable": True}} if settings.method in HEAD_METHODS else {},
    metrics=(
        Metric("undrafted_requests", "requests", "sum", "since the start: requests for which the drafter failed"),
        Metric("engines_off", "engines", "sum", "since the start: engines whose drafter failed as a whole"),
        Metric("propose_ms", "ms", "max", "time in the proposer, index and Python, mean over steps of the engine"),
        Metric("num_steps", "steps", "max", "engine steps in which the proposer was asked"),
        Metric("base_ms", "ms", "max", _END + "fitted time of an engine step without anything below"),
        Metric("speculation_ms", "ms", "max", _END + "fitted time of verifying drafts at all"),
        Metric("per_request_us", "us", "max", _END + "fitted time of a request in an engine step"),
        Metric("per_draft_us", "us", "max", _END + "fitted time of a draft token"),
        Metric("cost_error", "1", "max", "relative error of that fit, running mean"),
        Metric("window", "epochs", "max", _END + "epochs that are kept at present"),
        Metric(
            "hinted_tokens", "tokens", "sum", "drafted from what the sender of a request supposed (`lookahead.hint`)"
        ),
        Metric("live_bytes", "bytes", "sum", _END + "memory of the running epoch"),
        Metric("closed_bytes", "bytes", "sum", _END + "memory of closed epochs"),
        Metric("global_bytes", "bytes", "sum", _END + "memory of the index over all problems"),
        Metric("lengths_bytes", "bytes", "sum", _END + "memory of response lengths"),
        Metric("problems_renewed", "problems", "sum", "whose running requests were forgotten to keep `history_gib`"),
        Metric("requests_let_go", "requests", "sum", "that are no longer followed to keep `history_gib`"),
        Metric("segments_dropped", "segments", "sum", "of closed epochs, dropped to keep `history_gib`"),
        Metric("rollouts_lost", "rollouts", "sum", "finished ones that did not fit into `history_gib`"),
        Metric(
            "drafted_by_*",
            "tokens",
            "sum",
            "by the source of a draft's first token: `self`, `sibling`, `prompt`, `epoch_1`, `epoch_2`, `epochs_3_4`, "
            "`epochs_5_up` (epochs ago), `global`, `shorter` (a shorter context of the running epoch), `head`, `ahead`",
        ),
        Metric("accepted_by_*", "tokens", "sum", "the same of accepted tokens"),
        Metric(
            "ahead_ms",
            "ms",
            "max",
            "`ahead`: time of the engine with the process that drafts, waiting, mean over steps",
        ),
        Metric("ahead_token_ms", "ms", "max", _END + "`ahead`: what a drafted token takes"),
        Metric("ahead_acceptance", "1", "mean", _END + "`ahead`: share of tokens accepted behind accepted ones"),
        Metric("drafters_gone", "engines", "sum", "since the start: engines whose process that drafts ahead is gone"),
        Metric("history_refused", "engines", "sum", "since the start: snapshots not restored on resume"),
        Metric("history_not_saved", "engines", "sum", "since the start: snapshots not written, or not visible"),
        Metric("history_shared", "segments", "sum", "since the start: segments that an engine took from another one"),
        Metric("history_not_shared", "segments", "sum", "since the start: segments that an engine did not take"),
    ),
    free=("record",),
    try_out=("method=ngram",),
    driver="rl_accel.draft.hosts.driver:DraftDriver",
    engine="rl_accel.draft.hosts.engine:DraftEngine",
    trainer="rl_accel.draft.hosts.trainer:DraftTrainer",
    probe="rl_accel.draft.hosts.probe:DraftProbe",
    speculators={DAS_PROPOSER: {"method": "das"}},
)
