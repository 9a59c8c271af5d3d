"""An assistant with memory: talk to it, stop it, and start it again.

    python examples/conversation_memory.py
    python examples/conversation_memory.py --context-id alice "Remember that I like tea"
    python examples/conversation_memory.py --context-id alice "What do you remember?"
    python examples/conversation_memory.py --storage valkey --url valkey://localhost:6379

Without a message, it reads messages from the terminal. The default storage is files in ./conversation_states; no server
is needed. In place of a language model, the assistant follows a few rules.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from agentstate import ConversationContext, StateConfigError, StateError, stateful


class Task(NamedTuple):
    """A message to the assistant. Any object with a `context_id` can be a task, for example an A2A task."""

    context_id: str
    text: str


REMEMBER = re.compile(r"(?:please )?remember (?:that )?(.+)", re.IGNORECASE)
OPINION = re.compile(r"\bI (like|love|prefer|hate|dislike|don't like|do not like) ([^.,;!?]+)", re.IGNORECASE)
NAME = re.compile(r"\b(?:my name is|call me) (\w[\w'-]*)", re.IGNORECASE)
QUESTION = re.compile(r"(?:what|who|do you|tell me)\b.*\b(?:remember|know|like|name|said|am)\b", re.IGNORECASE)
FORGET = re.compile(r"forget (?:everything|me)\b", re.IGNORECASE)


async def memory_assistant(task: Task, context: ConversationContext, context_id: str) -> str:
    """Answer one message, using what is stored in this conversation."""
    text = task.text.strip()
    if FORGET.match(text):
        await context.clear_context(context_id)
        return "I have forgotten everything about this conversation."

    count = await context.increment_variable(context_id, "interaction_count")
    if QUESTION.match(text):
        response = await recall(context, context_id, count)
    elif learned := await learn(text, context, context_id):
        response = f"I will remember: {learned}."
    else:
        response = await greet(context, context_id, count)

    # Question, answer and metadata are stored together, or not at all.
    async with context.batch(context_id) as batch:
        batch.add_to_history("user", text)
        batch.add_to_history("assistant", response)
        batch.set_metadata("last_interaction", datetime.now(UTC))
    return response


async def learn(text: str, context: ConversationContext, context_id: str) -> str:
    """Store what the message says about the user, and return it as text; "" if it says nothing."""
    learned = []
    if name := NAME.search(text):
        await context.set_variable(context_id, "user_name", name[1])
        learned.append(f"your name is {name[1]}")
    if opinion := OPINION.search(text):
        verb, thing = opinion[1].lower(), opinion[2].strip()
        # update_variable is atomic: updates from another terminal at the same time are not lost.
        await context.update_variable(context_id, "preferences", lambda known: {**known, thing: verb}, default={})
        learned.append(f"you {verb} {thing}")
    if (fact := REMEMBER.match(text)) and not learned:
        await context.update_variable(context_id, "facts", lambda known: [*known, fact[1]], default=[])
        learned.append(f'"{fact[1]}"')
    return " and ".join(learned)


async def recall(context: ConversationContext, context_id: str, count: int) -> str:
    """Answer with everything that is known about the user."""
    variables = await context.get_variables(context_id)
    known = [f"your name is {variables['user_name']}"] if "user_name" in variables else []
    known += [f"you {verb} {thing}" for thing, verb in variables.get("preferences", {}).items()]
    known += [f'"{fact}"' for fact in variables.get("facts", [])]
    memory = f"I remember: {', '.join(known)}." if known else "You have not told me anything about you yet."
    return f"This is our interaction #{count}. {memory}{await last_words(context, context_id)}"


async def greet(context: ConversationContext, context_id: str, count: int) -> str:
    """Answer any other message."""
    name = await context.get_variable(context_id, "user_name", "")
    hello = "Hello" if count == 1 else "Hello again"
    return (
        f"{hello}{', ' if name else ''}{name}! This is our interaction #{count}."
        f"{await last_words(context, context_id)} How can I help you?"
    )


async def last_words(context: ConversationContext, context_id: str) -> str:
    """A sentence with the last message of the user; "" if there is none."""
    history = await context.get_history(context_id, limit=2)
    said = [message["content"] for message in history if message["role"] == "user"]
    return f' Last time you said: "{said[-1]}".' if said else ""


# --- the program for the terminal -------------------------------------------------------------------------------------


def main() -> int:
    args = parse_arguments()
    kept = {
        "memory": "in memory: it is deleted when this program ends",
        "file": f"in {args.storage_dir}",
        "valkey": "in Valkey",
    }[args.storage]
    options: dict[str, dict[str, Any]] = {
        "memory": {},
        "file": {"storage_dir": args.storage_dir},
        "valkey": {"url": args.url, "key_prefix": args.key_prefix},
    }
    assistant = stateful(args.storage, **options[args.storage])(memory_assistant)
    try:
        if args.message is not None:
            if args.storage == "memory":
                print("(storage: memory. This conversation is deleted when the program ends.)", file=sys.stderr)
            return answer(assistant, args.context_id, args.message)
        print(f"Conversation {args.context_id!r}, kept {kept}. Ctrl-D ends it.")
        while True:
            if text := input("you> ").strip():
                answer(assistant, args.context_id, text)  # after an error, the conversation continues
    except (EOFError, KeyboardInterrupt):
        print("\nGoodbye!")
        return 0


def answer(assistant: Callable[[Task], Awaitable[str]], context_id: str, text: str) -> int:
    """Print the answer to one message, or the error. Returns the exit code."""

    async def ask() -> str:
        return await assistant(Task(context_id, text))

    try:
        print(asyncio.run(ask()))
    except StateConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Talk to an assistant with memory.")
    parser.add_argument("message", nargs="?", help="send this message and exit (default: read from the terminal)")
    parser.add_argument("--context-id", default="terminal", metavar="ID", help="the conversation (default: terminal)")
    parser.add_argument("--storage", choices=("memory", "file", "valkey"), default="file", help="default: file")
    parser.add_argument("--storage-dir", default="./conversation_states", metavar="DIR", help="for --storage file")
    parser.add_argument("--url", help="for --storage valkey: the server, for example valkey://localhost:6379")
    parser.add_argument("--key-prefix", default="agentup:state:", metavar="TEXT", help="for --storage valkey")
    args = parser.parse_args()
    if not args.context_id:
        parser.error("--context-id must not be empty")
    if args.storage == "valkey" and not args.url:
        parser.error("--storage valkey needs the server: --url valkey://localhost:6379")
    if args.url and args.storage != "valkey":
        parser.error("--url is for --storage valkey")
    return args


if __name__ == "__main__":
    sys.exit(main())
