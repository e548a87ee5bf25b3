"""The command line, called in this process."""

from types import SimpleNamespace

import pytest

from rope_scaling.cli.main import main


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command as a shell would, short of starting a process; gives status and output."""

    def call(*arguments, cwd=None):
        if cwd is not None:
            monkeypatch.chdir(cwd)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=stopped.value.code or 0, stdout=printed.out, stderr=printed.err)

    monkeypatch.setenv("COLUMNS", "100")
    return call
