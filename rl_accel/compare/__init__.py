"""`python -m rl_accel.compare`: is one way of training faster than another, and did it change the curve?

Reads runs (`runs`, `tokens`, `wandb_file`; whatever their state, `reading`), says what may be claimed about them
(`eligibility`), compares (`identity`, `speed`, `verdict`), draws (`plot`), reports (`report`), and can train the arms
itself, interleaved (`arms`, `reuse`).
"""
