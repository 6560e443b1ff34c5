"""`python -m rl_accel.compare`: is one way of training faster than another, and did it change the curve?

Reads runs (`runs`, `tokens`), judges them (`verdict`), draws them (`plot`), reports (`report`), and can
train the arms itself, interleaved (`arms`).
"""
