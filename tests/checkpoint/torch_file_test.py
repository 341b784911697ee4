"""Tests of checkpoint/torch_file.py: torch's files without torch, and pickles that must not run."""

import io
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from llama4_jax.checkpoint.torch_file import TensorFileWriter, read_tensors
from tests.checkpoint.tiny import GOLDEN


def _write(path, tensors):
    described = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    with TensorFileWriter(path, described) as file:
        for value in tensors.values():
            file.write([value[:1], value[1:]])


def _with_pickle(path, data, storages=None):
    """Write a zip file like torch's around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        for key, value in (storages or {}).items():
            archive.writestr(f"x/data/{key}", value)


class _Call:
    def __init__(self, function, *arguments):
        self._reduced = function, arguments

    def __reduce__(self):
        return self._reduced


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read_bit_for_bit_and_aligned(tmp_path, dtype):
    random = np.random.default_rng(0)
    tensors = {
        "a.weight": random.standard_normal((3, 4, 5)).astype(dtype),
        "b": random.standard_normal(7).astype(dtype),
    }
    _write(tmp_path / "x.pth", tensors)
    found = read_tensors(tmp_path / "x.pth")
    assert list(found) == list(tensors)
    for name, tensor in found.items():
        assert tensor.dtype == dtype and tensor.offset % 64 == 0
        np.testing.assert_array_equal(tensor.view(), tensors[name])


def test_torchs_own_files_are_read_and_entries_that_are_no_tensors_left_out():
    found = read_tensors(GOLDEN / "meta" / "consolidated.01.pth")
    assert found["norm.weight"].shape == (32,)
    assert found["rope.freqs"].dtype == np.float32
    np.testing.assert_array_equal(found["rope.freqs"].view(), np.ones(4))
    assert not any(key.endswith("_extra_state") for key in found)


def test_torchs_float8_files_are_read():
    found = read_tensors(GOLDEN / "meta_fp8" / "consolidated.00.pth")
    experts = found["layers.1.feed_forward.experts.moe_w_out_eF_D"]
    assert experts.dtype == ml_dtypes.float8_e4m3fn
    assert np.abs(experts.view().astype(np.float32)).max() == 448


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch pwned",), "(posix|nt).system"),
        (eval, ("1",), "builtin.*.eval"),
        (open, ("pwned", "w"), "io.open"),
        (getattr, ("x", "y"), "builtin.*.getattr"),
        (np.zeros, (3,), "numpy.zeros"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_could_run_code_is_refused_by_name(
    tmp_path, monkeypatch, function, arguments, name, protocol
):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"w": _Call(function, *arguments)}, protocol=protocol)
    _with_pickle(tmp_path / "x.pth", data)
    with pytest.raises(ValueError, match=rf"x.pth is refused.*{name}"):
        read_tensors(tmp_path / "x.pth")
    assert not (tmp_path / "pwned").exists()


def test_a_name_from_the_memo_is_refused_too(tmp_path):
    parts = [
        b"\x80\x04",
        b"\x8c\x05posix\x94",
        b"\x8c\x06system\x94",
        b"\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94",
        b"h\x00h\x01\x93",
        b"\x8c\x05touch\x85R.",
    ]
    _with_pickle(tmp_path / "x.pth", b"".join(parts))
    with pytest.raises(ValueError, match=r"refused.*posix.system"):
        read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("opcode", [b"(iposix\nsystem\n.", b"\x82\x01.", b"(cposix\nsystem\no."])
def test_opcodes_that_call_by_other_ways_are_refused(tmp_path, opcode):
    _with_pickle(tmp_path / "x.pth", b"\x80\x02" + opcode)
    with pytest.raises(ValueError, match="refused"):
        read_tensors(tmp_path / "x.pth")


def test_a_memo_slot_out_of_all_proportion_takes_no_memory(tmp_path):
    _with_pickle(tmp_path / "x.pth", b"\x80\x02}r" + struct.pack("<I", 2**31) + b".")
    assert read_tensors(tmp_path / "x.pth") == {}


DOUBLED = b"N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(200))
"""Pairs of pairs, each of the memoised one before: a value of 2**200 nothings in 1001 bytes."""


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"}" + DOUBLED + b"Ns", None),  # hashed, as a key
        (b"}X\x01\0\0\0k" + DOUBLED + b"s", None),
        (DOUBLED, "must hold a dictionary of tensors, not tuple"),
        (b"}" + DOUBLED + b"Q", "damaged description"),
        (b"}" + DOUBLED + DOUBLED + b"\x93", "a global has no name"),
        (b"}" + DOUBLED + b")R", "something is called that is no function"),
        (b"}c_codecs\nencode\n" + DOUBLED + b"\x85R", "not .*"),  # encoded
        (b"}ctorch._utils\n_rebuild_tensor_v2\n(" + DOUBLED + b"N)tR", "damaged description"),
        (b"}ctorch._utils\n_rebuild_tensor_v2\n(" + DOUBLED * 4 + b"tR", "without a storage"),
    ],
)
def test_tuples_that_explode_when_printed_encoded_or_hashed_are_none_of_it(tmp_path, data, says):
    _with_pickle(tmp_path / "x.pth", b"\x80\x02" + data + b".")
    if says is None:
        assert read_tensors(tmp_path / "x.pth") == {}
    else:
        with pytest.raises(ValueError, match=says):
            read_tensors(tmp_path / "x.pth")


def test_an_odd_escape_in_a_text_of_python_2_is_no_warning(tmp_path):
    _with_pickle(tmp_path / "x.pth", b"\x80\x02}S'a\\Rb'\nNs.")
    assert read_tensors(tmp_path / "x.pth") == {}


@pytest.mark.parametrize("member", ["byteorder", "data.pkl"])
def test_a_compressed_member_is_not_unpacked(tmp_path, member):
    contents = {"byteorder": b"little", "data.pkl": _tensor_pickle()}
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name, data in contents.items():
            kind = zipfile.ZIP_DEFLATED if name == member else zipfile.ZIP_STORED
            archive.writestr(f"x/{name}", data + b"." * (name == member) * 10_000_000, kind)
    with pytest.raises(ValueError, match=rf"x.pth: 'x/{member}' is compressed"):
        read_tensors(tmp_path / "x.pth")


def test_a_description_out_of_all_proportion_is_refused(tmp_path):
    _with_pickle(tmp_path / "x.pth", b"\x80\x02}" + b"N0" * 5_000_000 + b".")
    with pytest.raises(ValueError, match=r"'x/data\.pkl' .* has over 8388608 bytes"):
        read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "numbers", [{"shape": (1,) * 33, "strides": (1,) * 33}, {"strides": (1, 1)}, {"strides": ()}]
)
def test_dimensions_that_cannot_be_are_refused(tmp_path, numbers):
    _with_pickle(tmp_path / "x.pth", _tensor_pickle(**numbers), {"0": bytes(8)})
    with pytest.raises(ValueError, match=r"x.pth holds a damaged .*dimensions"):
        read_tensors(tmp_path / "x.pth")


def _tensor_pickle(*, offset=0, shape=(2,), strides=(1,), numel=2, key="0"):
    """Describe one float32 tensor as torch would, with numbers of our choice."""

    def number(value):
        return b"J" + struct.pack("<i", value)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    return b"".join(
        [
            b"\x80\x02}X\x01\x00\x00\x00w",
            b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage",
            b"ctorch\nFloatStorage\nX\x01\x00\x00\x00" + key.encode() + b"X\x03\x00\x00\x00cpu",
            number(numel) + b"tQ" + number(offset) + numbers(shape) + numbers(strides),
            b"\x89}tRs.",
        ]
    )


def test_strided_and_shared_storages_are_read(tmp_path):
    storage = np.arange(12, dtype=np.float32).tobytes()
    data = _tensor_pickle(offset=2, shape=(2, 3), strides=(1, 4), numel=12)
    _with_pickle(tmp_path / "x.pth", data, {"0": storage})
    found = read_tensors(tmp_path / "x.pth")["w"].view()
    np.testing.assert_array_equal(found, [[2, 6, 10], [3, 7, 11]])


@pytest.mark.parametrize(
    "numbers",
    [
        {"shape": (3,)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (2**20,)},
        {"strides": (-1,)},
        {"key": "1"},
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, numbers):
    _with_pickle(tmp_path / "x.pth", _tensor_pickle(**numbers), {"0": bytes(8)})
    with pytest.raises(ValueError, match=r"x.pth: .*w"):
        read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path, kept):
    data = (GOLDEN / "meta" / "consolidated.00.pth").read_bytes()
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"consolidated.00.pth is truncated or not"):
        read_tensors(path)


def test_random_damage_never_does_worse_than_a_clear_error(tmp_path):
    with zipfile.ZipFile(GOLDEN / "meta" / "consolidated.00.pth") as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        data = archive.read(name)
    random = np.random.default_rng(0)
    path = tmp_path / "x.pth"
    for _ in range(200):
        damaged = bytearray(data)
        for position in random.integers(0, len(data), 3):
            damaged[position] = random.integers(0, 256)
        _with_pickle(path, bytes(damaged))
        with pytest.raises(ValueError, match=r"x.pth"):
            read_tensors(path)


def test_other_formats_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match=r"not in torch.save's zip format"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match="must hold a dictionary"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", _tensor_pickle())
        archive.writestr("x/data/0", bytes(8))
    with pytest.raises(ValueError, match="compressed"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"b": io.BytesIO(b"1")}, protocol=2))
        archive.writestr("x/byteorder", b"big")
    with pytest.raises(ValueError, match="big-endian"):
        read_tensors(path)
