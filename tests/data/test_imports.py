"""Wrong input must be refused in seconds, so nothing on the way there may load torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, tempfile
import data
config = data.SudokuConfig(box=(2, 2), num_train=200, num_test=20)
folder = config.prepare(tempfile.mkdtemp())
data.read_dataset(folder, "train")
data.FolderConfig(path=str(folder)).check()
heavy = {"torch", "hydra", "wandb", "numba", "scipy"} & set(sys.modules)
assert not heavy, heavy
assert {"TrainLoader", "EvalLoader", "AUGMENTATIONS"} <= set(data.__all__)
assert data.TrainLoader.__module__ == "data.loader" and "torch" in sys.modules
try:
    data.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""


def test_import_build_and_read_are_free_of_torch_and_numba():
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, check=True, timeout=60)
