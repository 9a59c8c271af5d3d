"""A notebook on the command line: a plain script without decorator and event loop.

    python examples/sync_script.py "Buy tea" "Call Bob"
    python examples/sync_script.py
    python examples/sync_script.py --undo

The notes are stored in ./conversation_states.
"""

from __future__ import annotations

import argparse

from agentstate import FileStorage, SyncConversationContext

parser = argparse.ArgumentParser(description="A notebook, stored in ./conversation_states.")
parser.add_argument("notes", nargs="*", help="notes to add; the last five notes are printed")
parser.add_argument("--undo", action="store_true", help="remove the last note")
args = parser.parse_args()

with SyncConversationContext(FileStorage("./conversation_states")) as context:
    if args.undo:
        for note in context.pop_history("notebook"):
            print(f"Removed: {note['content']}")
    with context.batch("notebook") as batch:  # all notes are stored, or none of them
        for text in args.notes:
            batch.add_to_history("user", text)
        batch.increment_variable("notes_written", len(args.notes))

    for note in context.get_history("notebook", limit=5):
        print(f"{note['timestamp']:.16}  {note['content']}")
    kept, written = context.count_history("notebook"), context.get_variable("notebook", "notes_written")
    print(f"{kept} notes kept, {written} ever written.")
