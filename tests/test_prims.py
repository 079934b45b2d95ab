"""Semantic operators: each body against a naive formula, and against itself as a lowered graph."""

import hashed
import pytest
import reference
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from joint import program

from mkor_fx import prims
from mkor_fx.ir import verify
from mkor_fx.ops import ROW_SUMS, rows
from mkor_fx.passes.lower.expand import expand
from mkor_fx.passes.lower.shortcut_row_sums import shortcut_row_sums
from mkor_fx.rules import inverse_updates

STEP = torch.tensor(3)
GEOMETRIES = [  # kernel, stride, padding, dilation, surplus positions, groups
    ([3, 2], [1, 1], [0, 0], [1, 1], [0, 0], 1),
    ([3, 2], [2, 1], [1, 0], [1, 2], [0, 0], 1),
    ([1, 1], [2, 2], [0, 0], [1, 1], [1, 0], 1),
    ([2, 3], [3, 2], [2, 1], [2, 1], [0, 2], 1),
    ([3, 3], [1, 2], [2, 2], [2, 2], [0, 0], 3),
]


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spd(size, seed=0):
    root = randn(size, size, seed=seed)
    return root @ root.T / size + torch.eye(size, dtype=torch.float64) / 2


IMAGES, INDICES = randn(2, 3, 9, 8), torch.tensor([[4, 1, 1, 0], [2, 4, 4, 1]])
DAMPED = [
    (spd(size), [randn(r, size, seed=j) for j, r in enumerate(blocks)], torch.tensor(2), 0.9, 10.0, probes)
    for size, blocks, probes in ((5, [2], 5), (12, [3, 1], 8))
]
DAMPED_BY = [(spd(12), [randn(3, 12)], torch.tensor(2), torch.tensor(0.9), torch.tensor(10.0), 8)]
EXAMPLES = {
    prims.column_sum: [(randn(7, 3),)],
    prims.column_square_sum: [(randn(7, 3),)],
    rows.unfold_rows: [(IMAGES, *geometry) for geometry in GEOMETRIES],
    rows.patch_sum: [(IMAGES, *geometry) for geometry in GEOMETRIES],
    rows.one_hot_rows: [(INDICES, 6, padding, torch.float64) for padding in (-1, 1)],
    rows.histogram: [(INDICES, 6, padding, torch.float64) for padding in (-1, 1)],
    rows.member_rows: [(randn(7, 3), torch.tensor([0, 2, 2, 4, 0, 2, 3]), 4)],
    rows.place_rows: [(randn(7, 6), [], [6, 2, 9]), (randn(2, 7, 6), [2, 1, 4], [2, 0, 2, 3, 1, 5])],
    inverse_updates.inverse_update: [(spd(5), [randn(5, seed=j) for j in range(k)], 0.9, 0.1, 0.5) for k in (1, 2, 3)],
    inverse_updates.inverse_update_by: [
        (spd(5), [randn(5, seed=j) for j in range(k)], *map(torch.tensor, (0.9, 0.1, 0.5))) for k in (1, 2)
    ],
    prims.precondition: [
        (left, randn(4, 5), right) for left in (spd(4), None) for right in (spd(5), None)
    ],
    prims.rescale: [(randn(4, 5), randn(4, 5, seed=1)), (torch.zeros(4, 5), torch.ones(4, 5))],
    inverse_updates.damped_update: DAMPED,
    inverse_updates.damped_update_by: DAMPED_BY,
    inverse_updates.damped_roots: DAMPED,
    inverse_updates.damped_roots_by: DAMPED_BY,
    inverse_updates.inverse_root: [(torch.eye(4).double() + 0.1,), (-2 * torch.eye(4).double(),)],
    inverse_updates.unless_noise: [(randn(5), torch.tensor(noise, dtype=torch.float64)) for noise in (0.0, 1e9)],
    inverse_updates.scale_to: [(vector, 10.0) for vector in (randn(5), torch.zeros(5).double(), 1e-30 * randn(5))],
    inverse_updates.scale_to_by: [(randn(5), torch.tensor(10.0)), (torch.zeros(5).double(), torch.tensor(10.0))],
    prims.graft_rms: [(randn(4, 5),), (torch.zeros(4, 5),)],
    prims.rademacher: [(STEP, 1, 17, torch.float64)],
    prims.sketch: [(rows_NM, STEP + (7 << 32), 1, count) for rows_NM in (randn(7, 3), randn(2, 7, 3)) for count in (3, 30)],
}
CALLS = [pytest.param(op, args, id=f"{op}-{i}") for op in EXAMPLES for i, args in enumerate(EXAMPLES[op])]


def test_every_operator_has_an_example():
    assert set(EXAMPLES) == set(prims.BODIES)


@pytest.mark.parametrize("inductor", [False, True])
@pytest.mark.parametrize("op, args", CALLS)
def test_lowered_graph_computes_what_the_operator_does(op, args, inductor):
    leaves, spec = pytree.tree_flatten(args)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def call(*given):
        given = iter(given)
        filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return op(*pytree.tree_unflatten(filled, spec))

    step = program(call, *tensors)
    assert [n.target for n in step.graph.nodes if n.op == "call_function"] == [op]
    expand(step, inductor=inductor)
    verify(step, "lower")
    step.module.recompile()
    torch.testing.assert_close(step.module(*tensors), op(*args), rtol=0, atol=1e-13 if inductor else 0)


@pytest.mark.parametrize("op, args", CALLS)
def test_operator_is_what_its_schema_and_fake_results_say(op, args):
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_unfold_rows_are_what_a_convolution_multiplies_with_its_weight(geometry):
    kernel, stride, padding, dilation, surplus, groups = geometry
    weight = randn(6, 3 // groups, *kernel, seed=1)
    expected = F.conv2d(IMAGES, weight, None, stride, padding, dilation, groups)
    expected = expected[:, :, : expected.shape[2] - surplus[0], : expected.shape[3] - surplus[1]]
    rows_ENI = rows.unfold_rows(IMAGES, *geometry).reshape(groups, -1, weight[0].numel())
    products_ENO = rows_ENI @ weight.reshape(groups, -1, weight[0].numel()).mT
    actual = products_ENO.movedim(0, 1).flatten(1).unflatten(0, (2, *expected.shape[2:])).movedim(-1, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding_idx", [-1, 1])
def test_one_hot_rows_are_what_an_embedding_multiplies_with_its_weight(padding_idx):
    expected = F.one_hot(INDICES.flatten(), 6).double()
    expected[INDICES.flatten() == padding_idx] = 0
    assert torch.equal(rows.one_hot_rows(INDICES, 6, padding_idx, torch.float64), expected)


ROW_CASES = [
    pytest.param(reduction, producer, args, id=f"{reduction.__name__}-{producer.__name__}-{i}")
    for reduction, producer in ROW_SUMS
    for i, args in enumerate(EXAMPLES[producer])
]


@pytest.mark.parametrize("reduction, producer, args", ROW_CASES)
def test_row_sum_shortcut_equals_the_sum_over_its_rows(reduction, producer, args):
    behind = ()
    if reduction is prims.sketch:
        behind = (STEP, 0, 3)
    expected = reduction(producer(*args), *behind)
    actual = ROW_SUMS[reduction, producer](*args, *behind)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]

    def reduced(*given):
        made = producer(*given[: len(tensors)], *args[len(tensors) :])
        return reduction(made, *given[len(tensors) :], *behind[1:])

    step = program(reduced, *tensors, *behind[:1])
    shortcut_row_sums(step)
    made = step.graph.find_nodes(op="call_function", target=producer)
    assert all(node.args[0].target is reduction for node in made), "the rows are still made"
    expand(step)
    verify(step, "lower")
    step.module.recompile()
    assert torch.equal(step.module(*tensors, *behind[:1]), actual)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_inverse_update_is_the_inverse(k):
    factor, vectors = spd(6), [randn(6, seed=10 + j) for j in range(k)]
    scale, shift, weight = 0.9, 0.3, 0.7
    start = scale * factor + shift * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.inv(torch.linalg.inv(start) + weight * sum(torch.outer(v, v) for v in vectors))
    actual = inverse_updates.inverse_update(factor, vectors, scale, shift, weight)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(inverse_updates.inverse_update(factor, vectors, 1.0, 0.0, 0.0), factor)


def test_inverse_update_computes_in_the_dtype_of_the_vectors_and_keeps_that_of_the_factor():
    factor, vector = spd(6).to(torch.bfloat16), randn(6, dtype=torch.float32)
    actual = inverse_updates.inverse_update(factor, [vector], 0.9, 0.1, 1.0)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, inverse_updates.inverse_update(factor.float(), [vector], 0.9, 0.1, 1.0).to(torch.bfloat16))


def test_sums_over_bfloat16_rows_accumulate_in_float32():
    ones = torch.ones(1000, 3, dtype=torch.bfloat16)  # a bfloat16 sum of ones stops at 256
    images = torch.ones(1000, 1, 2, 2, dtype=torch.bfloat16)
    geometry = ([1, 1], [1, 1], [0, 0], [1, 1], [0, 0], 1)
    indices = torch.zeros(1000, dtype=torch.int64)
    shortcuts = [
        shortcut
        for (reduction, producer), shortcut in ROW_SUMS.items()
        if producer is rows.unfold_rows and reduction is not prims.sketch
    ]
    sums = [
        (prims.column_sum(ones), 1000.0),
        (prims.column_square_sum(ones), 1000.0),
        (rows.patch_sum(images, *geometry), 4000.0),
        (rows.histogram(indices, 1, -1, torch.bfloat16), 1000.0),
        *((shortcut(images, *geometry), 4000.0) for shortcut in shortcuts),
    ]
    for actual, expected in sums:
        assert actual.dtype == torch.float32
        assert (actual == expected).all()
    assert prims.column_sum(ones.double()).dtype == torch.float64


def test_precondition_multiplies_each_side_that_is_there():
    left, grad, right = randn(4, 4), randn(4, 5), randn(5, 5)
    torch.testing.assert_close(prims.precondition(left, grad, right), left @ grad @ right, rtol=1e-14, atol=1e-14)
    assert torch.equal(prims.precondition(left, grad, None), left @ grad)
    assert torch.equal(prims.precondition(None, grad, right), grad @ right)
    alone = prims.precondition(None, grad, None)
    assert torch.equal(alone, grad) and alone.data_ptr() != grad.data_ptr()
    assert prims.precondition(left, grad.bfloat16(), right).dtype == torch.bfloat16


def test_rescale_keeps_the_direction_and_takes_the_norm():
    direction, grad = randn(4, 5), randn(4, 5, seed=1)
    torch.testing.assert_close(prims.rescale(direction, grad), direction * grad.norm() / direction.norm())
    for broken in (torch.zeros(4, 5), torch.full((4, 5), float("nan")), torch.full((4, 5), float("inf"))):
        assert torch.equal(prims.rescale(broken.double(), grad), grad)
    zero = torch.zeros_like(grad)
    assert torch.equal(prims.rescale(direction, zero), zero)


def test_rademacher_signs_are_balanced_and_depend_on_step_and_side():
    def signs(step, side, size=4096):
        return prims.rademacher(torch.tensor(step), side, size, torch.float64)

    rows = torch.stack([signs(step, side) for step in range(8) for side in (0, 1)])
    assert (rows.abs() == 1).all()
    assert rows.mean(1).abs().max() < 5 / 64  # five standard deviations
    correlations = rows @ rows.T / 4096 - torch.eye(16)
    assert correlations.abs().max() < 5 / 64
    columns = torch.stack([signs(step, 0, 12) for step in range(4096)])
    assert (columns.T @ columns / 4096 - torch.eye(12)).abs().max() < 5 / 64, "indices are correlated over steps"
    assert torch.equal(signs(5, 1, 9), signs(5, 1, 4096)[:9])
    assert torch.equal(signs(5, 1).long(), reference.rademacher(5, 1, 4096))


def test_scale_to_gives_the_length_and_keeps_zero():
    for vector in (randn(5), 1e-30 * randn(5), 1e30 * randn(5)):
        scaled = inverse_updates.scale_to(vector.float(), 10.0)
        torch.testing.assert_close(scaled.norm() ** 2, torch.tensor(10.0))
        torch.testing.assert_close(scaled / scaled.norm(), (vector / vector.norm()).float())
    assert torch.equal(inverse_updates.scale_to(torch.zeros(5), 10.0), torch.zeros(5))


def test_unless_noise_compares_squared_lengths():
    vector = torch.tensor([3.0, 4.0])
    assert torch.equal(inverse_updates.unless_noise(vector, torch.tensor(24.9)), vector)
    assert torch.equal(inverse_updates.unless_noise(vector, torch.tensor(25.0)), torch.zeros(2))


def test_uniform_and_normal_numbers_are_a_hash_of_key_side_and_index():
    key, count = torch.tensor((5 << 32) + 2), 100_000
    uniform, normal = (draw(key, 3, count, torch.float64) for draw in (prims.uniforms, prims.normals))
    torch.testing.assert_close(uniform, hashed.uniforms(int(key), 3, count), rtol=0, atol=0)
    torch.testing.assert_close(normal, hashed.normals(int(key), 3, count), rtol=1e-12, atol=1e-14)
    single = prims.uniforms(key, 3, count, torch.float32)
    assert torch.equal(single.double(), uniform) and 0 < single.min() < single.max() < 1
    others = [prims.normals(key + 1, 3, count, torch.float64), prims.normals(key, 4, count, torch.float64), normal.roll(1)]
    assert max(abs((normal * other).mean()) for other in others) < 0.015
    moments = [(normal**power).mean() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.06)
    batch = torch.vmap(lambda key: prims.normals(key, 3, 50, torch.float64))(torch.stack([key, key + 1]))
    torch.testing.assert_close(batch, torch.stack([normal[:50], others[0][:50]]), rtol=0, atol=0)
