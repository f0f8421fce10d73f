"""Identifiers. Integers on the wire; a client's own request id lives at the edge alone."""

from typing import NewType

RequestId = NewType("RequestId", int)
"""One sequence being generated; made by the front end, increasing, never reused within a graph."""

StepId = NewType("StepId", int)
"""One forward pass over a batch; increasing by one within an epoch. A new scheduler counts from 0 in a new epoch."""

BlockId = NewType("BlockId", int)
"""Index of a KV block in the executor's cache, `0 <= block_id < num_blocks`."""

Epoch = NewType("Epoch", int)
"""Incarnation of the executor group; a message of an older epoch is counted and dropped."""
