"""What a machine runs before it has bigmachine: modules of the standard library alone, for Python 3.9 and later.

They import nothing of bigmachine, so that each can be sent as one file, or as a part of one.
"""
