from __future__ import annotations

from pathlib import Path

import pytest

from octavo.actors.runtime.addresses import (
    TcpSettings,
    address_towards,
    as_called_from,
    endpoint_of,
    is_everywhere,
    split_endpoint,
)
from octavo.actors.runtime.curve import make_keys, write_keys
from octavo.messages.errors import InvalidConfigError


def test_no_two_starts_share_an_endpoint() -> None:
    endpoints = {endpoint_of("/run", name, number) for name in ("engine", "executor 0") for number in (1, 2)}
    assert len(endpoints) == 4


def test_an_endpoint_is_split_into_host_and_port() -> None:
    assert split_endpoint("tcp://10.0.0.1:7000") == ("10.0.0.1", 7000)
    assert split_endpoint("tcp://[fe80::1]:7000") == ("fe80::1", 7000)
    assert split_endpoint("tcp://leader.group.svc:7000") == ("leader.group.svc", 7000)


@pytest.mark.parametrize(
    "wrong", ["10.0.0.1:7000", "ipc:///tmp/x:1", "tcp://:7000", "tcp://a", "tcp://a:x", "tcp://a:70000"]
)
def test_what_is_no_endpoint_is_refused_with_an_example(wrong: str) -> None:
    with pytest.raises(InvalidConfigError, match=r"tcp://10\.0\.0\.1:7000"):
        split_endpoint(wrong)


def test_who_listens_on_every_interface_is_called_by_the_name_that_the_caller_knows() -> None:
    assert as_called_from("tcp://0.0.0.0:41", "tcp://leader:7000") == "tcp://leader:41"
    assert as_called_from("tcp://[::]:41", "tcp://[fe80::1]:7000") == "tcp://[fe80::1]:41"
    assert as_called_from("tcp://10.0.0.1:41", "tcp://leader:7000") == "tcp://10.0.0.1:41"
    assert is_everywhere("*") and not is_everywhere("leader")


def test_this_hosts_address_is_that_of_the_way_to_the_other() -> None:
    assert address_towards("tcp://127.0.0.1:7000") == "127.0.0.1"


def test_keys_are_read_from_their_files_and_stand_in_no_settings(tmp_path: Path) -> None:
    assert TcpSettings(host="127.0.0.1").read_keys() is None
    keys = make_keys()
    write_keys(keys, tmp_path / "keys")
    settings = TcpSettings(host="fe80::1", keys=str(tmp_path / "keys"), allow_list=str(tmp_path / "allowed"))
    read = settings.read_keys()
    assert read is not None and (read.secret, read.allow_list) == (keys.secret, tmp_path / "allowed")
    assert keys.secret not in repr(settings) and settings.endpoint == "tcp://[fe80::1]:0"
