"""With this folder on PYTHONPATH, libvalkey is as good as not installed: replies are read by the parser in Python."""

raise ModuleNotFoundError("libvalkey is hidden from these tests (tests/parts.py)", name="libvalkey")
