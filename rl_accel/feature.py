"""What a feature is, and the list of them. Imports no host, and no feature before it is needed.

A feature is a folder with a descriptor (`FEATURE` in its `feature.py`) and a line in `BUILT_IN`; another package adds
one by an entry point of the group `rl_accel.features`. Everything outside the folders of features, the spine, knows
them by this contract only. What a feature does in a process is a role: a class that is imported there and nowhere else.

    Driver    in the process of the user's command, before anything is started
    Engine    in each worker of a rollout engine
    Rank      on each training rank
    AgentLoop in each agent-loop worker of verl
    Trainer   in verl's trainer
    Probe     in the doctor

Every method of a role does nothing unless a feature says otherwise. Roles of features that are off are not made, except
`Driver`. Source: ours.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rl_accel.errors import ConfigError

BUILT_IN = (
    "rl_accel.sampling.feature:FEATURE",
    "rl_accel.draft.feature:FEATURE",
    "rl_accel.speculator.feature:FEATURE",
    "rl_accel.lookahead.feature:FEATURE",
    "rl_accel.kvcache.feature:FEATURE",
    "rl_accel.moe.feature:FEATURE",
    "rl_accel.weight_sync.feature:FEATURE",
    "rl_accel.trace.feature:FEATURE",
    "rl_accel.deepspeed.feature:FEATURE",
    "rl_accel.comm.feature:FEATURE",
    "rl_accel.fast_path.feature:FEATURE",
)
"""In the order in which they are set up."""
GROUP = "rl_accel.features"
"""Entry points of features in other packages."""


@dataclass(frozen=True)
class Metric:
    """One number of a step, a line of `docs/metrics.md`."""

    name: str
    """Under `rl_accel/<feature>/`; `*` stands for a part that varies."""
    unit: str
    reduction: str
    """Over rollout engines or training ranks: `sum`, `max` or `mean`."""
    meaning: str


@dataclass(frozen=True)
class Feature:
    """The descriptor of a feature. Roles and hooks are named as "module:object"."""

    name: str
    """Prefix of its settings (`rl_accel.<name>.*`), its metrics, and the name of its folder in a checkpoint."""
    title: str
    """A few words for people."""
    config: type
    """Frozen dataclass of its settings with a property `enabled`; every field has a default."""
    lossy: Callable[[Any], bool] | bool = False
    """Whether it changes what is sampled or trained, maybe a function of its settings; such a feature needs
    `rl_accel.allow_lossy=true`."""
    claims: Callable[[Any], frozenset[str]] | frozenset[str] = frozenset()
    """Positions in a host that only one feature may hold, such as `vllm.speculative_config`; maybe a function of its
    settings."""
    implies: Callable[[Any], Mapping[str, Mapping[str, Any]]] | None = None
    """Settings of other features that follow from its own, where the user leaves them out: feature -> settings."""
    metrics: tuple[Metric, ...] = ()
    samples: bool = False
    """Whether its `Engine` takes part in sampling, so that vLLM's known faults there must be repaired."""
    max_probs_diff: float = 0.1
    min_pearson: float = 0.9
    """What it may do to the probabilities of sampled tokens in engine and trainer before a run is stopped."""
    free: tuple[str, ...] = ()
    """Settings that a resumed run may change without a word of permission."""
    try_out: tuple[str, ...] = ()
    """Settings with which the doctor tries it where it was not told any."""
    try_policy: str = "quickstart"
    """Policy of the package with which the doctor tries it where it was not told one (`quickstart.deep.SHIPPED`)."""
    driver: str = ""
    engine: str = ""
    rank: str = ""
    agent_loop: str = ""
    trainer: str = ""
    probe: str = ""
    model_runners: tuple[str, ...] = ("V1",)
    """Of vLLM, those that its `Engine` can act in."""
    speculators: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Values of vLLM's `speculative_config["model"]` that ask for the feature by themselves -> settings they imply."""
    register: str = ""
    """Function that every vLLM process calls before its configuration is checked; called more than once."""
    import_hooks: Mapping[str, str] = field(default_factory=dict)
    """Module of verl -> function that is given it after its import, in every process that imports verl."""
    patches: str = ""
    """Tuple of `patching.HostPatch` that a run with this feature on applies in its processes; a light module."""

    def claimed(self, settings: Any) -> frozenset[str]:
        """Return what the feature claims with these settings."""
        return self.claims(settings) if callable(self.claims) else self.claims

    def is_lossy(self, settings: Any) -> bool:
        """Return whether it changes what is sampled or trained with these settings."""
        return self.lossy(settings) if callable(self.lossy) else self.lossy

    def role(self, kind: str) -> type[Any]:
        """Return the class of a role, or the base class, which does nothing."""
        name = getattr(self, kind)
        return load(name) if name else ROLES[kind]

    def metric(self, name: str) -> Metric:
        """Return the line of a metric; KeyError if the table lacks it."""
        for line in self.metrics:
            if line.name == name or ("*" in line.name and name.startswith(line.name.split("*")[0])):
                return line
        raise KeyError(f"feature {self.name} has no metric {name!r} in its table")


class Driver:
    """Looks at a verl configuration before anything is started. Imports no host that takes seconds."""

    always = False
    """Whether it also acts on a plain verl command that has no rl_accel settings at all."""

    def __init__(self, feature: Feature, settings: Any, accel: Any):
        self.feature, self.settings, self.accel = feature, settings, accel

    def check(self, config: Any) -> None:
        """Raise ConfigError for what the configuration tells cannot work. Called for features that are off, too."""

    def check_engine_args(self, args: Mapping[str, Any], on_gpu: bool) -> None:
        """Raise ConfigError for arguments of vLLM's engine that the user gave and that cannot work here. Called for
        features that are off, too."""

    def check_run(self, config: Any) -> None:
        """The same for files, folders and devices, once the run folder is known."""

    def prepare(self, config: Any) -> None:
        """Change the configuration in place; everything has been checked."""

    def engine_settings(self) -> dict[str, Any]:
        """Return what `Engine` needs of the settings, as plain values."""
        from dataclasses import asdict

        return asdict(self.settings)

    def engine_args(self) -> dict[str, Any]:
        """Return arguments of vLLM's engine that nobody else may set, such as `speculative_config`."""
        return {}

    def engine_files(self, policy: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write what engines must find on disk when they start; return arguments as `engine_args` does.

        Args:
            policy: config.json of the policy, of its text model where that is nested; {} where it is not here.
            folder: for the files of this feature, maybe not there yet. Engines on other nodes have to see it.
        """
        return {}

    def rank_settings(self, config: Any, role: str) -> dict[str, Any]:
        """Return what `Rank` needs in a training role of verl (`actor_rollout_ref.actor`, `critic`); {}: nothing."""
        return {}

    def summary(self, config: Any) -> str:
        """Return a few words for the line that says what is on; "" if it is off."""
        return self.feature.title if self.settings.enabled else ""

    def arm(self) -> str:
        """Return the name that a run gets in comparisons; "" leaves it to the others."""
        return ""


class Engine:
    """Acts in one worker of a rollout engine, on vLLM's model runner."""

    layerwise_sync = False
    """Whether new weights must go through vLLM's layer-wise reload, which processes each layer as a first load does; on
    a GPU verl writes them straight into parameters otherwise."""

    def __init__(self, settings: Any, vllm_config: Any):
        self.settings, self.vllm_config = settings, vllm_config

    def install(self, runner: Any) -> None:
        """Set up before the model is loaded."""

    def draft_source(self) -> Any:
        """Return a `CandidateSource` that the drafter may ask beside history (`draft/combined.py`), or None."""
        return None

    def installed(self, runner: Any) -> None:
        """Called when every feature is set up and sampling has passed its self-test."""

    def loaded(self, runner: Any) -> None:
        """The model is built and loaded, with first weights or none; its KV cache is not there yet."""

    def live(self) -> Any:
        """Return what came up, asked again when the model is loaded; false if what was asked for did not."""
        return True

    def on_bucket(self, weights: list[tuple[str, Any]]) -> None:
        """New weights arrived, before they are loaded; the tensors may be kept."""

    def expected_weight(self, name: str, weight: Any) -> Any:
        """Return what the engine's kernel should multiply with where `weight` was sent for a layer `name`."""
        return weight

    def on_weights(self, runner: Any, seconds: float) -> None:
        """All new weights are loaded, which took `seconds`."""

    def drain(self) -> dict[str, float]:
        """Return metrics since the last call, by the names of the feature's table; {} on ranks that have none."""
        return {}


class Rank:
    """Acts on one training rank of one role of verl."""

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings

    def attach(self, engine: Any, optimizer: Any) -> None:
        """Bind to a `DeepSpeedEngine`, or to the root module of FSDP2, before the first backward pass."""

    def held_weights(self) -> Iterator[tuple[str, Any]] | None:
        """Return (name in the module's state dict, whole tensor) of the weights that passes over the model compute
        with, where these are not what its parameters hold; None where they are. All ranks run it to its end."""
        return None

    def begin_inference(self, micro_batch: Any) -> None:
        """The model is about to run over a micro-batch of verl's without gradients, such as for old log-probs."""

    def end_inference(self) -> None:
        """It has run, or failed."""

    def begin_update(self) -> None:
        """An update begins; `metrics` is asked for when it is done."""

    def metrics(self) -> dict[str, float]:
        """Return the numbers of the update."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


class AgentLoop:
    """Acts in each agent-loop worker of verl, on the way from a prompt to its reward."""

    def __init__(self, settings: Any, worker: Any):
        self.settings, self.worker = settings, worker

    def sampling_params(self, sampling_params: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters with which a session generates."""
        return sampling_params

    def client(self, client: Any, validate: bool) -> Any:
        """Return what the loop of a session generates with: `client`, or one of the feature's own around it."""
        return client

    def finish(self, outputs: Sequence[Any], client: Any) -> None:
        """Change the `AgentLoopOutput`s of a session before they are scored. `client` is the feature's own."""

    def score(self, output: Any, sample: dict[str, Any]) -> bool:
        """Set the reward of an `AgentLoopOutput` and return True, or leave it to verl."""
        return False

    def drain(self) -> dict[str, float]:
        """Return metrics since the last call, by the names of the feature's table."""
        return {}


class Trainer:
    """Acts in verl's trainer. `trainer` is a `hosts.verl.trainer.AcceleratedTrainerSync`."""

    def __init__(self, feature: Feature, settings: Any, trainer: Any):
        self.feature, self.settings, self.trainer = feature, settings, trainer

    def watch_sync(self, sync: Callable[[], None], what: str) -> Callable[[], None]:
        """Return a call that does the weight sync `sync`, which messages call `what`."""
        return sync

    def restore_before_sync(self) -> None:
        """A checkpoint was loaded, and its weights are not in the engines yet; `restore` follows when they are."""

    def on_init_end(self) -> None:
        """The first weights are in the engines; a resumed run has loaded its checkpoint."""

    def on_step_end(self) -> None:
        """The step's weights are in the engines."""

    def on_end(self) -> None:
        """The last step is logged."""

    def metrics(self) -> dict[str, float]:
        """Return numbers since the last call, by the names of the feature's table."""
        return {}

    def on_rollouts(self, step: int, epoch: int, keys: Sequence[str], rollouts: Any) -> None:
        """See the rollouts that a step trained on (`hosts.verl.metrics.FIELDS`)."""

    def save(self) -> None:
        """A checkpoint is about to be written; `self.trainer.feature_folder(self.feature.name)` is not there yet."""

    def restore(self) -> None:
        """A checkpoint was loaded."""


@dataclass(frozen=True)
class Check:
    """One line of the doctor."""

    name: str
    ok: bool
    detail: str = ""


class Probe:
    """Tells the doctor whether a feature that was asked for works here."""

    def __init__(self, settings: Any):
        self.settings = settings

    def checks(self) -> list[Check]:
        """Check what needs no engine; heavy imports belong into a process of their own (`doctor.run_probe`)."""
        return []

    def engine_checks(self, found: Mapping[str, Any]) -> list[Check]:
        """Judge what an engine with the feature said of itself (`hosts.vllm.probe`)."""
        return []


ROLES: dict[str, type[Any]] = {
    "driver": Driver,
    "engine": Engine,
    "rank": Rank,
    "agent_loop": AgentLoop,
    "trainer": Trainer,
    "probe": Probe,
}


@functools.lru_cache(maxsize=1)
def features() -> dict[str, Feature]:
    """Return all features by name, in the order of the registry.

    Raises:
        ConfigError: if two have one name.
    """
    lines = [*BUILT_IN, *sorted(entry.value for entry in entry_points(group=GROUP))]
    found: dict[str, Feature] = {}
    for line in lines:
        feature = load(line)
        if feature.name in found:
            raise ConfigError(f"{line}: there is another feature named {feature.name!r}; uninstall one of them")
        found[feature.name] = feature
    return found


def load(name: str) -> Any:
    """Import an object named "module:object"."""
    module, _, symbol = name.partition(":")
    return getattr(importlib.import_module(module), symbol)
