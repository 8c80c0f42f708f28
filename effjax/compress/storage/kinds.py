"""Layouts of stored weights, by the name that a config gives them."""

from effjax.compress.storage.fake import Fake
from effjax.compress.storage.shift import Shift
from effjax.compress.storage.uniform import Uniform

KINDS = {"uniform": Uniform, "fake": Fake, "shift": Shift}
