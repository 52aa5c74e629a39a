"""Write ImageNet's training set as images: OUT holds `WNID_ImgID.JPEG`, copied unchanged, and classes.json.

SOURCE is ILSVRC2012_img_train.tar, a folder with the tars of the classes (n01440764.tar), or one with class folders.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import (
    File,
    UserError,
    images_by_class,
    is_image,
    make_parser,
    name_images,
    open_source,
    open_tar,
    progress,
    run,
    write_images,
)

WNID = re.compile("n[0-9]{8}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--names",
        help="text file with the class names for classes.json, in lines such as `n01440764 tench, Tinca tinca`",
    )
    args = parser.parse_args()
    names = read_names(args.names) if args.names else {}
    with open_source(args.source, args.out) as (files, folders):
        tars = class_tars(files, args.source)
        if tars:
            wnids, images = tars, tar_images(tars, args.source)
        else:
            wnids = images_by_class(files, folders, args.source)
            check(wnids)
            images = progress([x for wnid in wnids for x in name_images(wnid, wnids[wnid], args.source)])
        write_images(args.out, {wnid: names.get(wnid, wnid) for wnid in wnids}, images, args.link == "True")


def read_names(path: str) -> dict[str, str]:
    """`{WNID: name}` from a text file with lines such as `n01440764 tench, Tinca tinca`.

    :raises UserError: for a file with anything else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--names {path} is not a text file in UTF-8 ({error.reason}): name another file") from error
    names = dict(line.strip().split(maxsplit=1) for line in lines if len(line.split()) > 1)
    check(names)
    return names


def check(wnids: Iterable[str]) -> None:
    """Check that all names are WNIDs, such as n01440764.

    :raises UserError: for the first name that is not.
    """
    for wnid in wnids:
        if not WNID.fullmatch(wnid):
            raise UserError(
                f"{wnid} is not an ImageNet class such as n01440764: for other data use datasets/class_folders.py"
            )


def class_tars(files: list[File], source: str) -> dict[str, File]:
    """`{WNID: its tar}`, sorted. Other tars, such as the archive that held these, are ignored.

    :raises UserError: for two tars of one class, and for images beside the tars.
    """
    tars = {}
    for file in files:
        name = file.name.rsplit("/", 1)[-1]
        wnid = name.removesuffix(".tar")
        if name.endswith(".tar") and WNID.fullmatch(wnid):
            if wnid in tars:
                raise UserError(f"{source} holds {tars[wnid].name} and {file.name}: keep one of them")
            tars[wnid] = file
    images = [file.name for file in files if is_image(file.name)]
    if tars and images:
        raise UserError(f"{source} holds both class tars and images, such as {images[0]}: remove one of the two kinds")
    return dict(sorted(tars.items()))


def tar_images(tars: dict[str, File], source: str) -> Iterator[File]:
    """The images of all class tars, one tar at a time. Of a tar, first the headers are read, then the images."""
    for wnid, tar in progress(tars.items(), "class"):
        name = f"{source}: {tar.name}"
        with tar.open() as file, open_tar(file, name) as (files, _):
            images = [file for file in files if is_image(file.name)]
            if not images:
                raise UserError(f"{name} holds no image: download it again")
            yield from name_images(wnid, images, name)


if __name__ == "__main__":
    run(main)
