"""What the scripts' headers and the README print runs as printed: commands, and the table of the paper's rows (--plan)."""

import re
import shlex

import pytest
from conftest import ROOT

import avion
import common
import sfa_vivit
import tpt_mae
import turbo

SCRIPTS = {"turbo.py": turbo, "avion.py": avion, "tpt_mae.py": tpt_mae, "sfa_vivit.py": sfa_vivit}


def rows(script):
    """[(row of the paper, flags)] of a header's table. A line without a row goes on with the flags of the one above."""
    start = "    row of the paper "
    head, *lines = (start + SCRIPTS[script].__doc__.split(start)[1].split("\n\n")[0]).splitlines()
    column = head.index("flags")
    found = []
    for line in lines:
        name, flags = line[:column].strip(), line[column:].strip()
        if name:
            found.append((name, flags))
        else:
            found[-1] = found[-1][0], f"{found[-1][1]} {flags}"
    return found


def commands(script):
    """The flags of each command, in the header and in the README, that starts the script."""
    found = []
    for text in (SCRIPTS[script].__doc__, (ROOT / "README.md").read_text()):
        for line in text.replace("\\\n", " ").splitlines():
            start = re.match(
                rf" *(python|torchrun( --\S+)*) {re.escape(script)}(?P<flags> .*|)$",
                line.split(" #")[0],
            )
            if start:
                found.append(start["flags"].strip())
    return found


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path):
    """What a script prints with flags and --plan, in this process; what takes long is not counted, and encoders have two
    layers. Without a GPU and in an empty folder, which stays empty."""

    def no_gpu():
        raise AssertionError("--plan looks for a GPU")

    monkeypatch.setattr(common.torch.cuda, "is_available", no_gpu)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "count_macs", lambda *args: 1.0)
    monkeypatch.setattr(common, "block_bytes", lambda *args, **kwargs: 2**20)
    monkeypatch.setattr(common, "saved_bytes", lambda *args: 2**20)
    monkeypatch.setattr(turbo, "count_gmacs", lambda *args: (1.0, 1.0))
    monkeypatch.setattr(sfa_vivit, "count_gmacs", lambda *args: 1000.0)
    for module in SCRIPTS.values():
        shallow = {name: spec | {"depth": 2} for name, spec in module.MODELS.items()}
        monkeypatch.setattr(module, "MODELS", shallow)

    def run(script, flags):
        module = SCRIPTS[script]
        module.main(common.parse(module.Config, module.RECIPES, [*shlex.split(flags), "--plan"]))
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_of_the_paper_plan(script, plan):
    found = rows(script)
    assert len(found) >= 8 and len({flags for _, flags in found}) == len(found)
    for name, flags in found:
        assert re.match("Table|Fig|Sec|App", name), name
        out = plan(script, flags)
        assert "memory  " in out and "loader  " in out, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_plan(script, plan):
    """No flag is missing, none is refused, and no file is opened."""
    found = [flags for flags in commands(script) if flags != "--help"]
    assert len(found) >= 2 and "" in found
    for flags in found:
        assert "memory  " in plan(script, flags), flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_and_commands_say_what_they_start_from(script):
    """--plan asks for no weights, but training does: what trains as printed has its --init."""
    module = SCRIPTS[script]
    for flags in [flags for _, flags in rows(script)] + commands(script):
        if flags != "--help":
            module.check(common.parse(module.Config, module.RECIPES, shlex.split(flags)))
