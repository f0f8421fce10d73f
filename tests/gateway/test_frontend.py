from __future__ import annotations

from octavo.actors.engine.peers import first_request_id
from octavo.gateway.frontend import FrontEnd
from octavo.messages.base import Message
from octavo.messages.request import SubmitPrompt
from octavo.messages.sampling import SamplingParams


def drawn(first_id: int, *, seed: int = 0, num: int = 50) -> list[int | None]:
    """Seeds of requests that bring none, as one front end draws them."""
    sent: list[Message] = []
    front_end = FrontEnd(sent.append, max_live=num, seed=seed, first_request_id=first_id)
    for _ in range(num):
        front_end.submit("the same prompt", SamplingParams(temperature=1.0), lambda _: None, now_ns=0)
    return [message.params.seed for message in sent if isinstance(message, SubmitPrompt)]


def test_no_two_edges_and_no_restarted_edge_draw_the_same_seeds() -> None:
    edges = [0, *(first_request_id(name, number) for name in ("edge 1", "edge 2") for number in (1, 2))]
    seeds = [seed for first_id in edges for seed in drawn(first_id)]
    assert len(seeds) == len(set(seeds)) == 5 * 50


def test_an_edge_draws_the_same_seeds_again_from_the_same_seed() -> None:
    for first_id in (0, first_request_id("edge 1", 1)):
        assert drawn(first_id) == drawn(first_id)
        assert not set(drawn(first_id)) & set(drawn(first_id, seed=1))
