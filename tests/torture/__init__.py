"""Injects thousands of faults, and counts four kinds of wrong results.

What is claimed: under every fault that the contract covers, no acknowledged write is lost (L), none is applied twice
(D), nothing fails silently (S), and no call takes longer than its deadline plus one second (H). Each scenario is a
function `(random, rounds, figures)`, which runs that many rounds of faults and counts what goes wrong. The tests beside
it run short ones; `python -m torture` in the folder `tests` (also `tox -e torture`) runs long ones and prints the seed.
"""
