"""Every recipe that is committed can be resolved, and one says what is wrong with it."""

import importlib
import pkgutil

import pytest
from ml_collections import ConfigDict

import configs.compress
from effjax.compress.recipe import read
from effjax.errors import UsageError

RECIPES = [
    (module.name, variant)
    for module in pkgutil.iter_modules(configs.compress.__path__)
    for variant in getattr(importlib.import_module(f"configs.compress.{module.name}"), "VARIANTS", (None,))
]


@pytest.mark.parametrize(("name", "variant"), RECIPES)
def test_every_recipe_is_one(name, variant):
    get_config = importlib.import_module(f"configs.compress.{name}").get_config
    assert read(get_config() if variant is None else get_config(variant)).steps


def test_what_is_wrong_with_a_recipe_is_named():
    with pytest.raises(UsageError, match=r"recipe.steps\[0\].kind is 'ruond'"):
        read(ConfigDict(dict(steps=(dict(kind="ruond"),))))
    with pytest.raises(UsageError, match="at least one step"):
        read(ConfigDict(dict(steps=())))
    with pytest.raises(UsageError, match=r"recipe.steps\[0\].layout"):
        read(ConfigDict(dict(steps=(dict(kind="round", layout=dict(kind="uniform", bits=9)),))))
