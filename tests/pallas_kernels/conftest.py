"""What hypothesis notes lies where the other data of the tests do."""

import os

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(os.environ["TFDS_DATA_DIR"], "hypothesis"))
