"""Test Valkey storage: python examples/test_valkey_storage.py --url valkey://localhost:6379

Needs a server. All keys begin with a random prefix. The conversations are deleted at the end.
"""

from __future__ import annotations

import argparse
import functools
import sys
import uuid

from storage_checks import run

from agentstate import StateError, SyncConversationContext, ValkeyStorage

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Test Valkey storage on a server.")
    parser.add_argument("--url", default="valkey://localhost:6379", help="default: valkey://localhost:6379")
    args = parser.parse_args()
    open_storage = functools.partial(ValkeyStorage, args.url, key_prefix=f"agentstate-check-{uuid.uuid4().hex}:")
    try:
        with SyncConversationContext(open_storage()) as context:
            context.exists("c")
    except StateError as error:
        sys.exit(f"error: {error}")
    sys.exit(run("Valkey", open_storage, persistent=True))
