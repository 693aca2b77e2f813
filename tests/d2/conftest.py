"""Leaves Detectron2's catalogs as they were before a test."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def known_data_sets():
    """The names in both catalogs before anything was registered."""
    data = pytest.importorskip("detectron2.data", reason="Detectron2 is not installed")
    return [(catalog, set(catalog.keys())) for catalog in (data.DatasetCatalog, data.MetadataCatalog)]


@pytest.fixture(autouse=True)
def catalogs(known_data_sets):
    from dino.d2.data_loading import load_dataset

    yield
    load_dataset.cache_clear()
    for catalog, known in known_data_sets:
        for name in set(catalog.keys()) - known:
            catalog.pop(name)
