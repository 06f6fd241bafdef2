"""The question to `dscoder plan`, and the sizes in it."""

import pytest

from dscoder.config.plan import PlanConfig, parse_bytes, parse_count, parse_rate


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("1.5 TB", 1_500_000_000_000), ("7B", 7), ("3KiB", 3072)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes("memory", text) == size


@pytest.mark.parametrize(
    ("text", "rate"), [("400GB/s", 4e11), ("3200Gbit/s", 4e11), ("1.5TB/s", 1.5e12), ("2GiB/s", 2 * 2**30)]
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate("node_bandwidth", text) == rate


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("10.2T", 10_200_000_000_000), ("225B", 225 * 10**9), ("4M", 4 * 10**6)],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count("tokens", text) == count


@pytest.mark.parametrize(
    "text", ["80", "GB", "80gb", "80 G", "80GB ", "-80GB", "8e10B", "1,000GB", "80GB/s", "0GB", "", "1.GB"]
)
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"plan: memory must be a size such as 80GB or 80GiB, got '"):
        parse_bytes("memory", text)


@pytest.mark.parametrize("text", ["400GB", "400Gb/s", "400 Gbps", "GB/s"])
def test_a_rate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="plan: node_bandwidth must be a rate such as 400GB/s"):
        parse_rate("node_bandwidth", text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpus": 0}, "gpus must be >= 1, got 0"),
        ({"gpus": 12}, "gpus must be a multiple of gpus_per_node = 8, got 12"),
        ({"gpu": "b200"}, "gpu must be one of h800, h100, h200, a100, a800, got 'b200'"),
        ({"memory": "80"}, "memory must be a size such as 80GB or 80GiB, got '80'"),
        ({"tokens": "many"}, "tokens must be a number such as 4096, 4M, 225B or 10.2T, got 'many'"),
        ({"node_bandwidth": "400GB"}, "node_bandwidth must be a rate .* got '400GB'"),
        ({"batch": 4, "batch_tokens": "4M"}, "batch and batch_tokens must not both be given, got 4 and 4M"),
        ({"micro": 0}, "micro must be >= 1, got 0"),
        ({"price": 0.0}, "price must be positive, got 0.0"),
        ({"slack": 0.9}, "slack must be >= 1, got 0.9"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"plan: {message}"):
        PlanConfig(**({"model": "v2", "gpus": 64} | fields))


def test_a_node_may_have_fewer_gpus_than_usual() -> None:
    assert PlanConfig(model="v2", gpus=4).gpus == 4
