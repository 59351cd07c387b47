"""Where the worker runs, and what carries it: a child process, or a sibling container. The only room with Docker.

with launch(wish, log=…, say=…) as worker:
    ready = worker.wait_until_ready()
    worker.give(job)
    for event in worker.events(): …
"""

from runner.supervisor.launch.environment import worker_environment
from runner.supervisor.launch.identity import has_engine, is_mounted, own_ids
from runner.supervisor.launch.pickles import unpickle
from runner.supervisor.launch.start import Wish, launch
from runner.supervisor.launch.worker import Worker

__all__ = ["Wish", "Worker", "has_engine", "is_mounted", "launch", "own_ids", "unpickle", "worker_environment"]
