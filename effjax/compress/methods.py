"""What makes a trained language model cheaper without training, by the name that a command line gives it."""

from effjax.compress.cats import Thresholding

KINDS = {"cats": Thresholding}
