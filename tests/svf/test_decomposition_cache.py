"""The cache of decompositions: exact hits, damage, refusals of the disk, and what the key depends on."""

from __future__ import annotations

import errno
import os
import resource
import struct

import pytest
import torch

from sigmix.errors import CacheError, ConfigError, OutputError
from sigmix.models.digests import weight_digest
from sigmix.svf import decomposition as module
from sigmix.svf.decomposition import cache_path, cached_decompose, decompose

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def entry(weight):
    """The path of a sound entry for ``weight``."""
    cached_decompose(weight)
    return cache_path(weight_digest(weight))


def forbid(monkeypatch) -> None:
    def called(_):
        raise AssertionError("decomposed although the cache has it")

    monkeypatch.setattr(module, "decompose", called)


def files(folder) -> list:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_hit_has_the_same_bits_and_computes_nothing(weight, monkeypatch):
    first = cached_decompose(weight)
    forbid(monkeypatch)
    hit = cached_decompose(weight.clone())
    assert torch.equal(first.short, hit.short)
    assert torch.equal(first.s, hit.s)
    assert first.side == hit.side == "in"


def test_a_hit_equals_a_fresh_decomposition_for_a_wide_weight(weight):
    cached_decompose(weight.T)
    hit, fresh = cached_decompose(weight.T), decompose(weight.T)
    assert hit.side == "out"
    assert torch.equal(hit.short, fresh.short)
    assert torch.equal(hit.s, fresh.s)


def test_a_weight_and_its_transpose_are_two_entries(weight, cache):
    cached_decompose(weight)
    cached_decompose(weight.T)
    assert len(files(cache)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_exact_upcast_shares_the_entry(weight, dtype, cache, monkeypatch):
    narrow = weight.to(dtype)
    first = cached_decompose(narrow)
    forbid(monkeypatch)
    for wide in (narrow.float(), narrow.double()):
        assert torch.equal(cached_decompose(wide).short, first.short)
    assert len(files(cache)) == 1


def test_the_key_depends_on_every_value_on_the_shape_and_on_the_method(weight, monkeypatch):
    base = weight_digest(weight)
    for place in ((0, 0), (23, 15), (11, 7)):
        other = weight.clone()
        other[place] = torch.nextafter(other[place], torch.tensor(9.0))
        assert weight_digest(other) != base
    assert weight_digest(weight.reshape(16, 24)) != base
    assert weight_digest(weight.T) != base
    assert weight_digest(weight.T.contiguous().T) == base, "strides are no values"
    path = cache_path(base)
    monkeypatch.setattr(module, "METHOD", "another")
    assert cache_path(base) != path


def test_without_the_cache_nothing_is_read_or_written(weight, cache):
    assert torch.equal(cached_decompose(weight, cache=False).s, decompose(weight).s)
    assert not cache.exists()


def test_nothing_is_written_for_a_weight_that_has_no_decomposition(cache):
    with pytest.raises(ConfigError):
        cached_decompose(torch.full((3, 3), float("nan")))
    assert not cache.exists()


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def first_number_edited(data: bytes) -> bytes:
    start = 8 + struct.unpack("<Q", data[:8])[0]
    return data[:start] + struct.pack("<f", struct.unpack("<f", data[start : start + 4])[0] + 0.5) + data[start + 4 :]


def last_bit_flipped(data: bytes) -> bytes:
    return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]


def zeroed(data: bytes) -> bytes:
    return data[:-512] + bytes(512)


DAMAGE = {
    "truncated": truncated,
    "empty": lambda data: b"",
    "text": lambda data: b"not a tensor file at all, but long enough to look at",
    "edited": first_number_edited,
    "one bit": last_bit_flipped,
    "zeroed block": zeroed,
    "no checksum": lambda data: data.replace(b'"check"', b'"chick"'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_named_and_the_remedy_works(weight, entry, damage):
    sound = decompose(weight)
    before = entry.read_bytes()
    entry.write_bytes(damage(before))
    assert entry.read_bytes() != before
    with pytest.raises(CacheError) as caught:
        cached_decompose(weight)
    assert str(entry) in str(caught.value)
    assert caught.value.remedy is not None
    assert "delete" in caught.value.remedy
    entry.unlink()
    assert torch.equal(cached_decompose(weight).short, sound.short)
    assert torch.equal(cached_decompose(weight).short, sound.short)


def test_an_entry_of_another_shape_is_damage(weight, entry):
    other = torch.randn(10, 9)
    cached_decompose(other)
    cache_path(weight_digest(other)).replace(entry)
    with pytest.raises(CacheError, match="damaged"):
        cached_decompose(weight)


def refuse(number: int):
    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize(
    "where, number, words",
    [
        ("pathlib.Path.mkdir", errno.EACCES, "permission denied"),
        ("tempfile.mkstemp", errno.EROFS, "read-only"),
        ("pathlib.Path.write_bytes", errno.ENOSPC, "disk is full"),
        ("os.replace", errno.ENOSPC, "disk is full"),
    ],
)
def test_a_disk_that_refuses_is_an_output_error_and_leaves_nothing(weight, cache, monkeypatch, where, number, words):
    with monkeypatch.context() as patch:
        patch.setattr(where, refuse(number))
        with pytest.raises(OutputError, match=words) as caught:
            cached_decompose(weight)
    assert caught.value.remedy is not None
    assert files(cache) == []
    assert torch.equal(cached_decompose(weight).s, decompose(weight).s)


def test_a_disk_that_is_full_half_way_leaves_nothing(weight, cache):
    # a real refusal by the kernel after 512 bytes, not a patched one
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            cached_decompose(weight)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(cache) == []


def test_an_interrupt_while_writing_leaves_nothing(weight, cache, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached_decompose(weight)
    assert files(cache) == []


def test_a_read_only_cache_can_be_read(weight, entry, monkeypatch):
    monkeypatch.setattr("os.utime", refuse(errno.EROFS))
    forbid(monkeypatch)
    assert cached_decompose(weight).s.shape == (16,)
    assert entry.exists()
