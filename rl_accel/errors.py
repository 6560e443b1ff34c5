"""The errors of rl_accel. All are picklable, so that they cross Ray and vLLM process borders unchanged."""


class RLAccelError(RuntimeError):
    """Base of every error that rl_accel raises on purpose; its text says what to do."""


class ConfigError(RLAccelError):
    """A setting is unknown, contradicts another one, or does not fit the machine, the model or the data."""


class VersionError(ConfigError):
    """A host package is missing or outside the versions that rl_accel was tested with."""


class RunFailedError(RLAccelError):
    """A training ended with an error of a host or of the machine; the traceback is in the run folder."""


class NotLiveError(RLAccelError):
    """A feature was asked for and did not come up in the process that should run it."""


class SpeculationUnsafeError(RLAccelError):
    """Speculative decoding would not sample from the target distribution; rl_accel refuses to speculate."""


class WeightSyncError(RLAccelError):
    """The rollout engine did not receive, or does not use, the weights that the trainer sent."""


class MismatchError(RLAccelError):
    """Log-probabilities of the rollout engine and of the trainer do not belong to the same policy."""


class CompareError(RLAccelError):
    """Runs cannot be read, aligned or compared."""


class DraftError(RLAccelError):
    """A drafter was used wrongly, or a snapshot of its history is damaged or belongs to another model."""


class CommError(RLAccelError):
    """Quantized communication was used wrongly, cannot serve this engine, or its ranks do not agree."""


class KVCacheError(RLAccelError):
    """Pages, queries or tables that do not fit together."""


class MoEError(RLAccelError):
    """Weights, widths or ranks that the quantizer of experts cannot serve."""


class LookaheadError(RLAccelError):
    """An engine of lookahead decoding answers what is no step, or was asked for what has none."""


class EngineRefusesError(LookaheadError):
    """An engine of lookahead decoding refuses a request as it stands."""
