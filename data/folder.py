"""A dataset that exists already, in the ancestors' (HRM, TRM) on-disk format."""

from pathlib import Path
from typing import ClassVar, Literal

from data.config import DatasetConfig
from data.errors import DataError
from data.format import dataset_info, read_dataset


class FolderConfig(DatasetConfig):
    """`data=folder data.path=…`: read `path` as it is; nothing is built or copied."""

    may_have_votes: ClassVar[bool] = True

    name: Literal["folder"] = "folder"
    path: str

    def check(self) -> None:
        """Check metadata, index arrays and shapes of both splits, without reading the tokens."""
        path = Path(self.path).expanduser()
        if not path.is_dir():
            state = "is a file" if path.exists() else "does not exist"
            raise DataError(
                f"data.path={self.path} {state}; give a dataset folder with train/ and test/."
            )
        info = dataset_info(path)
        if self.num_aug != 0 and info.augmentation is None:
            raise DataError(
                f"data.num_aug={self.num_aug}: {self.path} names no augmentation in its "
                "dataset.json; set data.num_aug=0."
            )

    def fingerprint(self) -> str:
        """As recorded in the folder."""
        return dataset_info(Path(self.path).expanduser()).fingerprint

    def prepare(self, root: str | Path) -> Path:
        """Check everything, every token included; return the folder itself. `root` is not used."""
        self.check()
        path = Path(self.path).expanduser()
        for split in ("train", "test"):
            read_dataset(path, split)
        return path
