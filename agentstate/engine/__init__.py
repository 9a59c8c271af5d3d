"""What stands between the contexts and a storage: a queue, worker threads, and the bridge to event loops.

A storage has one blocking method, `execute(operations, settle)`, and knows nothing of this package. The engine decides
which operations it is given together, in which thread, and who learns of the outcomes.

**Theory of operation.** A *job* is one operation, or a few, on one context. The jobs of a context are carried out in
the order in which they were submitted, and never two groups at a time. Jobs of different contexts are independent:
all that wait when a worker is free form one *group*, one call of `execute`. While it runs, the next group gathers. So
a pipeline fills and one flush serves many exactly when there is much to do, and a lone call waits for nobody.

The states of a job:

| state    | its context is                     | ends with                                                          |
|----------|------------------------------------|--------------------------------------------------------------------|
| waiting  | ready, or running an earlier job   | a worker takes it into a group; or `withdraw` (cancelled): never run |
| running  | running                            | `settle` was called for each of its operations, or `execute` failed |
| done     | ready if it has more jobs, or gone | `deliver` was called, once, in the thread that settled it           |

A *lane* (`StateStorage.lane`) is what a storage can be slow at as a whole, such as one server of a cluster. A group
never mixes lanes, and each lane has at most `StateStorage.concurrency` groups at a time, so a stalled lane does not
use up what the others need. Most storages have one lane.

What a worker thread does next:

| it has                        | it                                                                                 |
|-------------------------------|------------------------------------------------------------------------------------|
| no lane                       | waits for a request; after `IDLE_SECONDS`, or when the storage is closed, it ends   |
| a request for a lane          | takes all ready contexts of the lane (up to `largest_group` operations) as a group |
| more ready contexts than that | requests another worker for the lane, unless the lane has all it may have           |
| a group                       | calls `execute`; each job is delivered as soon as its outcomes are known            |
| a finished group              | takes the next group of the lane; if there is none, it has no lane                 |

A blocking call that finds its lane free and its context idle runs in the caller's own thread: no hand-over, no worker.

**Locks.** `Engine._lock` guards the contexts, lanes and counts of one storage. Whoever holds it neither waits nor
calls code of others. The only other lock is that of `renewal`. A worker that fails at any line abandons its group: what
was not settled is reported as unknown or unavailable, and another worker takes its place.

**Re-entry.** A signal handler or finalizer may call the same storage from within a call of the same thread. It would
wait for the code that it interrupted, so it is a StateConflictError at once (`Engine._inside`).

`queue` has the queue and its workers, `loops` the bridge to event loops, `renewal` keeps the leases of turns alive.
"""

from .queue import CallBack, Engine, Job, engine_of

__all__ = ["CallBack", "Engine", "Job", "engine_of"]
