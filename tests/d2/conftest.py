"""Leaves Detectron2's catalogs as they were before a test."""

import pytest


@pytest.fixture(autouse=True)
def catalogs():
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from dino.d2.data import dataset

    known = [set(catalog.keys()) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    dataset.cache_clear()
    for catalog, before in zip((DatasetCatalog, MetadataCatalog), known, strict=True):
        for name in set(catalog.keys()) - before:
            catalog.pop(name)
