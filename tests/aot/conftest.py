"""`pytest tests/aot --triton VERSION`: fail, rather than test another Triton than was meant."""

from __future__ import annotations

import pytest
import triton


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--triton", metavar="VERSION", help="the version that PYTHONPATH should have put first")


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("--triton")
    if wanted not in (None, triton.__version__):
        raise pytest.UsageError(f"Triton is {triton.__version__}, from {triton.__file__}: put {wanted} on PYTHONPATH")


def pytest_report_header() -> str:
    return f"Triton {triton.__version__}"
