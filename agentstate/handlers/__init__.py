"""`@stateful`: handlers that are given the state of their conversation; and handlers by name.

    @register_handler("memory_assistant")
    @stateful(storage="valkey", url="valkey://localhost:6379", key_prefix="agentup:state:", ttl=3600)
    async def memory_assistant(task, context, context_id):
        history = await context.get_history(context_id, limit=5)

`stateful` makes a `shape.Handler` of the function once, and a `call.Call` of each call; `tasks` reads what a task says.
"""

from .decorator import StatefulDecorator, StatefulFunction, StatefulMethod, stateful
from .names import HandlerNotFoundError, get_handler, list_handlers, register_handler
from .outage import degraded_calls

__all__ = [
    "HandlerNotFoundError",
    "StatefulDecorator",
    "StatefulFunction",
    "StatefulMethod",
    "degraded_calls",
    "get_handler",
    "list_handlers",
    "register_handler",
    "stateful",
]
