"""Convert class folders, one folder of images per class: OUT holds `ClassID_ImgID.ext` and classes.json.

SOURCE is a folder or a tar with the class folders at its top level. Images in subfolders belong to the same class.
"""

from common import class_ids, images_by_class, make_parser, name_images, open_source, progress, run, write_images


def main() -> None:
    args = make_parser(__doc__).parse_args()
    with open_source(args.source, args.out) as (files, folders):
        classes = images_by_class(files, folders, args.source)
        ids = class_ids(classes)
        images = [image for name in classes for image in name_images(ids[name], classes[name], args.source)]
        write_images(args.out, {ids[name]: name for name in classes}, progress(images), args.link == "True")


if __name__ == "__main__":
    run(main)
