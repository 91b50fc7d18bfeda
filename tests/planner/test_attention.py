"""Which kernel attention is planned with on a GPU: where torch takes the math kernel, the scores are counted."""

import pytest
import torch

import lowrank_optim as lo
from lowrank_optim.planner.simulation import pretend as simulation
from lowrank_optim.planner.simulation.pretend import EFFICIENT_TAKES_GROUPS, backward, pretend

HEADS, LENGTH, SIZE = 4, 192, 32
SCORES = HEADS * LENGTH * LENGTH  # elements of one sequence


def largest(dtype, kv_heads, masked=False):
    """The most elements in one block, forward and backward."""
    with pretend(torch.device("cuda")) as recorder:
        recorder.moment = simulation.Moment("", "forward", "")

        def made(heads):
            return torch.zeros(1, heads, LENGTH, SIZE, dtype=dtype, device="cuda", requires_grad=True)

        q, k, v = made(HEADS), made(kv_heads), made(kv_heads)
        mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool, device="cuda") if masked else None
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=not masked, enable_gqa=True
        )
        backward(out.sum())
        assert k.grad.shape == k.shape
        return max(block.size for block, _, _ in recorder.timeline.events) // dtype.itemsize


@pytest.mark.parametrize(
    ("dtype", "masked"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str
)
def test_groups_that_flash_attention_refuses_form_the_scores_before_torch_2_14(dtype, masked):
    assert (largest(dtype, 2, masked) < SCORES) == EFFICIENT_TAKES_GROUPS


@pytest.mark.parametrize(
    ("dtype", "kv_heads"), [(torch.bfloat16, 2), (torch.bfloat16, HEADS), (torch.float32, HEADS)], ids=str
)
def test_where_flash_or_memory_efficient_attention_runs_no_scores_are_counted(dtype, kv_heads):
    assert largest(dtype, kv_heads) == HEADS * LENGTH * SIZE


def test_a_plan_in_float32_counts_the_scores_of_grouped_attention():
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": HEADS * SIZE, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    plans = {d: lo.plan(config, "sgd", sequence_length=1024, dtype=d) for d in ("float32", "bfloat16")}
    scores = 2 * HEADS * 1024**2 * 4  # bytes of both layers
    assert plans["bfloat16"].activations_bytes < scores
    assert (plans["float32"].activations_bytes > scores) != EFFICIENT_TAKES_GROUPS
    said = any("by the math kernel, which keeps scores" in line for line in plans["float32"].assumptions)
    assert said != EFFICIENT_TAKES_GROUPS
