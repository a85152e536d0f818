"""Pictures as a Vision Transformer is trained and tested on them: of a folder, or of a data set of pictures.py."""

import contextlib
from pathlib import Path

import pictures
import runs
import torch
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

UNREADABLE_IN_A_ROW = 100
# What Pillow raises of broken files.
UNREADABLE = (OSError, SyntaxError)


def data_sets(args, normalisation: tuple | None = None) -> tuple[Dataset, Dataset, int, list[str]]:
    """For training and for testing; the number of channels, and the names of the classes. The sizes of a small one are filled in.

    Args:
        args: with data, size, patch, classes, seed, and of the augmentation crop, jitter and rand_augment.
        normalisation: mean and deviation of the three channels that a model takes.
    """
    if args.data in pictures.SMALL:
        try:
            data = pictures.load(args.data)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            raise SystemExit(f"--data {error}") from None
        args.size, args.patch = args.size or data.train[0].shape[-1], args.patch or data.patch_size
        parts, names, mirrored, mean, deviation = (data.train, data.test), data.names, data.mirrored, [0.5], [0.25]
        parts = [list(zip(x, y.tolist())) for x, y in parts]
    else:
        parts = [_folder(args.data / part) for part in ("train", "val")]
        names, other = parts[0].classes, parts[1].classes
        if names != other:
            odd = sorted(set(names) ^ set(other))
            raise SystemExit(
                f"{args.data}/train has {len(names)} classes and val has {len(other)}, expected the same folders; "
                f"only one has {', '.join(odd[:5])}"
            )
        mirrored, mean, deviation = True, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    if normalisation is not None:
        mean, deviation = normalisation
    if args.classes not in (None, len(names)):
        raise SystemExit(f"--classes is {args.classes}, but {args.data} has {len(names)} classes")

    size = args.size
    change = [v2.RandomResizedCrop(size, (args.crop, 1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)]
    change += [v2.RandomHorizontalFlip()] * mirrored + [v2.RandAugment()] * args.rand_augment
    change += [v2.ColorJitter(args.jitter, args.jitter, args.jitter)] * (args.jitter > 0)
    tensor = [v2.RGB()] * (len(mean) == 3) + [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, deviation),
    ]
    # 257 and 224, as the paper validates. A small data set is tested whole.
    keep = [v2.Resize(size if args.data in pictures.SMALL else round(size * 257 / 224)), v2.CenterCrop(size)]
    train = Training(parts[0], v2.Compose([*change, *tensor]), args.seed)
    test = Testing(parts[1], v2.Compose([*keep, *tensor]), (len(mean), size, size))
    return train, test, len(mean), list(names)


def _folder(path: Path) -> ImageFolder:
    try:
        return ImageFolder(path)
    except FileNotFoundError as error:
        reason = error if path.is_dir() else f"there is no folder {path}"
        raise SystemExit(
            f"--data: {reason}; expected FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg, or one of "
            f"{', '.join(pictures.SMALL)}"
        ) from None


class Training(Dataset):
    """Pictures, changed at random, with their classes: (x, class, how many could not be read and were replaced by the next)."""

    def __init__(self, data, transform, seed: int):
        self.data, self.transform, self.seed = data, transform, seed

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        for skipped in range(UNREADABLE_IN_A_ROW):
            try:
                picture, label = self.data[(index + skipped) % len(self.data)]
                break
            except UNREADABLE:
                continue
        else:
            raise SystemExit(f"{UNREADABLE_IN_A_ROW} pictures in a row cannot be read; the last is number {index}")
        with drawn_from(self.seed, epoch, index):
            return self.transform(picture), label, skipped


class Testing(Dataset):
    """Pictures as they are; class -1 for what cannot be read, and for the index -1."""

    def __init__(self, data, transform, shape: tuple[int, int, int]):
        self.data, self.transform, self.shape = data, transform, shape

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index: int):
        try:
            if index >= 0:
                picture, label = self.data[index]
                return self.transform(picture), label, 0
        except UNREADABLE:
            pass
        return torch.zeros(self.shape), -1, int(index >= 0)


def evenly(count: int, rank: int, world: int) -> list[int]:
    """The indices of this process; -1 fills up, so that all processes have as many."""
    mine = list(range(rank, count, world))
    return mine + [-1] * (-(-count // world) - len(mine))


@contextlib.contextmanager
def drawn_from(*numbers: int):
    """Inside, torch draws from a generator that these numbers seed."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(runs.seed_of(*numbers))
        yield
