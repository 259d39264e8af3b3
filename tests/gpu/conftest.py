"""What only a GPU can show. `make test-gpu` runs these; they never skip where it runs them."""

import pytest
from comparison import DEVICE


@pytest.fixture(autouse=True)
def gpu():
    if DEVICE != "cuda":
        pytest.skip("needs a GPU: make test-gpu")
