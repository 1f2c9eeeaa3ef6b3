"""What the tests in containers share."""

import pytest
from support.containers.engine import require_engine
from support.containers.images import build_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, str]:
    """The images of this tree."""
    require_engine()
    own = tmp_path_factory.getbasetemp()
    return build_images(own if worker_id == "master" else own.parent)
