"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small models are fastest on one thread, and the last bits then do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real third-party files: TEST_ASSETS, or ../shared/assets. Missing: skip; named but missing: fail."""
    named = os.environ.get("TEST_ASSETS")
    folder = Path(named) if named else ROOT.parent / "shared" / "assets"
    if not (folder / "llama2" / "tokenizer.model").is_file():
        message = f"the test assets (Llama 2's tokenizer, stories260K, ...) are not in {folder}"
        pytest.fail(message) if named else pytest.skip(message)
    return folder
