"""An agent with memory, served over A2A with a2a-sdk 1.x, Starlette and uvicorn.

    pip install "a2a-sdk[http-server]" uvicorn
    python examples/a2a_agent.py --port 9999
    python examples/a2a_client.py --context-id alice "My name is Alice"

The handler gets the Task of a2a-sdk. Its `context_id` is the id of the conversation, so all messages of an A2A context
share one conversation, also after a restart of the agent.
"""

from __future__ import annotations

import argparse
import contextlib

import uvicorn
from a2a.helpers import get_message_text, new_task_from_user_message, new_text_message
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes
from a2a.server.tasks import InMemoryTaskStore
from a2a.types import AgentCapabilities, AgentCard, AgentInterface, AgentSkill, Task
from a2a.utils.errors import UnsupportedOperationError
from starlette.applications import Starlette

from agentstate import ConversationContext, stateful


# With no options, agent_config.yaml decides; without that file, state is kept in ./conversation_states.
@stateful()
async def assistant(task: Task, context: ConversationContext, context_id: str) -> str:
    """Answer the newest message of the task, using the earlier messages of its context."""
    text = get_message_text(task.history[-1])
    earlier = await context.get_history(context_id, limit=6)
    said = [message["content"] for message in earlier if message["role"] == "user"]
    count = await context.count_history(context_id) // 2 + 1
    response = f"Message #{count}. " + (f"Before this you said: {'; '.join(said)}." if said else "We have just met.")
    async with context.batch(context_id) as batch:
        batch.add_to_history("user", text)
        batch.add_to_history("assistant", response)
    return response


class MemoryAgent(AgentExecutor):
    """Passes each message to the handler and returns its answer."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.message is not None
        task = new_task_from_user_message(context.message)
        response = await assistant(task)
        await event_queue.enqueue_event(new_text_message(response, context_id=task.context_id))

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise UnsupportedOperationError(message="this agent has no running tasks to cancel")


def agent_card(url: str) -> AgentCard:
    return AgentCard(
        name="Memory agent",
        description="Remembers what you said in this context.",
        version="1.0.0",
        supported_interfaces=[AgentInterface(url=url, protocol_binding="JSONRPC", protocol_version="1.0")],
        capabilities=AgentCapabilities(streaming=False),
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
        skills=[AgentSkill(id="memory", name="Memory", description="Conversation with memory", tags=["memory"])],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an agent with memory over A2A.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9999, help="0 takes any free port (default: 9999)")
    args = parser.parse_args()

    config = uvicorn.Config(lambda: app, factory=True, host=args.host, port=args.port, log_level="warning")
    socket = config.bind_socket()
    url = f"http://{args.host}:{socket.getsockname()[1]}/"
    card = agent_card(url)
    handler = DefaultRequestHandler(MemoryAgent(), InMemoryTaskStore(), card)
    app = Starlette(routes=[*create_agent_card_routes(card), *create_jsonrpc_routes(handler, "/")])
    print(f"Serving on {url}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C stops the server
        uvicorn.Server(config).run(sockets=[socket])


if __name__ == "__main__":
    main()
