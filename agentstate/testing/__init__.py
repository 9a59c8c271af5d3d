"""The contract of a storage as tests: to test a backend, subclass `StorageContract` and run pytest.

    import pytest

    from agentstate.testing import StorageContract


    class TestMyStorage(StorageContract):
        @pytest.fixture(autouse=True)
        def empty_store(self, tmp_path):
            self.path = tmp_path / "conversations.db"

        def make_storage(self, **options):
            return MyStorage(self.path, **options)

Every test runs with both contexts, the blocking and the awaitable one. It requires only pytest.
`agentstate.testing.faults` does not require it, so the contract is imported on first use.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contract import StorageContract as StorageContract

__all__ = ["StorageContract"]

# pytest rewrites the assertions only of modules that are registered before their import.
if "pytest" in sys.modules:
    import pytest

    pytest.register_assert_rewrite(
        *(
            f"{__name__}.{module}"
            for module in (
                "commits",
                "concurrency",
                "contexts",
                "harness",
                "history",
                "identifiers",
                "kills",
                "lifetime",
                "owners",
                "statistics",
                "turns",
                "values",
                "variables",
            )
        )
    )


def __getattr__(name: str) -> Any:
    if name != "StorageContract":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .contract import StorageContract

    return StorageContract
