"""What is said on stderr of a wait: nothing of a short one."""

import contextlib
import io
import time

import pytest
import torch

from kvrewrite.ir import waits
from kvrewrite.ir.waits import told, untold
from tests.support.rewritten import rewritten


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A tenth of a second instead of two."""
    monkeypatch.setattr(waits, "PATIENCE", 0.1)
    monkeypatch.delenv("KVREWRITE_QUIET", raising=False)


def wait(seconds):
    """Waits, and returns what was said."""
    with contextlib.redirect_stderr(io.StringIO()) as said, told("counting sheep"):
        time.sleep(seconds)
    return said.getvalue()


def test_a_short_wait_is_silent():
    """No line."""
    assert wait(0) == ""


def test_a_long_wait_is_named_while_it_lasts_and_timed_after_it():
    """Two lines."""
    lines = wait(0.3).splitlines()
    assert lines[0] == "kvrewrite: counting sheep ..." and lines[1].startswith("kvrewrite: counting sheep: 0.")


def test_an_error_ends_it():
    """The second line is there, and the error goes on."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(ValueError, match="wolf"), told("sheep"):
        time.sleep(0.3)
        raise ValueError("wolf")
    assert len(said.getvalue().splitlines()) == 2


def test_stderr_is_the_one_from_before():
    """torch.export's own is thrown away."""
    both = contextlib.redirect_stderr(io.StringIO())
    with both as said, told("tracing"), contextlib.redirect_stderr(io.StringIO()) as inner:
        time.sleep(0.3)
    assert "tracing ..." in said.getvalue() and inner.getvalue() == ""


def test_quiet(monkeypatch):
    """By the environment, or where a progress bar shows it."""
    with untold():
        assert wait(0.3) == ""
    monkeypatch.setenv("KVREWRITE_QUIET", "1")
    assert wait(0.3) == ""


def test_the_first_pass_of_a_shape_is_told(monkeypatch):
    """Not the ones after it."""
    model = rewritten("llama", "h2o", budget=8)
    slow = type(model)._pass

    def delayed(*args):
        time.sleep(0.3)
        return slow(*args)

    monkeypatch.setattr(type(model), "_pass", delayed)
    model._shapes_run.clear()
    for expected in ("the first pass of 1 x 5 tokens", ""):
        with contextlib.redirect_stderr(io.StringIO()) as said, torch.no_grad():
            model(torch.arange(2, 7)[None])
        assert expected in said.getvalue() and bool(expected) == bool(said.getvalue())


def test_a_long_prompt_says_where_it_is(monkeypatch):
    """Each pass that takes long, by the tokens that are read before it."""
    model = rewritten("llama", "h2o", budget=16, chunk=8)
    slow = type(model)._pass

    def delayed(*args):
        time.sleep(0.3)
        return slow(*args)

    with torch.no_grad():
        model(torch.arange(2, 26)[None])  # every shape has had its first pass
        monkeypatch.setattr(type(model), "_pass", delayed)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            model(torch.arange(2, 26)[None])
    passes = len(said.getvalue().splitlines()) // 2
    assert passes > 1 and f"pass 2 of {passes}: 8 of 24 tokens are read ..." in said.getvalue()
