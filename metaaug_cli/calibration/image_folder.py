"""Folders of images: found, labelled, sampled evenly, and decoded in parallel."""

from __future__ import annotations

import logging
import os
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from metaaug_cli.errors import InputError
from metaaug_cli.networks.preprocessing import Preprocessing

_logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_MAX_THREADS = 8
_LISTED = 5


@dataclass(frozen=True)
class ImageFolder:
    """Images found below a folder.

    Args:
        root: The folder.
        paths: Image files, sorted by their path below ``root``.
        labels: Class index of each path; ``None`` when there are no class folders.
        classes: Class names in index order; ``None`` without class folders.
        named: Whether the order of ``classes`` was given by a file, not by sorting the folders.
        unread: ``folder: reason`` for every folder below ``root`` that cannot be read.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    named: bool = False
    unread: tuple[str, ...] = ()


def scan_folder(root: Path | str, *, classes_file: Path | None = None) -> ImageFolder:
    """Find the images below a folder, at any depth; hidden files and folders are left out.

    The first folder below ``root`` is an image's class. Images lying directly in ``root`` have none.

    Args:
        root: The folder.
        classes_file: Class folder names in index order, one per line; without it the sorted folder
            names give the index.

    Raises:
        InputError: No such folder, no images, none that can be read, or class folders that the file does
            not list.
    """
    root = Path(root)
    if not root.is_dir():
        kind = "is a file, not a folder of images" if root.exists() else "does not exist"
        raise InputError(f"{root} {kind}", hint="pass a folder of images, flat or one folder per class")
    relative, unread = _image_files(root)
    if not relative and unread:
        raise InputError(f"no images in {root} can be read: {_some(unread, '; ')}")
    if not relative:
        raise InputError(
            f"no images in {root}",
            hint=f"looked at any depth for {', '.join(sorted(s[1:] for s in IMAGE_SUFFIXES))} files",
        )
    loose = sum(len(path.parts) == 1 for path in relative)
    folders = sorted({path.parts[0] for path in relative if len(path.parts) > 1})
    paths = tuple(root / path for path in relative)
    if loose and classes_file is not None:
        raise InputError(f"{loose} images lie directly in {root}, outside any class folder")
    if loose:
        if folders:
            _logger.warning("%s has images outside its %d folders; labels ignored", root, len(folders))
        return ImageFolder(root, paths, None, None, unread=unread)
    classes = tuple(folders) if classes_file is None else _read_classes(classes_file, folders)
    index = {name: i for i, name in enumerate(classes)}
    labels = tuple(index[path.parts[0]] for path in relative)
    return ImageFolder(root, paths, labels, classes, named=classes_file is not None, unread=unread)


def check_class_count(folder: ImageFolder, num_outputs: int) -> None:
    """Refuse labels that cannot be the model's: a wrong count, or an order nobody stated.

    A single output decides between two classes.

    Args:
        folder: Scanned images; unlabelled ones pass.
        num_outputs: Length of the model's logits.

    Raises:
        InputError: With the flag that settles it.
    """
    if folder.classes is None:
        return
    found, wanted = len(folder.classes), max(num_outputs, 2)
    outputs = f"{num_outputs} outputs" if num_outputs > 1 else "one output, so two classes"
    if found != wanted and folder.named:
        raise InputError(
            f"the classes file lists {found} classes, the model has {outputs}",
            hint="pass the list the model was trained with",
        )
    if found != wanted:
        without = _folders_without_images(folder)
        beside = f" with images ({_some(without)} without any that can be read)" if without else ""
        raise InputError(
            f"{folder.root} has {found} class folders{beside}, the model has {outputs}",
            hint="pass --classes FILE with the class folder names in index order, one per line",
        )
    numeric = all(name.isdecimal() for name in folder.classes)
    if not folder.named and numeric and list(folder.classes) != sorted(folder.classes, key=int):
        raise InputError(
            f"the class folders of {folder.root} are numbers whose order is ambiguous (is 10 before 2?)",
            hint="pass --classes FILE with the class folder names in index order, one per line",
        )


def iter_labelled_batches(
    folder: ImageFolder,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 128,
    indices: Sequence[int] | None = None,
    skipped: list[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Prepared images in batches, in the folder's order.

    Args:
        folder: The images.
        preprocessing: The network's own.
        batch_size: Images per batch; the last one may be smaller.
        indices: Which of ``folder.paths``, in this order; all by default.
        skipped: Receives ``path: reason`` for every unreadable folder and file.
        progress: Called with (files looked at, files in all) after each batch.

    Yields:
        Float32 (B, C, H, W) and int64 labels (B,), or ``None`` for an unlabelled folder.

    Raises:
        InputError: Not one image can be read.
    """
    chosen = range(len(folder.paths)) if indices is None else indices
    skipped = [] if skipped is None else skipped
    skipped.extend(folder.unread)
    images: list[Tensor] = []
    labels: list[int] = []
    usable = 0
    for done, (index, decoded) in enumerate(decode_in_order(folder, preprocessing, chosen), start=1):
        if isinstance(decoded, str):
            skipped.append(f"{folder.paths[index].relative_to(folder.root).as_posix()}: {decoded}")
        else:
            images.append(decoded)
            labels.append(folder.labels[index] if folder.labels is not None else 0)
        if images and (len(images) == batch_size or done == len(chosen)):
            usable += len(images)
            yield torch.stack(images), torch.tensor(labels) if folder.labels is not None else None
            images, labels = [], []
        if progress is not None and (not images or done == len(chosen)):
            progress(done, len(chosen))
    require_some(usable, skipped, folder.root)


def balanced_order(folder: ImageFolder, *, seed: int) -> list[int]:
    """All indices of a folder, shuffled, so that every prefix is balanced over the classes."""
    generator = random.Random(seed)
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in range(len(folder.paths)):
        by_class[folder.labels[index] if folder.labels is not None else 0].append(index)
    groups = list(by_class.values())
    for group in groups:
        generator.shuffle(group)
    generator.shuffle(groups)
    return [index for turn in zip_longest(*groups) for index in turn if index is not None]


def _folders_without_images(folder: ImageFolder) -> list[str]:
    """Folders that would be classes if they held an image that can be read."""
    names = (path.name for path in folder.root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(set(names) - set(folder.classes or ()))


def _image_files(root: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Image files below a folder, relative to it and sorted, and the folders that cannot be read."""
    failures: list[OSError] = []
    found = sorted(_walk(root, failures), key=Path.as_posix)
    places = [(os.path.relpath(failure.filename, root), failure.strerror) for failure in failures]
    return found, tuple(f"{place}: cannot read the folder, {reason}" for place, reason in places)


def _walk(root: Path, failures: list[OSError]) -> Iterator[Path]:
    """Image files below a folder, relative to it; links are followed, loops are not."""
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=failures.append):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            path = Path(folder, name)
            named = not name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES
            # Reading a pipe would wait for ever; what cannot be looked at is named when it is to be read.
            if named and (os.path.isfile(path) or not os.path.exists(path)):
                yield path.relative_to(root)


def _read_classes(path: Path, folders: Sequence[str]) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot read the classes file {path}: {exc}") from exc
    names = [line for line in lines if line]
    if not set(folders) <= set(names):
        # The customary "n01440764 tench, Tinca tinca" lists have the folder name first.
        names = [name.split()[0] for name in names] if names else names
    repeated = (
        sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    )
    if repeated:
        raise InputError(f"{path} lists {_some(repeated)} more than once")
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise InputError(
            f"{len(unknown)} class folders are not in {path}: {_some(unknown)}",
            hint="the file holds class folder names in index order, one per line",
        )
    return tuple(names)


def decode_in_order(
    folder: ImageFolder, preprocessing: Preprocessing, indices: Sequence[int]
) -> Iterator[tuple[int, Tensor | str]]:
    """Decode with threads, a bounded number ahead, and yield in the order asked for.

    Yields:
        An index, with its image (C, H, W) or the reason why there is none.
    """
    workers = min(_MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode")
    pending: deque[tuple[int, Future[Tensor | str]]] = deque()
    try:
        for index in indices:
            pending.append((index, pool.submit(_decode, folder.paths[index], preprocessing)))
            if len(pending) >= 4 * workers:
                ready, future = pending.popleft()
                yield ready, future.result()
        while pending:
            ready, future = pending.popleft()
            yield ready, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode(path: Path, preprocessing: Preprocessing) -> Tensor | str:
    try:
        with Image.open(path) as image:
            return preprocessing(image)
    except Image.DecompressionBombError:
        return "more pixels than the decoder's safety limit"
    except Exception as exc:  # decoders raise many kinds on damaged files; none may stop a run
        return str(exc).replace(str(path), path.name) or type(exc).__name__


def require_some(usable: int, skipped: Sequence[str], root: Path) -> None:
    """Refuse a folder of which nothing could be used.

    Raises:
        InputError: ``usable`` is zero; names the first files skipped and why.
    """
    if usable:
        return
    raise InputError(f"not one of {len(skipped)} images in {root} can be used: {_some(skipped, '; ')}")


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return separator.join(names[:_LISTED]) + more
