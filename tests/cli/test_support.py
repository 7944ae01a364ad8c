"""`heedful support`."""

import json

from typer.testing import CliRunner

from heedful.choose import BACKENDS
from heedful.cli import app
from heedful.support import DOORS, asks


def test_tables():
    done = CliRunner().invoke(app, ["support"])
    assert done.exit_code == 0, done.output
    for text in (*BACKENDS, *(row.title for row in asks()), *(door.column for door in DOORS)):
        assert text in done.output


def test_json():
    done = CliRunner().invoke(app, ["support", "--json"])
    cells = json.loads(done.stdout)["cells"]
    assert {cell["backend"] for cell in cells} == set(BACKENDS)
    assert {cell["door"] for cell in cells} == {None, *(door.name for door in DOORS)}
    (cell,) = (c for c in cells if c["door"] == "flash_attn_func" and (c["feature"], c["backend"]) == ("lse", "sdpa"))
    assert (cell["written"], cell["forward"]) == ("`return_attn_probs=True`", False)
    assert cell["reasons"] == ["does not support return_lse"]
