"""Seeing inside: what the driver asks of all processes of a session's machines, and how it puts the answers together."""
