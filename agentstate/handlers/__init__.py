"""`@stateful`: handlers with the state of their conversation; `@register_handler`: handlers by name.

    @register_handler("memory_assistant")
    @stateful(storage="valkey", url="valkey://localhost:6379", key_prefix="agentup:state:", ttl=3600)
    async def memory_assistant(task, context, context_id):
        history = await context.get_history(context_id, limit=5)

`stateful` makes one `shape.Handler` for the function, and a `call.Call` for each call. `tasks` reads the ids in a task,
`outage` handles stores that cannot be reached.
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
