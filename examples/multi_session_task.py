"""A task with several steps: each run of this script is a new process that continues the task.

    python examples/multi_session_task.py start task
    python examples/multi_session_task.py next step
    python examples/multi_session_task.py pause
    python examples/multi_session_task.py resume
    python examples/multi_session_task.py status

The handler is an ordinary function; @stateful works with `def` and `async def`.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from datetime import UTC, datetime
from typing import Any

from agentstate import StateError, SyncConversationContext, stateful

STEPS = ["collect the documents", "check the figures", "write the report"]


# serialize_turns: two processes that request "next step" at the same time advance the task by two steps.
@stateful("file", storage_dir="./conversation_states", serialize_turns=True)
def task_manager(task: dict[str, Any], context: SyncConversationContext, context_id: str) -> str:
    """Start, advance, pause and resume the task of this conversation."""
    command = task["text"].strip().lower()
    current = context.get_variable(context_id, "current_task")

    if command.startswith("start task"):
        if current and current["status"] != "completed":
            return f"There is a task already. {describe(current)}"
        current = {
            "id": str(uuid.uuid4()),
            "steps": STEPS,
            "current_step": 0,
            "status": "in_progress",
            "started_at": datetime.now(UTC),  # stored as ISO 8601 text
        }
    elif not current:
        return "There is no task. Say 'start task' to begin."
    elif command == "next step":
        if current["status"] != "in_progress":
            return f"Nothing to advance. {describe(current)}"
        current["current_step"] += 1
        if current["current_step"] == len(current["steps"]):
            current["status"] = "completed"
    elif command == "pause":
        if current["status"] == "in_progress":
            current["status"] = "paused"
    elif command == "resume":
        if current["status"] == "paused":
            current["status"] = "in_progress"
    elif command != "status":
        return "Say 'start task', 'next step', 'pause', 'resume' or 'status'."

    response = describe(current)
    with context.batch(context_id) as batch:
        batch.set_variable("current_task", current)
        batch.add_to_history("user", task["text"])
        batch.add_to_history("assistant", response)
    return response


def describe(current: dict[str, Any]) -> str:
    done, steps = current["current_step"], current["steps"]
    if current["status"] == "completed":
        return f"Task completed: {len(steps)} of {len(steps)} steps done."
    note = ", paused" if current["status"] == "paused" else ""
    return f"Step {done + 1} of {len(steps)}{note}: {steps[done]}."


def main() -> int:
    parser = argparse.ArgumentParser(description="A task that survives restarts.")
    parser.add_argument("command", nargs="+", help="start task, next step, pause, resume or status")
    parser.add_argument("--context-id", default="report", metavar="ID", help="whose task (default: report)")
    args = parser.parse_args()
    try:
        print(task_manager({"context_id": args.context_id, "text": " ".join(args.command)}))
    except StateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
