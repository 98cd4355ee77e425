"""Networks on the Hugging Face Hub, against a stand-in for it: a folder of repositories on this machine."""

import fnmatch
import pathlib
import shutil

import httpx2
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

import nfjax
from nfjax import cli
from nfjax.inference import hub

EXPORTED = next((pathlib.Path(__file__).parent / "exported").rglob("config.json")).parent


def response(status):
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid"))


class StandIn:
    """What of huggingface_hub is used, with its names, arguments and errors.

    Attributes:
        root: Has a folder for each repository, USER/NAME.
        asked: Files that were fetched.
        logged_in: Whether there is a token.
        reached: Whether there is a network.
    """

    def __init__(self, root):
        self.root, self.asked, self.logged_in, self.reached = root, [], True, True

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None):
        if not self.reached:
            raise errors.LocalEntryNotFoundError("not in the cache, and no network")
        if not (self.root / repo_id).is_dir():
            raise errors.RepositoryNotFoundError("404", response=response(404))
        if revision not in (None, "main"):
            raise errors.RevisionNotFoundError("404", response=response(404))
        folder = self.root / "fetched"
        folder.mkdir(exist_ok=True)
        for path in (self.root / repo_id).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                self.asked.append(path.name)
                shutil.copy(path, folder)
        return str(folder)

    def create_repo(self, repo_id, *, exist_ok=False, private=None):
        if not self.reached:
            raise ConnectionError("no network")
        if not self.logged_in:
            raise errors.HfHubHTTPError("401", response=response(401))
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        if private:
            (self.root / repo_id / "PRIVATE").touch()

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        assert commit_message
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


@pytest.fixture
def there(tmp_path, monkeypatch):
    stand_in = StandIn(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    return stand_in


def test_sent_and_fetched_it_is_the_same_network(there, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", f"--model={EXPORTED}", f"--out={out}", "--format=safetensors", "--to-hub=me/ants_and.bees"]
    assert cli.run([*command, "--private"]) == 0
    assert 'sent: nfjax predict --model=hf://me/ants_and.bees, or nfjax.load("hf://' in capsys.readouterr().out
    repository = there.root / "me" / "ants_and.bees"
    assert {path.name for path in repository.iterdir()} == {"config.json", "model.safetensors", "README.md", "PRIVATE"}
    (repository / "setup.py").write_text("raise SystemExit")
    fetched, own = nfjax.load("hf://me/ants_and.bees@main"), nfjax.load(out)
    assert sorted(there.asked) == ["README.md", "config.json", "model.safetensors"]
    assert fetched.class_names == own.class_names
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fetched(image).probabilities, own(image).probabilities)


def test_what_is_not_there_is_told(there, tmp_path):
    with pytest.raises(FileNotFoundError, match="no repository me/nothing on the Hugging Face Hub, or it is private"):
        nfjax.load("hf://me/nothing")
    shutil.copytree(EXPORTED, there.root / "me" / "ants")
    with pytest.raises(FileNotFoundError, match="no revision 'v9' of me/ants"):
        nfjax.load("hf://me/ants@v9")
    with pytest.raises(ValueError, match="holds one network: step=3 is for the workdir of a run"):
        nfjax.load("hf://me/ants", step=3)
    (there.root / "me" / "ants" / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match=r"is no export: its config\.json is of something else"):
        nfjax.load("hf://me/ants")
    for address in ("hf://ants", "hf://me/../ants", "hf://me/ants/more", "hf://"):
        with pytest.raises(ValueError, match="expected a repository of the Hugging Face Hub, USER/NAME"):
            nfjax.load(address)
    there.reached = False
    with pytest.raises(ConnectionError, match="cannot be reached, and the repository is not on this machine"):
        nfjax.load("hf://me/ants")


def test_nothing_is_sent_unasked_or_from_elsewhere(there, tmp_path, capsys):
    command = ["export", f"--model={EXPORTED}", f"--out={tmp_path / 'out'}", "--format=safetensors"]
    assert cli.run([*command, "--private"]) == 2
    assert "--private goes with --to-hub" in capsys.readouterr().err
    assert cli.run([*command, "--to-hub=ants"]) == 1
    assert "ants: expected a repository of the Hugging Face Hub, USER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # said before anything is written
    assert cli.run(command) == 0
    assert not there.root.exists()
    there.logged_in = False
    assert cli.run([*command, "--overwrite", "--to-hub=me/ants"]) == 1
    assert "log in with a token that may write there (hf auth login). The export is in" in capsys.readouterr().err
    there.reached = False
    with pytest.raises(ConnectionError, match="cannot be reached"):
        hub.send(EXPORTED, "me/ants")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no export: nothing is sent"):
        hub.send(tmp_path, "me/ants")
