"""What stands between the contexts and a storage: a queue, worker threads, and the bridge to event loops.

A storage has one blocking method, `execute(operations, settle)`, and knows nothing of this package. The engine decides
which operations it is given together, in which thread, and who learns of the outcomes.

**Theory of operation.** A *job* is one operation on a context, or a few in order. The jobs of a context run in the
order in which they were submitted, never at the same time. Jobs of different contexts are independent. All jobs that
wait when a worker thread becomes free are one *group*: one call of `execute`. While it runs, the next group gathers.
So a pipeline fills up, and one flush serves many, exactly when there is much to do; a lone call waits for nobody.

The oldest unfinished job of a context represents the context in the queue, and holds the younger ones (`Job.behind`).
The states of a job:

| state   | where it is                                                     | next                                    |
|---------|-----------------------------------------------------------------|-----------------------------------------|
| ready   | oldest of its context, in `_Lane.ready`                         | running; gone if withdrawn (cancelled)  |
| behind  | in `behind` of the oldest job                                   | ready or running; gone if withdrawn     |
| running | in a group; counted in `running` of the oldest job              | done, when each operation is settled    |
| done    | `outcomes` is set; the next job of the context represents it    | `deliver` is called                     |

A *lane* (`StateStorage.lane`) is a part of the storage that may be slow on its own, such as one server of a cluster. A
group never mixes lanes, and each lane has at most `StateStorage.concurrency` groups at a time: a stalled lane does not
use up the workers of the others. Most storages have one lane.

What a worker thread does:

| it has                  | then                                                                                   |
|-------------------------|----------------------------------------------------------------------------------------|
| nothing                 | it waits for a request; after `IDLE_SECONDS`, or when the storage is closed, it ends   |
| a request for a lane    | it takes the ready jobs of the lane, and those behind them, as a group                 |
| a group                 | it calls `execute`; each job is delivered as soon as its last operation is settled     |
| finished a group        | it takes the next one of the lane; if none is ready, it has nothing                    |

One worker serves a lane as long as its groups are quick: two would wait for the interpreter in turn. Whoever has waited
for `PATIENCE` (a blocked thread, a timer of the event loop) calls `Engine.look_after`, and a lane whose group takes
longer than that gets another worker.

A blocking call whose context is idle and whose lane is not full runs in the thread of the caller: no worker takes part.

**Locks.** `Engine._lock` guards the queue of one storage. Its holder does not wait, and calls nothing outside of this
package (the storage's `lane` and `execute`, the callbacks of jobs). `renewal` has one more for its own thread.

**Failures.** An exception at any line of a worker ends what it was doing, not those who wait: jobs of its group that
are not done end with StateOutcomeUnknownError (reads: StateUnavailableError), and another worker takes over.

**Re-entry.** A signal handler or a finalizer may call a storage from within a call of the same thread, and would wait
for the code that it interrupted. `Engine._inside` has the threads that are inside; such a call is a StateConflictError.

**Event loops.** An awaited job holds a future of its loop. The worker that finishes it appends it to the loop's mailbox
and wakes the loop, once for all that is in the mailbox.

`queue` has the queue and its workers, `loops` the bridge to event loops, `renewal` keeps the leases of turns alive.
"""

from .queue import CallBack, Engine, Job, engine_of

__all__ = ["CallBack", "Engine", "Job", "engine_of"]
