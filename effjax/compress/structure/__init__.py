"""Structures that can be taken out of a network, and networks without them.

`layers` takes a network apart and puts it together again; `units` are what a layer can lose (heads, channels,
hidden units, a branch); `cost` says what each of them costs; `scores` what it is worth.
"""
