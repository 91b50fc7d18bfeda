"""The switch for sums that are the same on any number of processes; `projectors.exact` acts on it."""

_chosen = False


def use_exact_sums(mode: bool = True) -> None:
    """Carry out every sum of a float32 subspace in float64, and round it once; off (the default), as fast as it goes.

    A sum over shards is rounded in another order than on one process. The difference is an ulp, but an ulp of R can turn a code of
    its moments. With exact sums, weights, bases and codes have the same bits on any number of processes, but where a float64 error
    crosses a tie (one element in 10⁸). Call it on all processes, before the optimizer is built.

    Cost: float64 products, which consumer GPUs make at 1/64 of the speed; float64 copies of one matrix's gradient and weight at a
    time. For tests and for telling a change of arithmetic from a bug, not for long runs.
    """
    global _chosen
    _chosen = bool(mode)


def exact_sums() -> bool:
    """Whether `use_exact_sums` is on."""
    return _chosen
