"""Accuracy of truncated experts on a tiny base: the figures of `sigmix export lora`, and the table of a result."""

from __future__ import annotations

from helpers_export import copies_bank

from benchmarks import lora_ranks as bench
from benchmarks.harness import percent

pytest_plugins = ["helpers_cli"]


def test_the_figures_are_those_of_the_export(home, run, monkeypatch, tmp_path):
    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))
    bank, _ = copies_bank(tmp_path, home.base, "one", 30)
    result = bench.run(base=str(home.base), bank=bank, n=30, ranks=(16, 40))
    found = result["raw"]["found"]
    assert set(found) == {"one", "two"}
    for rank in (16, 40):
        done = run(
            "export", "lora", "--mix", "one", "--base", home.base, "--bank", bank.folder, "--out",
            tmp_path / str(rank), "--rank", rank, "--n", "30", "--min-gain", "0", "--no-verify", "--json",
        ).json  # fmt: skip
        (row,) = done["accuracy"]
        own = found["one"]["ranks"][str(rank)]
        assert (own["error"], own["bytes"]) == (done["error"], done["bytes"])
        for kind in ("truncated", "paired", "kept"):
            assert own[kind] == row[kind]
        for kind in ("task", "base", "exact"):
            assert found["one"][kind] == row[kind]
        assert own["kept"] in result["raw"]["ratios_by_repeat"][f"kept_{rank}"]
    assert 0 < found["one"]["ranks"]["16"]["kept"] < found["one"]["ranks"]["40"]["kept"] < 1


def test_the_table():
    figures = {"accuracy": 0.5, "interval": [0.25, 0.75]}
    row = {"truncated": figures, "kept": 0.8, "error": 0.4}
    one = {"base": figures, "exact": {"accuracy": 1.0, "interval": [0.9, 1.0]}, "ranks": {"4": row}}
    other = {**one, "ranks": {"4": {**row, "kept": None, "error": 0.2}}}
    lines = bench.table({"raw": {"ranks": [4], "found": {"one": one, "other": other}}}).splitlines()
    assert lines[0] == "| expert | base | rank 4 | exact |"
    assert lines[2] == "| one | 50.0 [25.0, 75.0] | 50.0 [25.0, 75.0], 80 % kept | 100.0 [90.0, 100.0] |"
    assert lines[3].split(" | ")[2] == percent(figures)
    assert lines[4] == "| of ‖ΔW‖ lost, mean | | 30 % | 0 |"
