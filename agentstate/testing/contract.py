"""The contract of every storage, in one class."""

from __future__ import annotations

from .commits import CommitTests
from .concurrency import ConcurrencyTests
from .contexts import ContextTests
from .history import HistoryTests
from .identifiers import IdentifierTests
from .lifetime import LifetimeTests
from .owners import OwnerTests
from .statistics import StatisticsTests
from .turns import TurnTests
from .values import ValueTests
from .variables import VariableTests


class StorageContract(
    ContextTests,
    HistoryTests,
    VariableTests,
    ValueTests,
    IdentifierTests,
    CommitTests,
    TurnTests,
    OwnerTests,
    LifetimeTests,
    ConcurrencyTests,
    StatisticsTests,
):
    """Tests of the whole contract, with both contexts. Subclass it, implement `make_storage`, and run pytest."""
