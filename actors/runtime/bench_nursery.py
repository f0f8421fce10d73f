"""How long a process takes to be there: forked by the nursery, and started anew.

Run: `python -m octavo.actors.runtime.bench_nursery [--num-forks 20] [module ...]`
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import time

from .processes import Nursery, ProcessSpec

_PACKAGE = __package__ or ""
_NAME = f"{_PACKAGE}.bench_nursery"  # `__name__` is `__main__` here, and not in the children
_ACTORS = _PACKAGE.rpartition(".")[0]
_MODULES = (f"{_ACTORS}.executor.process", f"{_ACTORS}.engine.process", _NAME)


def tell_time(arguments: bytes) -> int:
    """The child: milliseconds since the time (ns, monotonic) in `arguments`, as an exit code up to 255."""
    return min(255, (time.monotonic_ns() - int(arguments)) // 1_000_000)


def wait(_: bytes) -> None:
    """The child: wait to be killed."""
    signal.pause()


async def measure(modules: tuple[str, ...], num_forks: int) -> None:
    """Print the times of a nursery's start, of forks, and of noticing deaths."""
    nursery = Nursery(modules)
    begin = time.perf_counter()
    await nursery.start()
    print(f"nursery with {', '.join(modules) or 'nothing'} imported: {time.perf_counter() - begin:.2f} s")
    to_code, to_parent, to_notice = [], [], []
    for number in range(num_forks):
        begin_ns = time.monotonic_ns()
        spec = ProcessSpec(
            title=f"bench {number}", target=f"{_NAME}:tell_time", arguments=str(time.monotonic_ns()).encode()
        )
        child = await nursery.spawn(spec)
        to_parent.append((time.monotonic_ns() - begin_ns) / 1e6)
        ended = await child.wait()
        assert ended.status is not None, ended
        to_code.append(ended.status)
        waiting = await nursery.spawn(ProcessSpec(title=f"bench {number}", target=f"{_NAME}:wait"))
        begin_ns = time.monotonic_ns()
        waiting.kill()
        await waiting.wait()
        to_notice.append((time.monotonic_ns() - begin_ns) / 1e6)
    await nursery.close()
    for name, times in (
        ("request to the child's first line", to_code),
        ("request to its pid and pidfd at the parent", to_parent),
        ("SIGKILL to exit noticed, with its status", to_notice),
    ):
        print(f"{name}: median {statistics.median(times):.0f} ms, worst {max(times):.0f} ms of {num_forks}")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=_MODULES, help="imported by the nursery")
    parser.add_argument("--num-forks", type=int, default=20)
    options = parser.parse_args()
    asyncio.run(measure(tuple(options.modules), options.num_forks))


if __name__ == "__main__":
    main()
