"""Every form of POLICY gives the keep matrix it promises, whatever the batching."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdtool.errors import PolicyError
from bdtool.models.model import BlockDropModel
from bdtool.models.parts import network_spec
from bdtool.runtime.policies import PolicyRequest, bits_of, keep_matrix_from, parse_policy, parse_policy_for
from bdtool.specs import keep_of

K = 15


def parse(text: str, *, n_blocks: int = K, has_policy_network: bool = False) -> PolicyRequest:
    return parse_policy(text, n_blocks=n_blocks, has_policy_network=has_policy_network)


def saved(path: Path, values: Any) -> str:
    np.save(path, np.asarray(values))
    return str(path)


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "learned"), ({"has_policy": False}, "all"), ({"has_policy": False, "mask": "101"}, "101")],
)
def test_default_is_what_the_network_was_trained_for(
    random_model: Callable[..., BlockDropModel], options: dict[str, Any], name: str
) -> None:
    network = network_spec(random_model("resnet8", **options))
    request = parse_policy_for(network, None)
    assert request.name == name
    assert request.is_learned == network.has_policy
    assert network.has_policy or bits_of(request.matrix(1)[0]) == {"all": "111"}.get(name, name)


def test_learned_has_no_fixed_matrix() -> None:
    with pytest.raises(ValueError, match="run the policy network"):
        parse("learned", has_policy_network=True).matrix(1)


def test_learned_without_policy_network_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"the model has no policy network\. Train one"):
        parse("learned")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("all", range(K)),
        ("none", []),
        ("first:0", []),
        ("first:4", range(4)),
        ("first:15", range(K)),
        ("distribute:0", []),
        ("distribute:1", [0]),
        ("distribute:4", [0, 3, 7, 11]),
        ("distribute:5", [0, 3, 6, 9, 12]),
        ("distribute:15", range(K)),
        ("100000000000011", [0, 13, 14]),
    ],
)
def test_fixed_policies_keep_these_blocks(text: str, kept: list[int]) -> None:
    matrix = parse(text, has_policy_network=True).matrix(2, first=5)
    assert matrix.dtype == np.bool_
    np.testing.assert_array_equal(matrix, [np.isin(np.arange(K), list(kept))] * 2)


@given(n_blocks=st.integers(1, 60), data=st.data())
def test_counted_policies_keep_exactly_k_blocks(n_blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n_blocks))
    for form in ("first", "random", "distribute"):
        matrix = parse(f"{form}:{count}", n_blocks=n_blocks).matrix(3)
        np.testing.assert_array_equal(matrix.sum(axis=1), [count] * 3)


@given(n_blocks=st.integers(1, 60), data=st.data())
def test_distributed_blocks_are_evenly_spaced_from_block_zero(n_blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n_blocks))
    kept = np.flatnonzero(parse(f"distribute:{count}", n_blocks=n_blocks).matrix(1)[0])
    gaps = np.diff([*kept, n_blocks])
    assert kept[0] == 0
    assert gaps.max() - gaps.min() <= 1


@given(n_blocks=st.integers(1, 60), seed=st.integers(0, 10**18 - 1), cut=st.integers(1, 19))
def test_random_does_not_depend_on_batching(n_blocks: int, seed: int, cut: int) -> None:
    request = parse(f"random:{n_blocks // 2}:{seed}", n_blocks=n_blocks)
    parts = [request.matrix(cut), request.matrix(20 - cut, first=cut)]
    np.testing.assert_array_equal(np.concatenate(parts), request.matrix(20))


def test_random_draws_each_block_equally_often() -> None:
    often = parse("random:5").matrix(6000).mean(axis=0)
    # 1/3 with a standard error of 0.006: five of them
    np.testing.assert_allclose(often, 1 / 3, atol=0.03)


def test_random_draws_differ_by_image_and_seed() -> None:
    matrix = parse("random:7").matrix(50)
    assert len(np.unique(matrix, axis=0)) > 40
    assert not np.array_equal(matrix, parse("random:7:1").matrix(50))


def test_random_range_draws_every_count_equally_often() -> None:
    request = parse("random:4-12:1")
    matrix = request.matrix(9000)
    # 1000 of each count with a standard deviation of 30
    np.testing.assert_allclose(np.bincount(matrix.sum(axis=1), minlength=13), [0] * 4 + [1000] * 9, atol=150)
    np.testing.assert_allclose(matrix.mean(axis=0), 8 / K, atol=0.03)
    np.testing.assert_array_equal(request.matrix(10, first=20), matrix[20:30])


def test_random_range_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"got LOW 12 above HIGH 4. Write random:4-12"):
        parse("random:12-4")


@pytest.mark.parametrize(
    ("n_blocks", "masks"),
    [(6, ["001101", "111000", "110001"]), (8, ["00110100", "01100010", "10000011"])],  # 8: whole steps of Philox
)
def test_random_draws_stay_the_same_between_versions(n_blocks: int, masks: list[str]) -> None:
    assert [bits_of(row) for row in parse("random:3:1", n_blocks=n_blocks).matrix(3)] == masks


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("random:3", "random:3:0"),
        ("random:3-3:2", "random:3:2"),
        ("random:3-5", "random:3-5:0"),
        ("first:03", "first:3"),
        (" all ", "all"),
    ],
)
def test_name_is_canonical(text: str, name: str) -> None:
    assert parse(text).name == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "some",
        "first",
        "first:",
        "first:x",
        "first:-1",
        "first:1:2",
        "random:1:x",
        "random:1-",
        "012",
        "ALL",
        "first:1.5",
    ],
)
def test_unknown_policy_lists_the_forms(text: str) -> None:
    with pytest.raises(PolicyError, match=r"one of: learned\[:THRESHOLD\], all, none, first:K, random:K\[:SEED\]"):
        parse(text)


@pytest.mark.parametrize("form", ["first", "random", "distribute"])
def test_more_blocks_than_the_model_has_are_refused(form: str) -> None:
    with pytest.raises(
        PolicyError, match=f"policy '{form}:16': got K = 16, the model has 15 blocks. Use K from 0 to 15"
    ):
        parse(f"{form}:16")


def test_bits_of_another_length_are_refused() -> None:
    with pytest.raises(PolicyError, match="policy '0101': got 4 bits, the model has 15 blocks"):
        parse("0101")


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_file_of_one_row_serves_every_image(tmp_path: Path, dtype: type) -> None:
    row = np.arange(K) % 2
    request = parse(saved(tmp_path / "policy.npy", row.astype(dtype)))
    np.testing.assert_array_equal(request.matrix(1000, first=7), np.tile(row == 1, (1000, 1)))
    assert request.name == bits_of(row)  # which gives the same policy where the file is not
    np.testing.assert_array_equal(keep_of(request.name), row == 1)


def test_file_of_rows_serves_image_by_image(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 2, (5, K))
    request = parse(saved(tmp_path / "policy.npy", rows))
    np.testing.assert_array_equal(request.matrix(2, first=3), rows[3:] == 1)
    np.testing.assert_array_equal(request.matrix_at(np.array([0, 2, 3])), rows[[0, 2, 3]] == 1)


@pytest.mark.parametrize("text", ["random:3", "random:1-5:7", "distribute:3", "all"])
def test_image_has_the_same_bits_in_every_sample(text: str) -> None:
    rows = np.array([0, 3, 4, 5, 17, 900])
    np.testing.assert_array_equal(parse(text).matrix_at(rows), parse(text).matrix(901)[rows])


def test_file_of_as_many_rows_as_images_is_read(tmp_path: Path) -> None:
    for n in (1, 2):
        request = parse(saved(tmp_path / "policy.npy", np.eye(n, K)))
        np.testing.assert_array_equal(request.matrix(n), np.eye(n, K))
        assert request.matrix(0).shape == (0, K)


def test_file_shorter_than_the_data_is_refused(tmp_path: Path) -> None:
    request = parse(saved(tmp_path / "policy.npy", np.ones((5, K))))
    with pytest.raises(
        PolicyError, match=r"policy\.npy: has 5 rows, but image 5 .* needs row 5. Give a row for each image"
    ):
        request.matrix(2, first=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(14), r"policy\.npy: got shape \[14\], expected \[15\] or \[N, 15\]"),
        (np.ones((0, K)), r"got shape \[0, 15\]"),
        (np.ones((1, 1, K)), r"got shape \[1, 1, 15\]"),
        (np.full(K, 2), "got the value 2"),
        (np.full(K, np.nan), "got the value nan"),
        (np.full(K, "1"), "got dtype <U1"),
        (np.array([None] * K), "not a readable .npy file"),
    ],
)
def test_file_with_other_values_is_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(saved(tmp_path / "policy.npy", values))


def test_missing_file_is_named() -> None:
    with pytest.raises(PolicyError, match=r"policy gone\.npy: no such file"):
        parse("gone.npy")


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.save(whole, np.ones(K))
    for content in (b"", b"hello", whole.getvalue()[:100], whole.getvalue()[:-8], b"\x93NUMPY\x01\x00\x02\x00{["):
        (tmp_path / "policy.npy").write_bytes(content)
        with pytest.raises(PolicyError, match=r"policy\.npy: not a readable \.npy file"):
            parse(str(tmp_path / "policy.npy"))


def test_matrix_belongs_to_the_caller(tmp_path: Path) -> None:
    for text in ("all", "random:3", saved(tmp_path / "policy.npy", np.ones((2, K)))):
        request = parse(text)
        before = request.matrix(2)
        request.matrix(2)[:] = False
        np.testing.assert_array_equal(request.matrix(2), before)


@pytest.mark.parametrize("policy", [[1, 0, 1], [[1, 0, 1], [1, 0, 1]], np.array([True, False, True]), (1.0, 0.0, 1.0)])
def test_given_policies_become_a_keep_matrix(policy: Any) -> None:
    matrix = keep_matrix_from(policy, 2, 3)
    assert matrix.dtype == np.bool_
    np.testing.assert_array_equal(matrix, [[True, False, True]] * 2)


def test_given_array_is_not_shared() -> None:
    given_bits = np.ones((2, 3), dtype=bool)
    keep_matrix_from(given_bits, 2, 3)[:] = False
    assert given_bits.all()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([1, 0], r"got shape \[2\], expected \[3\] or \[N, 3\]"),
        ([[1, 0, 1]], "got 1 rows for 2 images"),
        ([0.5, 0, 1], "got the value 0.5"),
        ([np.nan, 0, 1], "got the value nan"),
        ([-1, 0, 1], "got the value -1"),
        ("101", r"got shape \[\]"),
        (["1", "0", "1"], "got dtype <U1"),
        ([None, 0, 1], "got dtype object"),
        ([[1, 0, 1], [1, 0]], "rows differ in length"),
        (torch.ones(3, requires_grad=True), "the Tensor cannot be read .*grad.*Give a numpy array of 3 values"),
        (torch.ones(3, device="meta"), "the Tensor cannot be read .*Give a numpy array of 3 values"),  # as of a GPU
    ],
)
def test_other_given_policies_are_refused(policy: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        keep_matrix_from(policy, 2, 3)
