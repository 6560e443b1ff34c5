"""An OpenAI-compatible server that drafts with a head which learns from its traffic: `hosts/launch.py`.

python -m rl_accel.speculator.serve --model FOLDER [--state FOLDER] [rl_accel.* settings] [options of vllm serve]
"""

import sys

from rl_accel.speculator.hosts.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
