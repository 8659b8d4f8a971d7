import pytest
import torch

from sphereify.errors import UsageError
from sphereify.nn.precision import (
    CHANNELS_LAST,
    accumulated,
    compute_dtype,
    fit_into,
    is_channels_last,
    is_plain,
    no_autocast,
    runs_eagerly,
)
from tests.nn.oracle import normal


@pytest.mark.parametrize("dim", CHANNELS_LAST)
def test_channels_are_last_in_the_layouts_of_that_name_only(dim):
    x = normal(2, 3, *[4] * (dim - 2))
    assert is_channels_last(x.contiguous(memory_format=CHANNELS_LAST[dim]))
    assert not is_channels_last(x)
    assert not is_channels_last(x.transpose(1, 2))
    assert not is_channels_last(normal(2, 3, 4).transpose(1, 2))


def test_compute_dtype_is_that_of_torchs_product():
    x, weight = normal(2, 3, dtype=torch.float32), normal(4, 3, dtype=torch.float32)
    assert compute_dtype(x, weight) is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x, weight) is (x @ weight.t()).dtype is torch.bfloat16
        assert compute_dtype(x.double(), weight.double()) is torch.float64
        with no_autocast("cpu"):
            assert compute_dtype(x, weight) is torch.float32
    with pytest.raises(UsageError, match="expected one dtype"):
        compute_dtype(x, weight.double())


def test_sums_of_half_precision_are_in_fp32_and_others_in_their_own():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert accumulated(normal(2, dtype=dtype)).dtype is torch.float32
    double = normal(2)
    assert accumulated(double) is double


@pytest.mark.parametrize("longest", [None, torch.tensor(10.0)])
def test_samples_beyond_the_range_of_fp16_are_divided_down_and_others_stay(longest):
    x = torch.stack([normal(50), 1e6 * normal(50, seed=1), torch.zeros(50)]).float()
    got = fit_into(torch.float16, x, 50, longest)
    assert torch.equal(got[0], x[0].half())
    assert torch.equal(got[2], x[2].half())
    # The largest inner product with a filter of that length.
    assert got[1].float().norm() * (1.0 if longest is None else longest) <= 65504
    torch.testing.assert_close(torch.cosine_similarity(got[1].float(), x[1], dim=0).item(), 1.0, rtol=0, atol=1e-5)
    assert fit_into(torch.float32, x, 50) is x


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning", "ignore:.torch.jit.trace:DeprecationWarning")
def test_only_what_nothing_records_runs_eagerly():
    x = normal(3)
    seen = []
    with torch.no_grad():
        assert runs_eagerly(x, torch.nn.Parameter(x))
        assert not runs_eagerly(x, x.as_subclass(type("Own", (torch.Tensor,), {})))
        torch.func.vmap(lambda row: seen.append((runs_eagerly(row), is_plain(row))) or row)(x[None])
        torch.jit.trace(lambda x: seen.append((runs_eagerly(x), True)) or x + 1, x, check_trace=False)
    assert seen == [(False, False), (False, True)]
    assert not runs_eagerly(x)


def test_torch_compile_is_no_eager_run():
    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return x + 1 if runs_eagerly(x) else x - 1

    with torch.no_grad():
        assert torch.equal(compiled(torch.zeros(2)), -torch.ones(2))
