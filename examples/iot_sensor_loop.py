"""A sensor on a small device: readings are stored in a file of bounded size, and survive restarts.

    python examples/iot_sensor_loop.py --readings 20 --interval 0.1

The sensor is SIMULATED: its readings are a random walk, and each is stored with this mark. The options of the storage
are those for a real device:

- exclusive=True   only this process writes in the directory, so operations need no lock
- fsync            "everysec" reduces the wear of the flash: a power failure loses at most about one second of readings,
                   and leaves a readable file. "always" loses nothing, and syncs once for each reading
- max_history      only the newest readings are kept; the totals of all readings are variables
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from types import FrameType

from agentstate import FileStorage, StateError, SyncConversationContext

DEVICE = "sensor-greenhouse"


def simulated_celsius(before: float) -> float:
    """The next reading of the simulated thermometer."""
    return round(before + random.uniform(-0.4, 0.4), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description="Store (simulated) readings of a sensor.")
    parser.add_argument("--readings", type=int, default=20, help="how many to take (default: 20)")
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between them (default: 0.1)")
    parser.add_argument("--keep", type=int, default=1000, help="how many to keep (default: 1000)")
    parser.add_argument("--fsync", choices=("always", "everysec", "no"), default="everysec")
    parser.add_argument("--storage-dir", default="./sensor_states", metavar="DIR")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)  # a service manager sends SIGTERM; handle it like Ctrl-C
    try:
        storage = FileStorage(args.storage_dir, exclusive=True, fsync=args.fsync, max_history=args.keep)
        with SyncConversationContext(storage) as context:
            try:
                measure(context, args.readings, args.interval)
            except KeyboardInterrupt:
                print("Stopped.")
            report(context)
    except StateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def measure(context: SyncConversationContext, readings: int, interval: float) -> None:
    celsius = context.get_variable(DEVICE, "last_celsius", 20.0)
    context.increment_variable(DEVICE, "starts")
    for _ in range(readings):
        celsius = simulated_celsius(celsius)
        with context.batch(DEVICE) as batch:  # the reading and the totals: one append to the file
            batch.add_to_history("sensor", {"celsius": celsius}, {"simulated": True})
            batch.set_variable("last_celsius", celsius)
            batch.increment_variable("total_readings")
        time.sleep(interval)


def report(context: SyncConversationContext) -> None:
    state = context.get_state(DEVICE, history_limit=3)
    if state is None:
        print("No readings yet.")
        return
    for message in state.history:
        print(f"{message['timestamp']:.19}  {message['content']['celsius']:6.2f} °C (simulated)")
    kept, total = context.count_history(DEVICE), state.variables.get("total_readings", 0)
    print(f"{total} readings since {state.created_at:%Y-%m-%d}, {kept} kept, {state.variables['starts']} starts.")


if __name__ == "__main__":
    sys.exit(main())
