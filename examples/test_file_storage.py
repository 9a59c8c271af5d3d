"""Test file storage in a temporary directory: python examples/test_file_storage.py"""

from __future__ import annotations

import functools
import sys
import tempfile

from storage_checks import run

from agentstate import FileStorage

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        sys.exit(run("File", functools.partial(FileStorage, directory), persistent=True))
