"""A data set in colour with classes: emoji of 32 x 32 pixels on white, as a folder that ImageFolder(labels="folders") reads.

    python benchmarks/emoji.py                                 # all four sets, which npm fetches: 340 MB
    python benchmarks/emoji.py --sets twitter google           # those with a free licence alone
    python benchmarks/emoji.py --packages emoji-*.tgz          # without npm: the packages' files, or the folders they unpack to
    python train.py configs/Emoji_class.json

The images come from the packages emoji-datasource-SET, which hold each vendor's emoji at 64 x 64 and, in emoji.json, what they
show. The packages are under the MIT licence, and say of the images:

    twitter     Twemoji, Creative Commons Attribution 4.0
    google      Noto Emoji, Apache License 2.0
    apple       copyright Apple Inc., not licensed for commercial usage
    facebook    copyright Facebook, Inc., no clear licensing

So apple and facebook are not free: keep their images to yourself, and do not pass them on. LICENCES.txt in the folder says so.

Flags, skin tones and emoji that others have replaced are left out. The classes are the eight categories. Variants of one emoji,
of all vendors and for a woman, a man or a person, are one group; so are all families, which look alike. Every tenth group is in
valid/, the others are in train/.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from common import ROOT
from PIL import Image

from mistakes import Mistake, OneLineParser, run_script

LICENCES = {
    "twitter": "Twemoji, Creative Commons Attribution 4.0",
    "google": "Noto Emoji, Apache License 2.0",
    "apple": "copyright Apple Inc., not licensed for commercial usage: not free",
    "facebook": "copyright Facebook, Inc., no clear licensing: not free",
}
VERSION = "16.0.0"  # of the packages
SIZE = 32
PEOPLE = {"1F466", "1F467", "1F468", "1F469", "1F9D1", "1F9D2"}  # boy, girl, man, woman, person, child
SIGNS = {"200D", "FE0F", "2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}  # joiners, sex, looking right, hair


def fetched(name: str, folder: Path) -> Path:
    """The package's file, brought by npm."""
    print(f"npm pack {name}@{VERSION}", flush=True)
    try:
        command = ["npm", "pack", f"{name}@{VERSION}", "--silent", "--pack-destination", str(folder)]
        return folder / subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    except (OSError, subprocess.CalledProcessError) as error:
        raise Mistake(f"npm could not fetch {name} ({error}): get its file elsewhere, and give it to --packages") from None


def contents(package: Path) -> dict[str, bytes]:
    """What a package, a .tgz file or the folder it unpacks to, holds of package.json, emoji.json and images of 64 x 64."""

    def wanted(name: str) -> bool:
        return name in ("package.json", "emoji.json") or "/64/" in name

    if package.is_dir():
        found = {path.relative_to(package).as_posix(): path for path in package.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in found.items() if wanted(name)}
    try:
        with tarfile.open(package) as archive:
            members = ((member.name.partition("/")[2], member) for member in archive if member.isfile())
            return {name: archive.extractfile(member).read() for name, member in members if wanted(name)}
    except (OSError, tarfile.TarError, EOFError) as error:
        raise Mistake(f"{package}: is not the file of a package ({error})") from error


def group_of(emoji: dict) -> str:
    """What an emoji's variants share: its code without who it is and which way it looks; nothing for families."""
    parts = [] if emoji["subcategory"] == "family" else emoji["unified"].split("-")
    return "-".join(part for part in parts if part not in PEOPLE | SIGNS)


def emoji_of(package: Path) -> Iterator[tuple[str, str, str, Image.Image]]:
    """(group, category, file name, image) of every emoji of a package that is taken."""
    files = contents(package)
    name = json.loads(files.get("package.json", b"{}")).get("name", "")
    vendor = name.removeprefix("emoji-datasource-")
    if vendor not in LICENCES or "emoji.json" not in files:
        raise Mistake(f"{package}: must be one of the packages emoji-datasource-{', -'.join(LICENCES)}")
    for emoji in json.loads(files["emoji.json"]):
        if not emoji[f"has_img_{vendor}"] or emoji["category"] in ("Flags", "Component") or "obsoleted_by" in emoji:
            continue
        category = emoji["category"].lower().replace(" & ", "_")
        image = Image.open(BytesIO(files[f"img/{vendor}/64/{emoji['image']}"])).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        small = Image.alpha_composite(white, image).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
        yield group_of(emoji), category, f"{emoji['unified']}_{vendor}.png", small


def make(folder: Path, packages: list[Path]) -> None:
    """Fill the folder with the emoji of packages, and say how many there are."""
    emoji = [each for package in packages for each in emoji_of(package)]
    valid = set(sorted({group for group, *_ in emoji})[9::10])
    counts = {"train": 0, "valid": 0}
    for group, category, name, image in emoji:
        split = "valid" if group in valid else "train"
        path = folder / split / category / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        counts[split] += 1
    print(f"{counts['train']} images to train on and {counts['valid']} to validate, of {len({e[1] for e in emoji})} classes")


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "emoji", help="where to, by default data/emoji")
    parser.add_argument("--sets", nargs="+", default=list(LICENCES), choices=LICENCES, help="what npm is to fetch")
    parser.add_argument("--packages", nargs="+", type=Path, help="files or folders of packages, instead of npm")
    args = parser.parse_args(argv)

    def work() -> None:
        if args.folder.exists():
            raise Mistake(f"--folder {args.folder}: is there already; delete it, or name another one")
        args.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder.parent) as part:
            packages = args.packages or [fetched(f"emoji-datasource-{name}", Path(part)) for name in args.sets]
            made = Path(part, "made")
            make(made, packages)
            licences = "".join(f"{name}: {text}\n" for name, text in LICENCES.items() if list(made.rglob(f"*_{name}.png")))
            (made / "LICENCES.txt").write_text(licences, encoding="utf-8")
            print(licences, end="")
            made.rename(args.folder)

    return run_script("emoji.py", work)


if __name__ == "__main__":
    sys.exit(main())
