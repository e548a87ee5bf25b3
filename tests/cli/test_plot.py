"""`rope-scaling plot map` draws what `relative_positions` says, and refuses what has no map."""

import pytest

from rope_scaling.cli.main import main


def run(*words):
    with pytest.raises(SystemExit) as done:
        main(["plot", "map", *words])
    return done.value.code


@pytest.mark.parametrize("method", ["self_extend:group_size=4", "angle_clip", "streaming:window=9", "dynamic_ntk"])
def test_pictures(method, tmp_path, capsys):
    path = tmp_path / "map.png"
    assert run("--method", method, "--length", "40", "--output", str(path)) == 0
    assert path.stat().st_size > 5000 and capsys.readouterr().out.strip() == str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "yarn:factor=4"], "'yarn' is not a span method"),
        (["--method", "rerope+log_n"], "names several methods"),
        (["--method", "rerop"], "Unknown method 'rerop'"),
        (["--method", "rerope", "--output", "nowhere/map.png"], "There is no folder 'nowhere'"),
        (["--method", "rerope", "--length", "1"], "--length"),
    ],
)
def test_bad_input(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
