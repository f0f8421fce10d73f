"""What is read about processors, from trees of files such as Linux has."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from octavo.actors.executor.cpu_topology import Cpu, cpu_quota, foreign_load, parse_cpu_list, read_cpus


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), ("7,2-3\n", (7, 2, 3))])
def test_a_list_of_cores_is_read(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1-2-3", "1,1", "0-2,2"])
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="core"):
        parse_cpu_list(text)


def test_hyperthreads_share_a_core_and_packages_have_their_nodes(tmp_path: Path) -> None:
    for cpu, (package, core) in {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (0, 0)}.items():
        folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    for node, cpus in {0: "0-1,3", 1: "2"}.items():
        (tmp_path / "node" / f"node{node}").mkdir(parents=True)
        (tmp_path / "node" / f"node{node}" / "cpulist").write_text(f"{cpus}\n")
    assert read_cpus({0, 2, 3}, tmp_path) == (Cpu(0, (0, 0), 0), Cpu(2, (1, 0), 1), Cpu(3, (0, 0), 0))


def test_where_the_system_says_nothing_each_processor_is_a_core_of_one_node(tmp_path: Path) -> None:
    assert read_cpus({0, 5}, tmp_path) == (Cpu(0, (-1, 0), 0), Cpu(5, (-1, 5), 0))


def test_the_tightest_quota_above_a_process_counts(tmp_path: Path) -> None:
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    process = tmp_path / "cgroup"
    process.write_text("0::/a/b\n")
    assert cpu_quota(tmp_path, process) == math.inf
    (group / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("250000 100000\n")
    assert cpu_quota(tmp_path, process) == 2.5
    (group / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path, process) == 1.5


def test_quotas_of_the_first_version_of_control_groups_count_too(tmp_path: Path) -> None:
    group = tmp_path / "cpu,cpuacct" / "box"
    group.mkdir(parents=True)
    process = tmp_path / "cgroup"
    process.write_text("4:memory:/x\n3:cpu,cpuacct:/box\n")
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path, process) == math.inf
    (group / "cpu.cfs_quota_us").write_text("400000\n")
    assert cpu_quota(tmp_path, process) == 4.0


def test_a_machine_that_stands_still_is_not_busy(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 0 5 1000 3 0 0 0 0 0\ncpu1 7 0 0 10 0 0 0 0 0 0\n")
    assert foreign_load((Cpu(0, (0, 0), 0),), 0.0001, stat) == 0.0
