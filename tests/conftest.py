"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small models are fastest on one thread, and the last bits then do not depend on the machine.
    """
    torch.set_num_threads(1)


STAGES_RUN_OFTEN = ("test_chain", "test_gatt", "test_ppo", "test_rejection_sampling")


@pytest.fixture(autouse=True)
def one_temperature(request, monkeypatch):
    """Where stages are killed and run again many times, their closing look at dev prompts is at
    temperature 1 alone.

    Answers of tiny models hardly ever end, so that each look takes seconds; `test_evaluate_on_dev`
    tests all three.
    """
    if request.module.__name__.split(".")[-1] in STAGES_RUN_OFTEN:
        monkeypatch.setattr("eval.TEMPERATURES", (1.0,))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real third-party files: TEST_ASSETS, or ../shared/assets. Missing: skip; named
    but missing: fail.
    """
    named = os.environ.get("TEST_ASSETS")
    folder = Path(named) if named else ROOT.parent / "shared" / "assets"
    if not (folder / "llama2" / "tokenizer.model").is_file():
        message = f"the test assets (Llama 2's tokenizer, stories260K, ...) are not in {folder}"
        pytest.fail(message) if named else pytest.skip(message)
    return folder
