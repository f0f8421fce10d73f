from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from octavo.actors.runtime.curve import make_keys
from octavo.gateway.flag_parser import Parser
from octavo.gateway.node_flags import add_node_flags
from octavo.gateway.node_settings import node_settings
from octavo.gateway.ray_nodes import _node_command, _num_gpus

FLAGS = ["--join=tcp://10.0.0.1:7000", "--keys=keys", f"--server-key={make_keys().public}", "--slots=2", "--offline"]


def test_each_node_is_started_with_the_flags_that_were_given_once() -> None:
    parser = Parser()
    add_node_flags(parser)
    arguments = parser.parse_args([*FLAGS, "--model=here", "--log-format=json"])
    again = parser.parse_args([*_node_command(arguments), "--name=ray.0"])
    arguments.name = "ray.0"
    assert node_settings(again) == node_settings(arguments)


def test_without_ray_the_command_says_how_to_get_it() -> None:
    hide = "import sys; sys.modules['ray'] = None; from octavo.gateway.ray_nodes import main; main()"
    command = [sys.executable, "-c", hide, "--num-nodes=1", *FLAGS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2 and "pip install 'octavo[ray]'" in ended.stderr


@pytest.mark.parametrize(
    ("asked", "slots", "num_there", "expected"),
    [(None, None, 8, 1), (None, 4, 8, 4), (None, 4, 0, 0), (0, 4, 8, 0), (2, None, 8, 2), (2, None, 0, 2)],
)
def test_ray_hides_no_gpu_from_a_node_that_its_executors_need(
    asked: int | None, slots: int | None, num_there: int, expected: int
) -> None:
    cluster = {"CPU": 8.0, "GPU": float(num_there)} if num_there else {"CPU": 8.0}
    assert _num_gpus(argparse.Namespace(num_gpus=asked, slots=slots), cluster) == expected
