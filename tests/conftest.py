"""Loaded by pytest before any test: the settings that must stand before torch is imported, and a cache of the tests' own."""

from collections.abc import Iterator

import pytest

from lifealign.environment import prepare_process

prepare_process()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of a file share a cache of reference log-probabilities, and never the user's; commands inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIFEALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
