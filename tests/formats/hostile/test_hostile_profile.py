"""Damaged and forged profiles are refused by name, and left alone."""

import json
from pathlib import Path

import h5py
import numpy as np

from moe_tool.errors import ArtifactVersionError, NotFoundError
from moe_tool.formats.profile_hdf5 import ProfileReader
from tests.formats import samples
from tests.formats.hostile.damage import (
    Case,
    append,
    content,
    cut,
    flip,
    folder_instead,
    hdf5_changed,
    pipe_instead,
    removed,
    sealed,
)
from tests.formats.hostile.refusal import cases, require_refusal

INDEX, WEIGHT = "layers/0/top_k_index", "layers/0/top_k_weight"


def forged(name, change, says, **more):
    return Case(name=name, damage=hdf5_changed(change), says=says, **more)


def put(name, value, **how):
    """Replace a dataset."""

    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        file.create_dataset(name, data=value, **how)

    return change


def set_attribute(name, value):
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


def skeleton_of(linear_native_bytes):
    def change(file: h5py.File) -> None:
        facts = {
            "native_bytes": 10,
            "linear_native_bytes": linear_native_bytes,
            "largest_tensor_bytes": 1,
            "linears": [],
            "tied_head_weights": 0,
            "config_json": "{}",
        }
        file.attrs["header"] = json.dumps(json.loads(file.attrs["header"]) | {"skeleton": facts})

    return change


def set_first(name, value):
    """Change the first number of a dataset."""

    def change(file: h5py.File) -> None:
        data = file[name][()]
        data.reshape(-1)[0] = value
        file[name][...] = data

    return change


def link(name, made):
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = made

    return change


def stored_elsewhere(file: h5py.File) -> None:
    del file[WEIGHT]
    file.create_dataset(WEIGHT, (8, 2), np.float16, external=[("/etc/passwd", 0, 32)])


def never_written(file: h5py.File) -> None:
    """A shape without bytes behind it: 2 TB of zeros, if it were read."""
    del file[WEIGHT]
    file.create_dataset(WEIGHT, (2**38, 4), np.float16)


def virtual(file: h5py.File) -> None:
    del file[WEIGHT]
    layout = h5py.VirtualLayout((8, 2), np.float16)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (8, 2))
    file.create_virtual_dataset(WEIGHT, layout)


def cut_and_sealed(n_bytes):
    def damage(path: Path) -> None:
        cut(n_bytes)(path)
        sealed(path)

    return damage


def resized(path: Path) -> None:
    data = path.read_bytes()[:-32]
    path.write_bytes(data + b"\0" * 2**20)
    sealed(path)


def read_everything(path: Path) -> None:
    with ProfileReader.open(path) as reader:
        _ = reader.tokens
        for layer in reader.layers:
            reader.trace(layer)
            reader.statistics(layer)


@cases(
    Case(name="empty file", damage=content(b""), says="is an empty file"),
    Case(name="cut inside the signature", damage=cut(5), says="not an HDF5 file"),
    Case(name="signature alone", damage=cut(8), says="damaged"),
    Case(name="cut behind the superblock", damage=cut(48), says="damaged"),
    Case(name="cut in the middle", damage=cut(20000), says="damaged"),
    Case(name="cut inside the seal", damage=cut(-1), says="hash"),
    Case(name="no seal", damage=cut(-32), says="hash"),
    Case(name="bytes behind the seal", damage=append(b"\0"), says="hash"),
    Case(name="a bit in the superblock", damage=flip(9), says="hash"),
    Case(name="a bit in an object header", damage=flip(60), says="hash"),
    Case(name="a bit in the seal", damage=flip(-1), says="hash"),
    Case(name="another format", damage=content(b"PK\3\4" * 100), says="not an HDF5 file"),
    Case(name="folder", damage=folder_instead, says="an empty folder, not a profile"),
    Case(name="pipe", damage=pipe_instead, says="not a file"),
    Case(name="nothing there", damage=removed, says="does not exist", error=NotFoundError),
    Case(name="forged: signature alone", damage=cut_and_sealed(8), says="HDF5 says"),
    Case(name="forged: superblock alone", damage=cut_and_sealed(48), says="HDF5 says"),
    Case(name="forged: end missing", damage=cut_and_sealed(12000), says="HDF5 says"),
    forged("another kind", set_attribute("kind", "bundle"), "not a profile"),
    forged("no kind", lambda file: file.attrs.pop("kind"), "not a profile"),
    forged("next version", set_attribute("format_version", 2), "'2'", error=ArtifactVersionError),
    forged(
        "version a list",
        set_attribute("format_version", [1, 1]),
        "format version",
        error=ArtifactVersionError,
    ),
    forged("no header", lambda file: file.attrs.pop("header"), "no header"),
    forged("header no JSON", set_attribute("header", "{"), "damaged"),
    forged("header nested", set_attribute("header", "[" * 30000), "nest"),
    forged("header of another shape", set_attribute("header", '{"seed": 0}'), "header: identity"),
    forged("a part of the skeleton above all of it", skeleton_of(10**9), "skeleton: a part"),
    forged("a skeleton below zero", skeleton_of(-1), "linear_native_bytes"),
    forged("header with a key twice", set_attribute("header", '{"a":1,"a":2}'), "twice"),
    forged("domains no list", set_attribute("domains", '"words"'), "domains"),
    forged("domains of a third party", set_attribute("domains", '["a","b"]'), "domain_load"),
    forged("tokens missing", lambda file: file.pop("tokens"), "tokens/ids is missing"),
    forged("a layer missing", lambda file: file.pop("layers/2"), "layers/2/"),
    forged("a statistic missing", lambda f: f.pop("layers/2/stats/probe/cka"), "probe/cka"),
    forged("a group for a dataset", lambda f: (f.pop(INDEX), f.create_group(INDEX)), INDEX),
    forged("wrong shape", put(INDEX, np.zeros((8, 3), np.uint16)), INDEX),
    forged("wrong dtype", put(INDEX, np.zeros((8, 2), np.int64)), INDEX),
    forged("wider dtype", put(WEIGHT, np.zeros((8, 2), np.float64)), WEIGHT),
    forged("text for numbers", put(INDEX, [["a", "b"]] * 8), INDEX),
    forged("empty dataspace", put(INDEX, h5py.Empty("u2")), INDEX),
    forged("no sequence of that length", put("tokens/ids", np.zeros((2, 5), np.int32)), "ids"),
    forged("an expert beyond the last", set_first(INDEX, 3), INDEX),
    forged("a domain beyond the last", set_first("tokens/domain", 1), "tokens/domain"),
    forged("a domain below zero", set_first("tokens/domain", -1), "tokens/domain"),
    forged("an id beyond the vocabulary", set_first("tokens/ids", 7), "tokens/ids"),
    forged("NaN weight", set_first(WEIGHT, np.nan), "NaN"),
    forged("infinite logit", set_first("layers/2/router_logits", np.inf), "infinity"),
    forged("NaN price", set_first("layers/0/stats/eps_bits", np.nan), "eps_bits"),
    forged("negative load", set_first("layers/0/stats/in_sample/load", -1), "load"),
    forged("soft link", link(WEIGHT, h5py.SoftLink("/" + INDEX)), "is a link"),
    forged("external link", link(WEIGHT, h5py.ExternalLink("other.h5", "x")), "is a link"),
    forged("group behind a link", link("layers", h5py.ExternalLink("other.h5", "/")), "is a link"),
    forged("stored elsewhere", stored_elsewhere, "not stored plainly"),
    forged("virtual", virtual, "not stored plainly"),
    forged("never written", never_written, "not stored plainly"),
    forged(
        "compressed",
        put(WEIGHT, np.zeros((8, 2), np.float16), compression="gzip"),
        "not stored plainly",
    ),
)
def test_a_damaged_profile(tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    path = samples.make_profile(folder / "tiny.h5")
    case.damage(path)
    require_refusal(case, folder, lambda: read_everything(path))


def test_bytes_that_hdf5_does_not_look_at_do_no_harm_under_a_right_seal(tmp_path: Path) -> None:
    path = samples.make_profile(tmp_path / "tiny.h5")
    resized(path)
    read_everything(path)
