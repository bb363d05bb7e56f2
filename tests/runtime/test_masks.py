"""The frequent masks of a bundle: counted and chosen by hand-made numbers, and their file is whole or refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from bdtool.errors import BundleError
from bdtool.runtime.masks import MaskCount, choose_masks, count_masks, noted_masks, read_masks, write_masks

REPOSITORY = Path(__file__).parents[2]


def _rows(*texts):
    return np.array([[bit == "1" for bit in text] for text in texts])


def _counts(**shares):
    return [MaskCount(mask=name, share=share) for name, share in shares.items()]


def test_masks_are_counted_over_all_matrices():
    counts = count_masks([_rows("110", "011", "110"), _rows("110")])
    assert counts == [MaskCount(mask="110", share=0.75), MaskCount(mask="011", share=0.25)]


def test_equally_frequent_masks_come_in_the_order_of_their_bits():
    expected = ["001", "010", "100"]
    for rows in (("100", "001", "010"), ("010", "100", "001")):
        assert [count.mask for count in count_masks([_rows(*rows)])] == expected


def test_nothing_counted_gives_no_masks():
    assert count_masks([]) == []
    assert choose_masks([], n_paths=None, coverage=0.9) == []


@given(keep=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8)))
def test_shares_add_up_to_one_and_fall(keep):
    shares = [count.share for count in count_masks([keep])]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(("n_paths", "chosen"), [(0, ""), (1, "a"), (3, "abc"), (9, "abcd")])
def test_n_paths_takes_the_most_frequent(n_paths, chosen):
    counts = _counts(a=0.4, b=0.3, c=0.2, d=0.1)
    assert [count.mask for count in choose_masks(counts, n_paths=n_paths, coverage=None)] == list(chosen)


@pytest.mark.parametrize(
    ("coverage", "chosen"), [(0.0, ""), (0.1, "a"), (0.4, "a"), (0.41, "ab"), (0.7, "ab"), (0.9, "abc"), (1.0, "abcd")]
)
def test_coverage_takes_the_fewest_that_cover_it(coverage, chosen):
    counts = _counts(a=0.4, b=0.3, c=0.2, d=0.1)  # 0.4 + 0.3 + 0.2 is a little less than 0.9 in floating point
    assert [count.mask for count in choose_masks(counts, n_paths=None, coverage=coverage)] == list(chosen)


def test_written_masks_are_read_back_in_order(tmp_path):
    write_masks(tmp_path, count_masks([_rows("110", "011", "110")]), source="sample", policy="learned")
    found = read_masks(tmp_path, 3)
    np.testing.assert_array_equal([count.keep for count in found], _rows("110", "011"))
    assert all(count.keep.dtype == bool for count in found)
    assert [count.share for count in found] == pytest.approx([2 / 3, 1 / 3])


def test_bundle_without_masks_has_none(tmp_path):
    assert read_masks(tmp_path, 3) == []
    assert read_masks(tmp_path / "absent", 3) == []
    assert noted_masks(tmp_path / "absent", 3, precision="fp32") == []


def test_masks_noted_for_other_engines_serve_those_without(tmp_path):
    for name, mask in (("torch-2-cpu-fp32", "110"), ("torch-1-cpu-fp32", "011"), ("torch-1-cpu-int8", "001")):
        (tmp_path / name).mkdir()
        write_masks(tmp_path / name, [MaskCount(mask=mask, share=1.0)], source="sample", policy="learned")

    def found(name, precision):
        return [count.mask for count in noted_masks(tmp_path / name, 3, precision=precision)]

    assert found("torch-2-cpu-fp32", "fp32") == ["110"]
    assert found("absent-fp32", "fp32") == ["011"]  # the first by name
    assert found("absent-int8", "int8") == ["001"]
    assert found("absent-bf16", "bf16") == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"masks": 3}',
        b'{"masks": ["110"]}',
        b'{"masks": [{"share": 1}]}',
        b"7",
        pytest.param(b"[" * 200_000, id="nested"),
    ],
)
def test_damaged_file_is_refused_with_advice(tmp_path, content):
    (tmp_path / "paths.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"paths\.json cannot be read .*; note them again with `bdtool build BUNDLE"):
        read_masks(tmp_path, 3)


@pytest.mark.parametrize("mask", ['"1100"', '"11"', '"12x"', '""', "110", "[1, 1, 0]", "null"])
def test_mask_that_does_not_fit_the_network_is_refused_with_advice(tmp_path, mask):
    (tmp_path / "paths.json").write_text(f'{{"masks": [{{"mask": {mask}, "share": 1.0}}]}}')
    with pytest.raises(BundleError, match=r"paths\.json: .* is not a mask of 3 bits; note them again with"):
        read_masks(tmp_path, 3)


def test_shares_of_more_than_all_images_are_refused_with_advice(tmp_path):
    (tmp_path / "paths.json").write_text('{"masks": [{"mask": "110", "share": 0.9}, {"mask": "111", "share": 0.7}]}')
    with pytest.raises(
        BundleError, match=r"paths\.json: its shares are 1\.6 of the images together.*; note them again"
    ):
        read_masks(tmp_path, 3)


@pytest.mark.parametrize("share", ["-0.1", "1.1", "NaN"])
def test_share_that_is_none_is_refused_with_advice(tmp_path, share):
    (tmp_path / "paths.json").write_text(f'{{"masks": [{{"mask": "110", "share": {share}}}]}}')
    with pytest.raises(BundleError, match=r"paths\.json: .* is not a share of the images, 0 to 1; note them again"):
        read_masks(tmp_path, 3)


def test_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(
        BundleError, match=r"paths\.json cannot be written \(No such file or directory\); clear the way"
    ):
        write_masks(tmp_path / "absent", [], source="sample", policy="learned")


_WRITE_WITHOUT_END = """
import sys
from pathlib import Path
from bdtool.runtime.masks import MaskCount, write_masks

for n in range(10**9):
    masks = [MaskCount(mask=format((n + i) % 2**16, "016b"), share=1 / 2000) for i in range(2000)]
    write_masks(Path(sys.argv[1]), masks, source=str(n), policy="learned")
    print(n, flush=True)
"""


@pytest.mark.parametrize("delay_ms", [0, 1, 2, 4])
def test_killed_writer_leaves_a_whole_file(tmp_path, delay_ms):
    command = [sys.executable, "-c", _WRITE_WITHOUT_END, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(3):
                process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=delay_ms / 1000)
        finally:
            os.kill(process.pid, signal.SIGKILL)
    masks = read_masks(tmp_path, 16)
    first = int(masks[0].mask, 2)
    assert len(masks) == 2000
    assert first >= 2  # the file of the third write or a later one


_WRITE_UNTIL_KILLED = """
import resource, signal, sys
from pathlib import Path
from bdtool.runtime.masks import MaskCount, write_masks

signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; by default it kills without a word, as SIGKILL does
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
write_masks(Path(sys.argv[1]), [MaskCount(mask="1" * 16, share=1.0)] * 2000, source="new", policy="learned")
"""


def test_writer_killed_in_the_middle_leaves_the_earlier_file(tmp_path):
    write_masks(tmp_path, [MaskCount(mask="0" * 16, share=1.0)], source="earlier", policy="learned")
    command = [sys.executable, "-c", _WRITE_UNTIL_KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    assert [count.mask for count in read_masks(tmp_path, 16)] == ["0" * 16]
    (leftover,) = tmp_path.glob(".paths.json.*")
    assert leftover.stat().st_size == 20_000  # it really was in the middle
