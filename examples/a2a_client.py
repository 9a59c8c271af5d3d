"""Send a message to an A2A agent, in a context of your choice.

    pip install "a2a-sdk[http-server]"
    python examples/a2a_client.py --context-id alice "My name is Alice"

Works with any agent that supports A2A 1.0 over JSON-RPC, for example `a2a_agent.py`.
"""

from __future__ import annotations

import argparse
import asyncio

from a2a.client import create_client
from a2a.helpers import get_message_text, new_text_message
from a2a.types import Role, SendMessageRequest


async def send(url: str, context_id: str | None, text: str) -> None:
    async with await create_client(url) as client:
        message = new_text_message(text, context_id=context_id, role=Role.ROLE_USER)
        async for event in client.send_message(SendMessageRequest(message=message)):
            if event.HasField("message"):
                print(get_message_text(event.message))
                print(f"(context {event.message.context_id})")


def main() -> None:
    parser = argparse.ArgumentParser(description="Send a message to an A2A agent.")
    parser.add_argument("message")
    parser.add_argument("--url", default="http://127.0.0.1:9999", help="the agent (default: http://127.0.0.1:9999)")
    parser.add_argument("--context-id", metavar="ID", help="the conversation (default: a new one)")
    args = parser.parse_args()
    asyncio.run(send(args.url, args.context_id, args.message))


if __name__ == "__main__":
    main()
