"""Every Python block of AgentUp's document on state management, as it stands there.

Each block runs twice, in a process of its own: once with `src.agent` replaced by `agentstate`, and once unchanged,
with `agentstate.compat`. Blocks that use Valkey use a real server; only the URL and the key prefix are replaced. Names
that a block does not define (`response`, `task`, an import) are added before it, and assertions after it.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import ValkeyServer

COMPAT = "import agentstate.compat; agentstate.compat.install()\n"
UTCNOW = "ignore:datetime.datetime.utcnow() is deprecated:DeprecationWarning"  # from Python 3.12 on

Run = Callable[..., str]


@pytest.fixture(params=["agentstate", "src.agent"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Runs blocks one after the other as one program, with either import path, and returns what it prints."""

    def run(*blocks: str, **replaced: str) -> str:
        program = "\n".join(map(textwrap.dedent, blocks))
        for name, value in replaced.items():
            program = program.replace({"url": "valkey://localhost:6379", "prefix": "agentup:state:"}[name], value)
        program = program.replace("src.agent", "agentstate") if request.param == "agentstate" else COMPAT + program
        (tmp_path / "program.py").write_text(program)
        command = [sys.executable, "-W", "error", "-W", UTCNOW, "program.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{done.stderr}\n{program}"
        return done.stdout + done.stderr

    return run


@pytest.fixture
def server(valkey_9: ValkeyServer, key_prefix: str) -> dict[str, str]:
    return {"url": valkey_9.url, "prefix": key_prefix}


@pytest.fixture
def configured(tmp_path: Path, server: dict[str, str]) -> dict[str, str]:
    """The document's configuration of the Valkey backend."""
    configure(
        tmp_path,
        f"""
        # External services configuration
        services:
          valkey:
            type: cache
            config:
              url: "{server["url"]}"

        # State management - IMPORTANT: Explicit Valkey configuration required
        state:
          backend: valkey
          ttl: 3600  # 1 hour expiration
          url: "{server["url"]}"          # REQUIRED: Explicit Valkey URL
          key_prefix: "{server["prefix"]}"           # REQUIRED: Key prefix for namespacing
        """,
    )
    return server


def configure(folder: Path, text: str) -> None:
    (folder / "agent_config.yaml").write_text(textwrap.dedent(text))


def in_a_coroutine(block: str) -> str:
    """A block of `await` statements, as the body of `async def main(context, context_id)`."""
    return "async def main(context, context_id):\n" + textwrap.indent(textwrap.dedent(block), "    ")


needs_a2a = pytest.mark.usefixtures("a2a")


@pytest.fixture
def a2a() -> None:
    pytest.importorskip("a2a.types", reason="a2a-sdk is not installed; it is in the extra `test`")


# --- Using State Management in Skills -------------------------------------------------------------------------------

THE_DECORATOR = """
from src.agent.context import stateful
from a2a.types import Task

@stateful(storage='valkey', url='valkey://localhost:6379', key_prefix='agentup:state:', ttl=3600)
async def my_stateful_skill(task: Task, context, context_id):
    \"\"\"A skill that uses state management.\"\"\"

    # Get conversation history
    history = await context.get_history(context_id, limit=10)

    # Store user preferences
    await context.set_variable(context_id, 'user_preference', 'dark_mode')

    # Get stored preferences
    preference = await context.get_variable(context_id, 'user_preference', 'default')

    # Add to conversation history
    await context.add_to_history(context_id, 'user', task.input)
    await context.add_to_history(context_id, 'assistant', response)

    return response
"""


@needs_a2a
def test_the_stateful_decorator(run: Run, server: dict[str, str]) -> None:
    run(
        "response = 'an answer'",
        THE_DECORATOR,
        """
        import asyncio
        from types import SimpleNamespace
        from agentstate import get_context_manager

        task = SimpleNamespace(id='task-1', context_id='alice', metadata=None, input='a question')
        assert asyncio.run(my_stateful_skill(task)) == 'an answer'
        assert asyncio.run(my_stateful_skill(task)) == 'an answer'
        options = dict(url='valkey://localhost:6379', key_prefix='agentup:state:', ttl=3600)
        context = get_context_manager('valkey', blocking=True, **options)
        assert [message['content'] for message in context.get_history('alice')] == ['a question', 'an answer'] * 2
        assert context.get_variable('alice', 'user_preference') == 'dark_mode'
        assert my_stateful_skill.__doc__ == 'A skill that uses state management.'
        """,
        **server,
    )


DECORATOR_PARAMETERS = """
# For Valkey backend
@stateful(storage='valkey', url='valkey://localhost:6379', key_prefix='agentup:state:', ttl=3600)
{handler}
# For file backend
@stateful(storage='file', storage_dir='./conversation_states')
{handler}
# For memory backend
@stateful(storage='memory')
{handler}
"""

COUNTING = """
async def count(task, context, context_id):
    await context.add_to_history(context_id, 'user', task['text'])
    return type(context.storage).__name__, await context.count_history(context_id)
counters.append(count)
"""


def test_decorator_parameters(run: Run, server: dict[str, str], tmp_path: Path) -> None:
    run(
        "from src.agent.context import stateful\ncounters = []",
        DECORATOR_PARAMETERS.format(handler=COUNTING.strip()),
        """
        import asyncio
        task = {'id': 'alice', 'text': 'hi'}
        for number in (1, 2):
            answers = [asyncio.run(count(task)) for count in counters]
            assert answers == [('ValkeyStorage', number), ('FileStorage', number), ('InMemoryStorage', number)], answers
        """,
        **server,
    )
    assert list((tmp_path / "conversation_states").glob("alice.*"))


# --- State Operations -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "file", "valkey"])
def on_each_backend(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Runs `main` on a store of each backend, and then `check` on a new manager of the same store."""
    options: dict[str, Any] = {"memory": {}, "file": {"storage_dir": str(tmp_path / "states")}}.get(request.param, {})
    if request.param == "valkey":
        server = request.getfixturevalue("server")
        options = {"url": server["url"], "key_prefix": server["prefix"], "ttl": 3600}
    return f"""
import asyncio
from src.agent.context import get_context_manager
async def all_of_it():
    context = get_context_manager({request.param!r}, **{options!r})
    await main(context, 'alice')
    if {request.param!r} != 'memory':
        await context.aclose()
        assert get_context_manager({request.param!r}, **{options!r}) is not context
        context = get_context_manager({request.param!r}, **{options!r})
    await check(context, 'alice')
    await context.aclose()
asyncio.run(all_of_it())
"""


VARIABLES = """
# Set a variable
await context.set_variable(context_id, 'user_name', 'Alice')
await context.set_variable(context_id, 'preferences', {'theme': 'dark', 'language': 'en'})

# Get a variable with default
name = await context.get_variable(context_id, 'user_name', 'Anonymous')
prefs = await context.get_variable(context_id, 'preferences', {})
"""


def test_working_with_variables(run: Run, on_each_backend: str) -> None:
    run(
        in_a_coroutine(VARIABLES),
        """
            assert (name, prefs) == ('Alice', {'theme': 'dark', 'language': 'en'})
        async def check(context, context_id):
            assert await context.get_variable(context_id, 'user_name', 'Anonymous') == 'Alice'
            assert await context.get_variable('bob', 'user_name', 'Anonymous') == 'Anonymous'
            assert await context.get_variable('bob', 'preferences', {}) == {}
        """,
        on_each_backend,
    )


HISTORY = """
# Add messages to history
await context.add_to_history(context_id, 'user', 'Hello!')
await context.add_to_history(context_id, 'assistant', 'Hi there!')

# Get conversation history
history = await context.get_history(context_id, limit=10)  # Last 10 messages
full_history = await context.get_history(context_id)       # All messages

# History format
for message in history:
    role = message['role']        # 'user' or 'assistant'
    content = message['content']  # Message content
    timestamp = message['timestamp']  # ISO timestamp
"""


def test_conversation_history(run: Run, on_each_backend: str) -> None:
    run(
        in_a_coroutine(HISTORY),
        """
            from datetime import datetime, timezone
            assert history == full_history
            assert (role, content) == ('assistant', 'Hi there!')
            assert abs((datetime.fromisoformat(timestamp) - datetime.now(timezone.utc)).total_seconds()) < 60
        async def check(context, context_id):
            history = await context.get_history(context_id)
            assert [(message['role'], message['content']) for message in history] == [
                ('user', 'Hello!'), ('assistant', 'Hi there!')
            ]
            assert await context.get_history('bob') == []
        """,
        on_each_backend,
    )


METADATA = """
# Set metadata
await context.set_metadata(context_id, 'user_id', 'user_123')
await context.set_metadata(context_id, 'session_start', datetime.utcnow().isoformat())

# Get metadata
user_id = await context.get_metadata(context_id, 'user_id')
start_time = await context.get_metadata(context_id, 'session_start')
"""


def test_metadata_management(run: Run, on_each_backend: str) -> None:
    run(
        "from datetime import datetime",
        in_a_coroutine(METADATA),
        """
            assert user_id == 'user_123'
            assert datetime.fromisoformat(start_time) <= datetime.utcnow()
        async def check(context, context_id):
            assert await context.get_metadata(context_id, 'user_id') == 'user_123'
            assert await context.get_metadata('bob', 'user_id') is None
        """,
        on_each_backend,
    )


CONTEXTS = """
# Get or create context
state = await context.get_or_create(context_id, user_id='user_123')

# Clear a context (delete all data)
await context.clear_context(context_id)

# Cleanup old contexts (useful for maintenance)
cleaned_count = await context.cleanup_old_contexts(max_age_hours=24)
"""


def test_context_management(run: Run, on_each_backend: str) -> None:
    run(
        in_a_coroutine(CONTEXTS),
        """
            assert (state.context_id, state.user_id, state.history) == ('alice', 'user_123', [])
            assert state.to_dict()['variables'] == {}
            assert cleaned_count == 0
        async def check(context, context_id):
            assert not await context.exists(context_id)
            await context.set_variable(context_id, 'k', 1)
            assert await context.cleanup_old_contexts(max_age_hours=24) == 0
            await asyncio.sleep(0.01)
            assert await context.cleanup_old_contexts(max_age_hours=0) == 1
            assert not await context.exists(context_id)
        """,
        on_each_backend,
    )


# --- Creating Stateful Skills ---------------------------------------------------------------------------------------

MANUAL_IMPLEMENTATION = """
from src.agent.context import stateful
from src.agent.handlers import register_handler
from a2a.types import Task
from datetime import datetime

@register_handler("memory_assistant")
@stateful(storage='valkey', url='valkey://localhost:6379', key_prefix='agentup:state:', ttl=3600)
async def memory_assistant(task: Task, context, context_id):
    \"\"\"AI assistant with conversation memory.\"\"\"

    # Extract user message
    user_message = extract_user_message(task)

    # Get conversation history and user data
    history = await context.get_history(context_id, limit=5)
    interaction_count = await context.get_variable(context_id, 'interaction_count', 0)
    user_preferences = await context.get_variable(context_id, 'preferences', {})

    # Update interaction count
    await context.set_variable(context_id, 'interaction_count', interaction_count + 1)

    # Add current message to history
    await context.add_to_history(context_id, 'user', user_message)

    # Generate context-aware response
    if 'remember' in user_message.lower() and len(history) > 0:
        recent_topics = [msg['content'] for msg in history[-3:] if msg['role'] == 'user']
        response = f"I remember our conversation! Recently you asked about: {', '.join(recent_topics)}"
    else:
        response = f"Hello! This is our interaction #{interaction_count + 1}. How can I help you?"

    # Store response in history
    await context.add_to_history(context_id, 'assistant', response)

    # Update metadata
    await context.set_metadata(context_id, 'last_interaction', datetime.utcnow().isoformat())

    return response

def extract_user_message(task):
    \"\"\"Extract text message from A2A task.\"\"\"
    if hasattr(task, 'message') and task.message and hasattr(task.message, 'parts'):
        for part in task.message.parts:
            if hasattr(part, 'text'):
                return part.text
    return "No message content"
"""

SAYING = """
import asyncio, sys
from types import SimpleNamespace
from a2a.types import Message, Part

def said(text, context_id='alice'):
    message = Message(message_id='m', context_id=context_id, parts=[Part(text=text)])
    return SimpleNamespace(id='task', context_id=context_id, metadata=message.metadata, message=message)

def say(handler, text, context_id='alice'):
    return asyncio.run(handler(said(text, context_id)))
"""


@needs_a2a
def test_manual_implementation_remembers_from_one_process_to_the_next(run: Run, server: dict[str, str]) -> None:
    first = """
        from agentstate.handlers import get_handler
        assert say(memory_assistant, 'I like tea') == 'Hello! This is our interaction #1. How can I help you?'
        named = get_handler('memory_assistant')
        assert say(named, 'And cake') == 'Hello! This is our interaction #2. How can I help you?'
    """
    second = """
        answer = say(memory_assistant, 'What do you remember?')
        assert answer == 'I remember our conversation! Recently you asked about: And cake', answer
        assert say(memory_assistant, 'hi', 'bob') == 'Hello! This is our interaction #1. How can I help you?'
    """
    run(MANUAL_IMPLEMENTATION, SAYING, first, **server)
    run(MANUAL_IMPLEMENTATION, SAYING, second, **server)


# --- Common Patterns ------------------------------------------------------------------------------------------------

EXTRACT = MANUAL_IMPLEMENTATION[MANUAL_IMPLEMENTATION.index("def extract_user_message") :]
IMPORTS = (
    "import uuid\nfrom datetime import datetime\nfrom a2a.types import Task\nfrom src.agent.context import stateful"
)

PREFERENCES = """
@stateful(storage='valkey')
async def learning_assistant(task: Task, context, context_id):
    user_message = extract_user_message(task)

    # Get existing preferences
    preferences = await context.get_variable(context_id, 'preferences', {})

    # Learn from user input
    if 'python' in user_message.lower():
        preferences['interests'] = preferences.get('interests', [])
        if 'programming' not in preferences['interests']:
            preferences['interests'].append('programming')

    # Store updated preferences
    await context.set_variable(context_id, 'preferences', preferences)

    # Use preferences in response
    if 'programming' in preferences.get('interests', []):
        response = "I see you're interested in programming! Let me help with that."
    else:
        response = "How can I assist you today?"

    return response
"""


@needs_a2a
def test_user_preference_learning(run: Run, configured: dict[str, str]) -> None:
    for messages in (["hello", "I write Python"], ["hello"]):
        out = run(
            IMPORTS, EXTRACT, PREFERENCES, SAYING, f"for text in {messages}: print(say(learning_assistant, text))"
        )
    assert out == "I see you're interested in programming! Let me help with that.\n"


LONG_RUNNING = """
@stateful(storage='valkey')
async def task_manager(task: Task, context, context_id):
    user_message = extract_user_message(task)

    # Get current task state
    current_task = await context.get_variable(context_id, 'current_task', None)

    if user_message.lower().startswith('start task'):
        # Initialize new task
        task_data = {
            'id': str(uuid.uuid4()),
            'steps': ['Step 1', 'Step 2', 'Step 3'],
            'current_step': 0,
            'status': 'in_progress',
            'started_at': datetime.utcnow().isoformat()
        }
        await context.set_variable(context_id, 'current_task', task_data)
        return f"Started new task: {task_data['id']}"

    elif current_task and user_message.lower() == 'next step':
        # Advance task
        current_task['current_step'] += 1
        if current_task['current_step'] >= len(current_task['steps']):
            current_task['status'] = 'completed'
            response = "Task completed!"
        else:
            response = f"Advanced to step {current_task['current_step'] + 1}"

        await context.set_variable(context_id, 'current_task', current_task)
        return response

    else:
        return "Say 'start task' to begin or 'next step' to continue."
"""


@needs_a2a
def test_long_running_task_management(run: Run, configured: dict[str, str]) -> None:
    def say(*texts: str) -> list[str]:
        loop = f"for text in {texts}: print(say(task_manager, text))"
        return run(IMPORTS, EXTRACT, LONG_RUNNING, SAYING, loop).splitlines()

    how = "Say 'start task' to begin or 'next step' to continue."
    begun = say("next step", "Start task", "next step")
    assert begun[0] == how
    assert begun[1].startswith("Started new task: ")
    assert begun[2] == "Advanced to step 2"
    assert say("next step") == ["Advanced to step 3"]
    assert say("next step", "what?") == ["Task completed!", how]


# --- Testing State Management ---------------------------------------------------------------------------------------

UNIT_TESTING = """
import pytest
from src.agent.context import ConversationContext, InMemoryStorage

@pytest.mark.asyncio
async def test_conversation_memory():
    # Use in-memory storage for testing
    storage = InMemoryStorage()
    context = ConversationContext(storage)

    context_id = "test_context"

    # Test basic operations
    await context.set_variable(context_id, "test_key", "test_value")
    value = await context.get_variable(context_id, "test_key")
    assert value == "test_value"

    # Test conversation history
    await context.add_to_history(context_id, "user", "Hello")
    history = await context.get_history(context_id)
    assert len(history) == 1
    assert history[0]["content"] == "Hello"
"""


def test_unit_testing(run: Run) -> None:
    # The mark belongs to a plugin that need not be here: it is what runs coroutines as tests.
    ignored = "import warnings\nwarnings.filterwarnings('ignore', message='Unknown pytest.mark.asyncio')"
    run(ignored, UNIT_TESTING, "import asyncio\nasyncio.run(test_conversation_memory())")


# --- Configuration Issues and Solutions -----------------------------------------------------------------------------

NOT_PERSISTING = """
# ❌ Default handler - no state management
async def ai_assistant(task: Task):
    return "I don't remember conversations"

# ✅ Stateful handler - persistent memory
@stateful(storage='valkey', url='valkey://localhost:6379', key_prefix='agentup:state:', ttl=3600)
async def ai_assistant(task: Task, context, context_id):
    history = await context.get_history(context_id)
    return f"I remember our {len(history)} previous interactions"
"""


@needs_a2a
def test_state_not_persisting(run: Run, server: dict[str, str]) -> None:
    run(
        IMPORTS,
        NOT_PERSISTING,
        """
        import asyncio
        task = Task(id='task-1', context_id='alice')
        assert asyncio.run(ai_assistant(task)) == 'I remember our 0 previous interactions'
        """,
        **server,
    )


def test_import_error(run: Run) -> None:
    run(
        """
        # ✅ Correct import
        from src.agent.context import stateful
        assert callable(stateful)

        # ❌ Wrong - will fail
        for wrong in ("from agent.context import stateful", "from .context import stateful"):
            try:
                exec(wrong)
            except (ImportError, ImportWarning):
                continue
            raise AssertionError(wrong)
        """
    )


# --- Troubleshooting ------------------------------------------------------------------------------------------------

CONFIGURATION_VALIDATION = """
import yaml

def validate_state_config():
    with open('agent_config.yaml', 'r') as f:
        config = yaml.safe_load(f)

    state_cfg = config.get('state', {})
    if not state_cfg:
        print("❌ No state configuration found")
        return False

    backend = state_cfg.get('backend')
    print(f"✅ Backend: {backend}")

    if backend == 'valkey':
        url = state_cfg.get('url')
        prefix = state_cfg.get('key_prefix')
        ttl = state_cfg.get('ttl')

        if not url:
            print("❌ Missing Valkey URL")
            return False
        if not prefix:
            print("❌ Missing key prefix")
            return False

        print(f"✅ Valkey URL: {url}")
        print(f"✅ Key prefix: {prefix}")
        print(f"✅ TTL: {ttl}")

    return True

if __name__ == "__main__":
    validate_state_config()
"""


def test_configuration_validation(run: Run, configured: dict[str, str]) -> None:
    out = run(
        CONFIGURATION_VALIDATION,
        """
        from agentstate import load_config
        config = load_config()
        assert {'url': url, 'key_prefix': prefix, 'ttl': 3600} == config.options()
        """.replace("url,", f"{configured['url']!r},").replace("prefix,", f"{configured['prefix']!r},"),
    )
    assert out.splitlines() == [
        "✅ Backend: valkey",
        f"✅ Valkey URL: {configured['url']}",
        f"✅ Key prefix: {configured['prefix']}",
        "✅ TTL: 3600",
    ]


TEST_STATE_OPERATIONS = """
import asyncio
from src.agent.context import get_context_manager

async def test_state():
    # Load your config
    import yaml
    with open('agent_config.yaml', 'r') as f:
        config = yaml.safe_load(f)

    state_cfg = config['state']
    backend = state_cfg['backend']

    if backend == 'valkey':
        context_manager = get_context_manager(
            'valkey',
            url=state_cfg['url'],
            key_prefix=state_cfg['key_prefix'],
            ttl=state_cfg['ttl']
        )
    else:
        context_manager = get_context_manager(backend)

    # Test basic operations
    test_id = "config_test"
    await context_manager.set_variable(test_id, "test", "success")
    value = await context_manager.get_variable(test_id, "test")

    print(f"State test: {value}")
    await context_manager.clear_context(test_id)

if __name__ == "__main__":
    asyncio.run(test_state())
"""


def test_test_state_operations_on_valkey(run: Run, configured: dict[str, str]) -> None:
    assert run(TEST_STATE_OPERATIONS) == "State test: success\n"


@pytest.mark.parametrize("section", ["{backend: file, storage_dir: ./agent_state}", "{backend: memory}"])
def test_test_state_operations_without_a_server(run: Run, tmp_path: Path, section: str) -> None:
    configure(tmp_path, f"state: {section}")
    assert run(TEST_STATE_OPERATIONS) == "State test: success\n"


DEBUGGING = """
import logging
logging.getLogger('src.agent.context').setLevel(logging.DEBUG)
"""


def test_debugging(run: Run, configured: dict[str, str]) -> None:
    handler = "logging.basicConfig(format='%(name)s %(message)s')"
    printed, *logged = run(DEBUGGING, handler, TEST_STATE_OPERATIONS).splitlines()
    assert printed == "State test: success"
    names = [line.partition(" 'config_test'")[0].split() for line in logged]
    assert [operation for _, operation in names] == ["set_variable", "get_variable", "clear_context"]
    assert {logger for logger, _ in names} <= {"src.agent.context", "agentstate.context"}
