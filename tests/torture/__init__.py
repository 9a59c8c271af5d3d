"""Faults by the thousand, and four figures about what they did.

The claim: under every fault inside the contract, no acknowledged write is lost (L), none is doubled (D), nothing fails
in silence (S), and no call hangs past its deadline plus one second (H). Each scenario is a function
`(random, rounds, figures)`: it makes so many rounds of faults and counts what it sees. The tests beside it run short
ones; `python -m torture` (in this folder's parent; also `tox -e torture`) runs the long ones, and prints the seed.
"""
