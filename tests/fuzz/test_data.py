"""`data=` anything: folders of strange files, lists, archives, and words that name nothing."""

import os
import shutil
import socket
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import strategies as st

from selfsup.config import Crops, DataConfig, ViewsConfig
from selfsup.data.eval_transform import eval_batches
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.data.views import multicrop
from tests.fuzz.cases import Edit, as_a_user, check_message, digest, edits, fuzz, told
from tests.fuzz.test_images import BASES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
VIEWS = multicrop(ViewsConfig(**{"global": Crops(size=8), "local": Crops(count=0)}))
LIMITS = DataConfig(max_pixels=100_000)
GOOD = BASES["rgb.png"]


def use(spec: str, channels: int = 3) -> None:
    """What training and evaluation do with `data=SPEC`."""
    with told():
        source = open_source(spec, channels=channels, config=LIMITS)
        count = len(source)
        assert count > 0 and len(source.fingerprint()) == 64
        assert source.labels is None or source.labels.shape == (count,)
        for i in {0, count - 1}:
            assert source.name(i).isprintable()
            source.label(i)
        batch = min(4, count)
        for [made] in Loader(source, VIEWS, seed=0, global_batch=batch).stream(0, 2):
            assert len(made.ids) == batch and all(len(pair) == 2 for pair in made.bad)
            for name, reason in made.bad:
                assert name.isprintable()
                check_message(reason)
        values = [0.5] * channels
        list(islice(eval_batches(source, size=8, mean=values, std=values, batch_size=4, on_bad=lambda *bad: None), 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@contextmanager
def folder(place: Path) -> Iterator[Path]:
    """A folder for one case, removed after it; what is beside it and in the current directory must not change."""
    outer = Path(tempfile.mkdtemp(dir=place))
    inner = outer / "inner"
    inner.mkdir()
    (outer / "canary").write_text("sings")
    before = os.getcwd()
    os.chdir(outer)
    try:
        yield inner
        assert (outer / "canary").read_text() == "sings" and sorted(os.listdir(outer)) == ["canary", "inner"]
    finally:
        os.chdir(before)
        shutil.rmtree(outer)


# ------------------------------------------------------------------------------------------------------------ folders

WORDS = st.one_of(
    st.sampled_from([b"a", b"-rf", b"--out", b"x y", b"\n", b"a\nb\nc", b"\x1b[2J", b"\t", b"\\", b"'\"", b"*", b"~",
                     b"$HOME", b"\xff\xfe", "ü".encode(), "\u202e".encode(), "😀".encode(), b"CON", b"__MACOSX", b".",
                     b"..",
                     b"a" * 240]),
    st.binary(min_size=1, max_size=12),
    st.text(min_size=1, max_size=6).map(lambda t: t.encode("utf-8", "surrogatepass")),
)  # fmt: skip
SUFFIXES = st.sampled_from([b".png", b".PNG", b".jpg", b".npy", b".gif", b".tif", b"", b".txt", b".png.png"])
NAMES = st.builds(lambda w, s: (w.replace(b"/", b"_").replace(b"\0", b"_") + s)[-255:], WORDS, SUFFIXES)
KINDS = ["image", "image", "edited", "empty", "long", "folder", "folder", "link", "loop", "itself", "dangling", "zero",
         "null", "tty", "fifo", "socket", "sparse"]  # fmt: skip
ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        NAMES,
        st.integers(0, 8),  # in which of the folders made so far
        st.sampled_from([None, None, None, 0o000, 0o400, 0o100, 0o777]),
        st.sampled_from(sorted(BASES)),
        edits(),
    ),
    max_size=8,
)


def build(root: Path, entries: list[tuple[str, bytes, int, int | None, str, Edit]]) -> None:
    folders, modes = [os.fsencode(root)], {}
    for kind, name, where, mode, base, edit in entries:
        path = os.path.join(folders[where % len(folders)], name)
        if name in (b".", b"..") or os.path.lexists(path):
            continue
        if mode is not None:
            modes[path] = mode
        match kind:
            case "folder":
                os.mkdir(path)
                folders.append(path)
            case "link":
                os.symlink(os.path.join(os.fsencode(root), b"first.png"), path)
            case "loop":
                os.symlink(folders[0], path)
            case "itself":
                os.symlink(name, path)
            case "dangling":
                os.symlink(b"../nothing/here.png", path)
            case "zero" | "null" | "tty":
                os.symlink(b"/dev/" + kind.encode(), path)
            case "fifo":
                os.mkfifo(path)
            case "socket":
                here = os.getcwd()
                os.chdir(os.path.dirname(path))  # their names are short
                try:
                    with socket.socket(socket.AF_UNIX) as end:
                        end.bind(name)
                except OSError:
                    pass
                os.chdir(here)
            case _:
                data = {"image": BASES[base], "edited": edit(BASES[base]), "empty": b"", "long": GOOD + bytes(100_000)}
                with open(path, "wb") as file:
                    file.write(data.get(kind, GOOD))
                    if kind == "sparse":
                        file.truncate(1 << 40)
    for path, mode in modes.items():
        if os.path.lexists(path) and not os.path.islink(path):
            os.chmod(path, mode)


def readable(root: Path) -> None:
    """So that the folder can be removed, and its digest taken."""
    for path, folders, _ in os.walk(root):
        for name in folders:
            if not os.path.islink(os.path.join(path, name)):
                os.chmod(os.path.join(path, name), 0o700)


@fuzz(350, entries=ENTRIES, good=st.booleans(), user=st.booleans(), channels=st.sampled_from([3, 1, 5]))
def test_folders(place: Path, entries, good: bool, user: bool, channels: int) -> None:
    with folder(place) as root:
        if good:
            (root / "first.png").write_bytes(GOOD)
        build(root, entries)
        before = digest(root)
        if user:
            with as_a_user():
                use(str(root), channels)
        else:
            use(str(root), channels)
        assert digest(root) == before


# -------------------------------------------------------------------------------------------------------------- lists

PATHS = st.one_of(
    st.sampled_from([b"first.png", b"sub/second.png", b"/dev/zero", b"/dev/null", b"/", b".", b"..", b"../canary",
                     b"~/x.png", b"a\0b.png", b"\0", b"x" * 300 + b".png", b"x/" * 3000 + b".png", b"first.png/x.png",
                     b"fifo.png", b"\xef\xbb\xbf",
                     b"loop/loop/loop/first.png", b"-", b"#", b"http://x/y.png", b"my picture.png"]),
    st.binary(max_size=20),
)  # fmt: skip
LABELS = st.one_of(
    st.sampled_from([b"", b"0", b"3", b"-1", b"-2", b"1e3", b"99999999999999999999", b"9" * 5000, b"10000001", b"cat",
                     b"\xff",
                     "٣".encode(), b"1_0", b"+1", b"a b", b"first.png"]),
    st.binary(max_size=6),
)  # fmt: skip


@fuzz(
    250,
    lines=st.lists(st.tuples(PATHS, st.sampled_from([b"", b"\t", b" ", b"  ", b"\t\t"]), LABELS), max_size=6),
    end=st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"]),
    edit=st.one_of(st.none(), edits()),
    good=st.booleans(),
)
def test_lists(place: Path, lines, end: bytes, edit: Edit | None, good: bool) -> None:
    with folder(place) as root:
        (root / "first.png").write_bytes(GOOD)
        (root / "sub").mkdir()
        (root / "sub" / "second.png").write_bytes(GOOD)
        (root / "my picture.png").write_bytes(GOOD)
        os.mkfifo(root / "fifo.png")
        os.symlink(".", root / "loop")
        text = end.join(
            [*([b"first.png"] if good else []), *(path + between + label for path, between, label in lines)]
        )
        (root / "list.txt").write_bytes(edit(text) if edit else text)
        before = digest(root)
        use(str(root / "list.txt"))
        assert digest(root) == before


# ----------------------------------------------------------------------------------------------------------- archives

MEMBERS = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(["a.png", "b/c.png", "../canary", "../../x.png", "/ABSOLUTE/x.png", "/etc/x.png",
                             "..\\x.png", "C:\\x.png", "a/../../y.png", "./z.png", "a//b.png", "~/x.png", "-rf.png",
                             "a\nb.png", "\x1b[2J.png", "__MACOSX/a.png",
                             "dir.png/", "ü.png", "x" * 3000 + ".png"]),
            st.text(min_size=1, max_size=8).filter(lambda t: t.isprintable()).map(lambda t: t + ".png"),
        ),
        st.sampled_from(["image", "image", "edited", "empty", "bomb", "link up", "link away"]),
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2,
                         zipfile.ZIP_LZMA]),
        st.sampled_from(sorted(BASES)),
        edits(),
    ),
    max_size=5,
)  # fmt: skip
# offset in an entry of the central directory, and how it is packed (APPNOTE 6.3, section 4.3.12)
FIELDS = [(6, "<H"), (8, "<H"), (10, "<H"), (16, "<I"), (20, "<I"), (24, "<I"), (28, "<H"), (30, "<H"), (32, "<H")]
FIELDS += [(38, "<I"), (42, "<I")]
TAMPERS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(FIELDS), st.sampled_from([0, 1, 8, 99, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE,
                                                                           0xFFFFFFFF])),
    max_size=3,
)  # fmt: skip


def tampered(data: bytes, changes: list[tuple[int, tuple[int, str], int]]) -> bytes:
    out = bytearray(data)
    for which, (offset, kind), value in changes:
        at = -1
        for _ in range(which + 1):
            at = data.find(b"PK\x01\x02", at + 1)
            if at < 0:
                break
        if 0 <= at < len(out) - 46:
            struct.pack_into(kind, out, at + offset, value & (0xFFFF if kind == "<H" else 0xFFFFFFFF))
    return bytes(out)


def archive(path: Path, members: list[tuple[str, str, int, str, Edit]], away: Path) -> None:
    with zipfile.ZipFile(path, "w") as out:
        for name, kind, method, base, edit in members:
            entry = zipfile.ZipInfo(name.replace("/ABSOLUTE", str(away)))
            entry.compress_type = method
            data = {"image": BASES[base], "edited": edit(BASES[base]), "bomb": bytes(1_000_000)}.get(kind, b"")
            if kind.startswith("link"):
                entry.external_attr = (stat.S_IFLNK | 0o777) << 16
                entry.create_system = 3
                data = b"../canary" if kind == "link up" else b"/etc/passwd"
            out.writestr(entry, data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@fuzz(450, members=MEMBERS, changes=TAMPERS, edit=st.one_of(st.none(), st.none(), edits()), good=st.booleans())
def test_archives(place: Path, members, changes, edit: Edit | None, good: bool) -> None:
    with folder(place) as root:
        archive(
            root / "x.zip",
            [*members, *([("z/good.png", "image", 8, "rgb.png", Edit(0, 1))] if good else [])],
            root / "away",
        )
        data = tampered((root / "x.zip").read_bytes(), changes)
        (root / "x.zip").write_bytes(edit(data) if edit else data)
        before = digest(root)
        use(str(root / "x.zip"))
        assert digest(root) == before and os.listdir(root) == ["x.zip"]


def zip64(name: bytes, offset: int, stored: int, unpacked: int) -> bytes:
    """One member whose sizes and place are in a zip64 field."""
    local = (
        struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, len(GOOD), len(GOOD), len(name), 0) + name + GOOD
    )
    extra = struct.pack("<HHQQQ", 1, 24, unpacked, stored, offset)
    most = 0xFFFFFFFF
    central = struct.pack(
        "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, most, most, len(name), len(extra), 0, 0, 0, 0, most
    )
    central += name + extra
    return local + central + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local), 0)


SIZES = st.sampled_from([0, 1, len(GOOD), 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1])


@fuzz(100, offset=SIZES, stored=SIZES, unpacked=SIZES)
def test_archives_that_say_they_are_large(place: Path, offset: int, stored: int, unpacked: int) -> None:
    with folder(place) as root:
        (root / "x.zip").write_bytes(zip64(b"a.png", offset, stored, unpacked))
        use(str(root / "x.zip"))


# --------------------------------------------------------------------------------------------------------------- words


@fuzz(
    300,
    start=st.sampled_from(["", "demo", "demo:", "torchvision:", "timm:", "torchvision:CIFAR10:", "torchvision:CIFAR1O:",
                           "timm:cifar:",
                           "timm:torch/cifar10:", "/", "~", "~nobody/", "./", "../", "inner/", "a.txt", "http://x/"]),
    rest=st.one_of(st.text(max_size=20), st.sampled_from(["", "\0", "a\nb\nc", "\ud800", "x" * 5000, ":train", "::",
                                                          "\x1b[2J", ".zip"])),
)  # fmt: skip
def test_words(place: Path, start: str, rest: str) -> None:
    with folder(place):
        use(start + rest)
