"""What all tests share: fixed seeds, one thread, and the real inputs when they are at hand."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent

# Derandomized: the same commit gives the same verdict on every machine, however slow.
settings.register_profile("metaaug", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("metaaug")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Warm-ups that the tests keep go neither into the user's cache nor out of it."""
    os.environ["METAAUG_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Background jobs start with Ctrl-C ignored, and so would every command that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may still draw from the global generator


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real models and images (``METAAUG_SHARED``, else beside the checkout); skips when absent."""
    folder = Path(os.environ.get("METAAUG_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real inputs in {folder}")
    return folder
