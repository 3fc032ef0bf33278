"""Creating datasets."""

import pytest

from service.core.errors import Conflict
from service.operations.datasets import create_dataset
from service.store.database import Database


def test_dataset_names_are_unique(database: Database) -> None:
    create_dataset(database, "d")
    with pytest.raises(Conflict):
        create_dataset(database, "d")
