"""`python -m agentstate.config` prints the JSON Schema as it is shipped: agentstate/agent_config.schema.json."""

from .reference import schema_text

print(schema_text(), end="")
