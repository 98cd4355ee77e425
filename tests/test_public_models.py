"""The table of public models; the models themselves where their packages are there."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from benchmarks import runner
from benchmarks.public_models import __main__ as command
from benchmarks.public_models import networks, tables


def side(forward=(1.0, 2.0, 4.0), backward=(3.0, 1.0, 3.0), **more):
    ways = [dict(zip(("first", "last", "worst"), way, strict=True)) for way in (forward, backward)]
    kernels = {"number": 5, "smallest": 0.5, "largest": 2.0}
    found = {"blocks": 4, "forward": ways[0], "backward": ways[1], "share": 0.25, "kernels": kernels, "seconds": 1.5}
    return found | more


RECORD = {
    "model": "A net",
    "repository": "someone/net",
    "class": "Net",
    "api": "Linen",
    "parameters": 12_345,
    "blocks": {"classes": {"Block": 4}},
    "sides": {
        "as it is": side(seconds=0.0),
        "lsuv": side(notes={"what it returns does not vary": 2}, others=[f"w{i}" for i in range(5)]),
        "balance": side((1.0, 1.0, float("inf"))),
        "AnyInit": {"error": "ValueError: duplicate\n  node"},
    },
}


def test_a_record_in_the_tables():
    lines = tables.table([RECORD]).splitlines()
    overview = next(line for line in lines if line.startswith("| A net | someone/net"))
    assert overview == ("| A net | someone/net | Linen | 12 k | 4 `Block` | 4 / 4 / ∞ / – / × | 3 / 3 / 3 / – / × |")
    lsuv = next(line for line in lines if "| `lsuv` |" in line)
    assert "| 1 → 2 | 3 → 1 | 0.25 | 0.5 to 2 | 1.5 |" in lsuv
    assert lsuv.endswith("2 × what it returns does not vary; left: `w0`, `w1`, `w2` and 2 more |")
    assert "- **A net**, AnyInit: ValueError: duplicate node" in lines


def test_what_is_refused_and_what_fails_stand_word_by_word():
    refused = RECORD | {"blocks": {"classes": {"Cell": 2}, "refusal": 'choose where="Cell"', "where": ["Cell"]}}
    text = tables.table([refused, {"model": "B", "repository": "b/b", "error": "not done in 600 seconds"}])
    assert '- **A net**: choose where="Cell"' in text
    assert "| 4 `Cell` by where= |" in text
    assert "- **B**: not done in 600 seconds" in text
    assert tables.in_short({"error": "gone"}) == "gone"


def test_the_committed_table_is_that_of_the_committed_records():
    results = pathlib.Path(__file__).parents[1] / "results"
    records = runner.read(results / "public_models.jsonl")
    assert (results / "public_models.md").read_text() == tables.table(records)
    assert len([record for record in records if "sides" in record]) >= 15
    assert len({record["repository"] for record in records}) >= 5
    assert {record["api"] for record in records} == {"Linen", "NNX"}


def test_models_that_are_not_there_are_left_out_with_the_reason(monkeypatch, tmp_path, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'of_nobody'")

    monkeypatch.setitem(networks.NETWORKS, "of nobody", networks.Network("no/body", "of-nobody", missing))
    found = command.measure("of nobody")
    assert found == {"missing": "of-nobody: No module named 'of_nobody'"}
    monkeypatch.setattr(command, "in_a_process", lambda name, seconds: found)
    command.main([f"--out={tmp_path}", "--only=of nobody"])
    assert "of nobody: left out, of-nobody: No module named 'of_nobody'" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_records_are_kept_and_only_what_is_missing_is_measured(monkeypatch, tmp_path, capsys):
    asked = []

    def measure(name, seconds):
        asked.append(name)
        return RECORD | {"model": name}

    monkeypatch.setattr(command, "in_a_process", measure)
    command.main([f"--out={tmp_path}", "--only=Mamba-2,nanodl ViT"])
    command.main([f"--out={tmp_path}", "--only=Mamba-2,NanoMoE", "--missing"])
    assert asked == ["Mamba-2", "nanodl ViT", "NanoMoE"]
    records = [json.loads(line) for line in (tmp_path / "public_models.jsonl").read_text().splitlines()]
    assert [record["model"] for record in records] == ["nanodl ViT", "NanoMoE", "Mamba-2"]  # in the order of the list
    assert "| Mamba-2 |" in (tmp_path / "public_models.md").read_text()
    assert "4 `Block`; variances forward/backward, largest over smallest: as it is 4/3" in capsys.readouterr().out


def test_the_list_names_every_model_with_its_package(capsys):
    command.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(networks.NETWORKS) >= 15
    assert "Mamba-2  (mamba2-jax, jax-state-spaces/mamba2-jax)" in lines
    assert len({network.repository for network in networks.NETWORKS.values()}) >= 5


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(4)(nn.relu(nn.Dense(8)(x)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(Block()(Block()(x)))


def test_blocks_are_told_without_measuring(monkeypatch, capsys):
    made = networks.Example(Net(), (jnp.ones((3, 4)),))
    monkeypatch.setitem(networks.NETWORKS, "a net", networks.Network("here/net", "net", lambda: made))
    plain = networks.Example(nn.Sequential([nn.Dense(4), nn.Dense(4)]), (jnp.ones((3, 4)),))
    monkeypatch.setitem(networks.NETWORKS, "a chain", networks.Network("here/net", "net", lambda: plain))
    command.main(["--blocks", "--only=a net,a chain"])
    net, chain = capsys.readouterr().out.splitlines()
    assert net == "a net: Block (2)"
    assert chain.startswith("a chain: Dense (2), since cannot tell what the blocks of this model are")


def test_a_small_model_is_measured_on_all_sides(monkeypatch):
    made = networks.Example(Net(), (jax.random.normal(jax.random.key(0), (32, 4)),))
    monkeypatch.setitem(networks.NETWORKS, "a net", networks.Network("here/net", "nfjax", lambda: made))
    record = command.measure("a net")
    assert (record["blocks"], record["api"], record["parameters"]) == ({"classes": {"Block": 2}}, "Linen", 2 * 76 + 10)
    assert list(record["sides"]) == list(tables.SIDES)
    kernels = record["sides"]["lsuv"]["kernels"]
    assert [kernels["smallest"], kernels["largest"]] == pytest.approx([1, 1], rel=0.011)
    start, balance = record["sides"]["as it is"], record["sides"]["balance"]
    assert balance["forward"]["worst"] < start["forward"]["worst"]
    assert tables.table([record])


def test_flaxs_examples_need_a_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(networks.EXAMPLES, raising=False)
    with pytest.raises(ImportError, match="--flax-examples=DIR"):
        networks.flax_vae()
    monkeypatch.setenv(networks.EXAMPLES, str(tmp_path))
    with pytest.raises(ImportError, match="there is no"):
        networks.flax_vae()


@pytest.mark.skipif(importlib.util.find_spec("mamba2_jax") is None, reason="mamba2-jax is not installed")
def test_a_model_that_is_there_is_measured():
    pytest.importorskip("anyinit")
    record = command.measure("Mamba-2")
    assert record["blocks"] == {"classes": {"Mamba2Block": 4}}
    assert record["sides"]["balance"]["forward"]["worst"] < record["sides"]["as it is"]["forward"]["worst"]
