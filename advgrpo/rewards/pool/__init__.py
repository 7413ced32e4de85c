"""Slow judges in processes of their own, which score while the next images are drawn.

recipe.py     what is built in a worker
workers.py    a worker as a process of this machine, or as a Ray actor
child.py      the program of such a process
queueing.py   batches that wait for a worker, and workers that are replaced
reward.py     the `Reward` in front of it
"""
