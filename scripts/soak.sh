#!/usr/bin/env bash
# The long form of the tests that attack rl_accel (docs/reliability.md); about two hours on 2 cores. ./scripts/soak.sh [part ...]
# Parts: preflight, damage, server, proxy, kills. RL_ACCEL_SOAK is set for each: how many times its default size, or how many kills.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$RL_ACCEL_ROOT"

soak() { # soak PART SIZE TEST...
  local part=$1 size=$2; shift 2
  case " ${PARTS[*]} " in *" $part "*) ;; *) return 0 ;; esac
  echo "soak: $part, RL_ACCEL_SOAK=$size" >&2
  RL_ACCEL_SOAK=$size python -m pytest -q -s --timeout 7200 -p no:cacheprovider "$@"
}

PARTS=("$@")
[ $# -gt 0 ] || PARTS=(preflight damage server proxy kills)
soak preflight 10 tests/hosts/verl/test_preflight_fuzz.py
soak damage 50 tests/compare/test_damage.py tests/draft/test_history_damage.py
soak server 12.5 tests/hosts/vllm/test_engine_soak.py
soak proxy 5 tests/lookahead/test_proxy.py -k leave
soak kills 50 tests/hosts/verl/soak_kills.py
