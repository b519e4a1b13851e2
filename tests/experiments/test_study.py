"""Studies in the shared runner: a long one keeps what it finished, its steps move the bar, its settings can be set."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from experiments.claims import Claim
from experiments.experiment import Experiment, Preset, Study
from experiments.run import plan_table, run, select

NAME = "fake_package.studied"
PIECES = ("a", "b", "c")


class Pieces:
    """Three pieces of ten steps, each a file; `stop_after` pieces made in one call it is interrupted."""

    def __init__(self):
        self.made, self.stop_after, self.refused = [], None, None

    def study(self, scale=1.0):
        def work(seed, out, progress):
            for i, piece in enumerate(PIECES):
                if not (out / piece).exists():
                    if self.stop_after == len(self.made):
                        raise KeyboardInterrupt("stopped; the pieces before are kept")
                    (out / piece).write_text("made")
                    self.made.append((piece, seed))
                progress(10 * (i + 1), f"piece {piece}")
            return {"score": scale * (seed + 1)}, {"curve": [scale]}

        def check():
            if self.refused:
                raise ValueError(self.refused)

        return Study(work, {"scale": scale}, 30, check, lambda: {"parameters": 1234},
                     lambda settings: self.study(float(settings[0].removeprefix("scale="))))  # fmt: skip


@pytest.fixture
def pieces(monkeypatch):
    held, module = Pieces(), ModuleType(NAME)
    claim = Claim("a score", "score", "long", None, "value", "higher", 1.0, "none")
    plain = Study(lambda seed, out, progress: ({"score": 0.0}, {}), {})
    preset = lambda: Preset({"long": held.study(), "plain": plain}, 2, (claim,))  # noqa: E731
    draw = lambda content, path: path.write_text("drawn")  # noqa: E731
    module.EXPERIMENT = Experiment("studied", "A study", "none", {"smoke": preset}, draw)
    monkeypatch.setitem(sys.modules, "fake_package", ModuleType("fake_package"))
    monkeypatch.setitem(sys.modules, NAME, module)
    held.preset = preset
    return held


def quiet(out, **more):
    return run(NAME, "smoke", out, console=Console(quiet=True), **more)


def test_interrupted_in_the_middle_it_goes_on_with_the_next_piece(pieces, tmp_path):
    pieces.stop_after = 2
    with pytest.raises(KeyboardInterrupt, match="kept"):
        quiet(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/runs/long-seed0").iterdir()) == ["a", "b"]
    pieces.stop_after = None
    content = quiet(tmp_path / "out")
    assert pieces.made == [(piece, seed) for seed in (0, 1) for piece in PIECES]
    assert content["arms"]["long"]["score"]["values"] == [1.0, 2.0]
    assert content["series"]["long"] == [{"curve": [1.0]}] * 2
    quiet(tmp_path / "out")  # finished: nothing is asked again
    assert len(pieces.made) == 6


def test_its_steps_are_the_bars(pieces, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.progress.QUIET_SECONDS", 0.0)
    quiet(tmp_path / "out")
    lines = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines() if "piece" in line]
    shares = [10, 20, 30, 41, 51, 61]  # of 30 + 1 steps at two seeds; what follows a study's last step repeats it
    named = [f"studied long seed {seed} piece {piece}" for seed in (0, 1) for piece in PIECES]
    assert lines == [f"{name}: {100 * share / 62:.0f}%" for name, share in zip(named, shares, strict=True)]


def test_its_settings_are_set_and_kept_apart(pieces, tmp_path):
    content = quiet(tmp_path / "out", arms=("long",), settings=("scale=3",))
    assert content["arms"]["long"]["score"]["values"] == [3.0, 6.0]
    assert content["provenance"]["config"]["long"] == {"scale": 3.0}
    with pytest.raises(ValueError, match=r"long.scale: 3.0 there, 1.0 asked for"):
        quiet(tmp_path / "out", arms=("long",))
    with pytest.raises(ValueError, match=r"--set = .*, not plain"):
        select(pieces.preset(), (), ["scale=3"], None)


def test_what_it_lacks_is_said_before_anything_is_written(pieces, tmp_path):
    pieces.refused = "model = 'x': expected a folder"
    with pytest.raises(ValueError, match="expected a folder"):
        quiet(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dry_run_shows_what_it_counts(pieces):
    console = Console(record=True, width=100)
    console.print(plan_table(pieces.preset().arms))
    text = console.export_text()
    assert "1,234" in text
    assert "plain" not in text
    with pytest.raises(ValueError, match="--dry-run"):
        plan_table({"plain": pieces.preset().arms["plain"]})


def test_the_settings_of_result_json_are_the_studys(pieces, tmp_path):
    quiet(tmp_path / "out")
    held = json.loads(Path(tmp_path / "out/result.json").read_text())
    assert held["provenance"]["config"] == {"long": {"scale": 1.0}, "plain": {}}
