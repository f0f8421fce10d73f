from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from octavo.models import checkpoint
from octavo.models.checkpoint import resolve_checkpoint
from octavo.models.errors import ModelLoadError, ModelNotFoundError, WeightsError

# The errors take any response with headers; which HTTP library makes it is the hub client's affair.
RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=404, url="")


class Hub:
    """Stands in for `snapshot_download`: answers with a folder or raises, and notes how it was called."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.calls: list[dict[str, Any]] = []

    def __call__(self, name: str, **kwargs: Any) -> str:
        self.calls.append({"name": name, **kwargs})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def use_hub(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> Hub:
    hub = Hub(answer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


def test_a_folder_that_exists_never_contacts_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use_hub(monkeypatch, AssertionError("contacted"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("owner/name") == tmp_path / "owner" / "name"
    assert resolve_checkpoint(tmp_path) == tmp_path
    assert hub.calls == []


def test_a_hub_name_is_downloaded_without_pickles_or_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use_hub(monkeypatch, tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert resolve_checkpoint("owner/name", revision="v2") == tmp_path
    (call,) = hub.calls
    assert call["name"] == "owner/name"
    assert call["revision"] == "v2"
    assert call["local_files_only"] is False
    assert "*.safetensors" in call["allow_patterns"]
    assert not {"*.bin", "*.pt", "*.py"} & set(call["allow_patterns"])
    resolve_checkpoint("owner/name", trust_remote_code=True)
    assert "*.py" in hub.calls[1]["allow_patterns"]


def test_a_tokenizer_alone_is_fetched_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use_hub(monkeypatch, tmp_path)
    assert resolve_checkpoint("owner/name", weights=False) == tmp_path
    assert "*.safetensors" not in hub.calls[0]["allow_patterns"]
    assert "*.json" in hub.calls[0]["allow_patterns"]


def test_a_repository_without_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, tmp_path)
    with pytest.raises(WeightsError, match=r"owner/name has no safetensors"):
        resolve_checkpoint("owner/name")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (errors.RepositoryNotFoundError("404", response=RESPONSE), r"no model owner/name.*Check the spelling"),
        (errors.GatedRepoError("403", response=RESPONSE), r"gated: accept its terms.*HF_TOKEN"),
        (errors.RevisionNotFoundError("404", response=RESPONSE), r"no revision 'v2'"),
        (errors.LocalEntryNotFoundError("none"), r"hub cannot be reached"),
        (errors.HfHubHTTPError("500 Server Error", response=RESPONSE), r"cannot download.*500 Server Error"),
        (OSError("No space left on device"), r"cannot download owner/name, revision v2: No space left on device"),
    ],
)
def test_each_failure_of_the_hub_says_what_to_do(
    raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, raised)
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_checkpoint("owner/name", revision="v2")


def test_offline_takes_the_cache_and_says_so_where_it_lacks_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="switched off"):
        resolve_checkpoint("owner/name", offline=True)
    commit = "0" * 40
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "model.safetensors").touch()
    hub = Hub(snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_checkpoint("owner/name", offline=True) == snapshot
    assert hub.calls[0]["local_files_only"] is True
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    resolve_checkpoint("owner/name")
    assert hub.calls[1]["local_files_only"] is True


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere/at/all", "a/b/c", Path("nowhere")])
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(name: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use_hub(monkeypatch, AssertionError("contacted"))
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        resolve_checkpoint(name)
    assert hub.calls == []


def test_malformed_names_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a folder nor a hub name"):
        resolve_checkpoint("what is/this?", offline=True)
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve_checkpoint(tmp_path / "model.bin")


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="leave it out"):
        resolve_checkpoint(tmp_path, revision="main")


def test_no_name_means_the_shipped_model_which_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    with pytest.raises(ModelNotFoundError, match="install octavo again"):
        resolve_checkpoint(None)
    (tmp_path / "leaf-4m").mkdir()
    (tmp_path / "leaf-4m" / "config.json").touch()
    monkeypatch.chdir(tmp_path.parent)
    assert resolve_checkpoint(None) == tmp_path / "leaf-4m"
    assert resolve_checkpoint("leaf-4m") == tmp_path / "leaf-4m"
