"""Named patches of verl that make the way from a prompt to its rollout cheaper, applied where the feature is on."""

from rl_accel.fast_path.hosts.batched_put import BatchedPut
from rl_accel.fast_path.hosts.instantiate import InstantiateDirectly
from rl_accel.fast_path.hosts.server_acquire import CachedServerAcquire
from rl_accel.fast_path.hosts.token_builder import ReuseTokenBuilder

PATCHES = (InstantiateDirectly, ReuseTokenBuilder, BatchedPut, CachedServerAcquire)
