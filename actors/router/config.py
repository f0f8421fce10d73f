"""Configuration of the router."""

from __future__ import annotations

from typing import Literal

import msgspec

RoutingPolicy = Literal["round_robin", "least_loaded", "prefix_aware"]
POLICIES: tuple[RoutingPolicy, ...] = ("round_robin", "least_loaded", "prefix_aware")


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How requests are spread over replicas.

    Attributes:
        num_replicas: engines behind the router, numbered from 0.
        policy: `round_robin`: one after the other. `least_loaded`: fewest requests routed and not ended.
            `prefix_aware`: least work to do first, where a prompt's beginning that a replica has seen is no work.
        chunk_tokens: prefixes are remembered in chunks of so many tokens.
        max_chunks: chunks remembered; the least recently used are forgotten. See `chunks_worth_remembering`.
        request_tokens: what an open request counts for beside its prompt, in prompt tokens.
    """

    num_replicas: int
    policy: RoutingPolicy = "least_loaded"
    chunk_tokens: int = 256
    max_chunks: int = 1 << 20
    request_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("num_replicas", "chunk_tokens", "max_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.request_tokens < 0:
            raise ValueError(f"request_tokens={self.request_tokens} must not be negative")
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r} must be one of {', '.join(POLICIES)}")


def chunks_worth_remembering(*, num_replicas: int, num_cached_tokens: int, chunk_tokens: int) -> int:
    """How many chunks to remember of replicas whose KV caches hold so many tokens each.

    Twice as many as there is room for: what is counted here is what was sent, and what is evicted is not known.
    """
    return max(1, 2 * num_replicas * num_cached_tokens // chunk_tokens)
