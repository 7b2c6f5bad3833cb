"""Hands the cases of a run to pytest; `pytest benchmarks` by itself runs them all."""

import pytest

from .run import Session, parser

chosen: Session | None = None  # set by `python -m fmkernels bench`


def pytest_generate_tests(metafunc):
    global chosen
    if "case" in metafunc.fixturenames:
        chosen = chosen or Session(parser(None).parse_args([]))
        metafunc.parametrize("case", chosen.cases, ids=str)


@pytest.fixture
def session() -> Session:
    return chosen
