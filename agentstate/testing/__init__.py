"""The contract of a storage, as tests: whoever writes a backend subclasses `StorageContract` and runs pytest.

    import pytest

    from agentstate.testing import StorageContract


    class TestMyStorage(StorageContract):
        @pytest.fixture(autouse=True)
        def empty_store(self, tmp_path):
            self.path = tmp_path / "conversations.db"

        def make_storage(self, **options):
            return MyStorage(self.path, **options)

Every test runs through both contexts, the blocking and the awaitable one. Needs pytest and nothing else.
"""

from __future__ import annotations

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
            "lifetime",
            "owners",
            "statistics",
            "turns",
            "values",
            "variables",
        )
    )
)

from .contract import StorageContract  # noqa: E402

__all__ = ["StorageContract"]
