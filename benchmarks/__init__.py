"""The cost of agentstate, compared with the same work done without it and with other libraries.

- `python -m benchmarks` measures; `--help` lists the options.
- `python -m benchmarks.compare OLD_TREE NEW_TREE` measures two versions of agentstate against each other.
- `NOTES.md` is the lab book: where the time goes, and what was tried.
"""
