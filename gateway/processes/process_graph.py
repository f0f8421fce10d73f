"""The graph of actors over several processes: this one is the edge, engines and executors are its children."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from ...actors.runtime.addresses import EDGE
from ...actors.runtime.process_title import restore_title, set_title
from ...actors.runtime.run_dir import RunDir
from ...actors.runtime.succession import Succession
from ...messages.errors import ExecutorLostError
from ...messages.kv import ResetPrefixCache
from ...messages.processes import ExecutorLoaded
from ...messages.system import Drain
from ..config import EngineConfig, NodesConfig
from ..engine_setup import journal_file, load_tokenizer_of
from ..graph import ModelFacts
from .checkpoint_digest import checkpoint_digest
from .edge_accounts import AccountSum
from .edge_graph import EdgeGraph
from .nodes import Nodes
from .other_edges import OtherEdges
from .replica import Replica
from .supervision import Footing, Supervision

if TYPE_CHECKING:
    from ...actors.tokenizer.hf_tokenizer import HFTokenizer


class ProcessGraph(EdgeGraph):
    """The edge's actors here, the others in processes that are replaced when they die. Made by `ProcessGraph.start`."""

    def __init__(
        self,
        config: EngineConfig,
        folder: str,
        num_edges: int,
        log_format: str,
        *,
        nodes: NodesConfig | None = None,
        digest: str = "",
    ) -> None:
        footing = Footing.of(config, nodes)
        self._run_dir = RunDir()
        self._title_before = set_title(EDGE)
        try:
            self._supervision = Supervision(
                config,
                folder,
                num_edges,
                log_format,
                run_dir=str(self._run_dir.path),
                footing=footing,
                nodes=nodes,
                digest=digest,
                deliver=self._deliver,
                on_change=self._on_change,
                on_give_up=self._on_give_up,
            )
            self._succession: Succession | None = None
            if num_edges > 1:
                self._succession = Succession(self._run_dir.path)
                self._succession.take()
        except BaseException:
            self._run_dir.remove()
            restore_title(self._title_before)
            raise
        links = [replica.link for replica in self._supervision.replicas]
        super().__init__(config, self._supervision.port, links)

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        num_edges: int = 1,
        log_format: str = "auto",
        nodes: NodesConfig | None = None,
    ) -> Self:
        """Start the processes, load the model, and return once a request would be served.

        Raises:
            ModelNotFoundError, UnsupportedModelError, KVCacheTooSmallError: what is wrong and what to change.
            ProcessStartError: the system gives no more processes.
            NodesMissingError: other hosts did not join in time.
        """
        from ...actors.executor.locate import locate_model

        journal_file(config.journal)  # fails now, not when the model is loaded
        folder, name = await asyncio.to_thread(
            locate_model,
            config.model,
            revision=config.revision,
            offline=config.offline,
            trust_remote_code=config.trust_remote_code,
        )
        digest = await asyncio.to_thread(checkpoint_digest, folder) if nodes is not None else ""
        graph = cls(config, str(folder), num_edges, log_format, nodes=nodes, digest=digest)
        tokenizing = asyncio.create_task(asyncio.to_thread(load_tokenizer_of, config, folder))
        try:
            await graph._supervision.start()
            loaded = [await replica.loaded for replica in graph.replicas]
            graph._build_edge(name, str(folder), loaded, await tokenizing)
            for replica in graph.replicas:
                await replica.ready.wait()
            if graph._broken_because:
                raise ExecutorLostError(graph._broken_because)
        except BaseException:
            tokenizing.cancel()
            await graph.close()
            await asyncio.gather(tokenizing, return_exceptions=True)
            raise
        return graph

    def _build_edge(self, name: str, folder: str, loaded: list[ExecutorLoaded], tokenizer: HFTokenizer) -> None:
        facts = ModelFacts(
            name=name,
            folder=folder,
            vocab_size=loaded[0].vocab_size,
            max_model_len=min(one.max_model_len for one in loaded),
            num_blocks=min(one.num_blocks for one in loaded),
            kv_cache_bytes=min(one.kv_cache_bytes for one in loaded),
            dtype=loaded[0].dtype,
            load_seconds=max(one.load_seconds for one in loaded),
            is_deterministic=all(one.is_deterministic for one in loaded),
        )
        capacity = self._add_actors(facts, tokenizer).capacity
        for replica in self.replicas:
            replica.set_up(facts, capacity)

    # ---- what the engine asks ----

    @property
    def others(self) -> OtherEdges | None:
        """The further edges, if there are any."""
        return self._supervision.others

    @property
    def replicas(self) -> list[Replica]:
        """An engine and its executors each."""
        return self._supervision.replicas

    @property
    def nodes(self) -> Nodes | None:
        """Other hosts, if there are any."""
        return self._supervision.nodes

    @property
    def is_broken(self) -> bool:
        return super().is_broken or self._supervision.is_broken

    @property
    def why_not_ready(self) -> str:
        return self._broken_because or self._supervision.why_not_ready

    @property
    def restarts(self) -> Mapping[str, int]:
        return self._supervision.restarts

    @property
    def service_account(self) -> AccountSum | None:
        return self.others.accounts if self.others is not None else None

    @property
    def drops_of_others(self) -> Mapping[str, int]:
        return self._supervision.messages_dropped

    @property
    def num_late_compilations(self) -> int:
        return self._supervision.num_late_compilations

    def send(self, message: Drain | ResetPrefixCache) -> None:
        # Beside other edges draining is this one's own matter, as it is theirs: they may have accepted requests that no
        # engine has heard of yet.
        if self.others is None or isinstance(message, ResetPrefixCache):
            super().send(message)

    async def close(self) -> None:
        self._fleet.close()
        if self._edge is not None:
            await self._edge.close()
        await self._supervision.close()
        if self._succession is not None:
            self._succession.release()
            self._succession = None
        self._run_dir.remove()
        restore_title(self._title_before)

    # ---- what the supervision says ----

    def _on_change(self) -> None:
        """Send new requests to those engines that take them."""
        for index, replica in enumerate(self.replicas):
            self._fleet.set_up(index, is_up=not replica.why_not_ready)

    def _on_give_up(self, index: int, why: str) -> None:
        if not self._fleet.abandon(index):
            self._break(why)
