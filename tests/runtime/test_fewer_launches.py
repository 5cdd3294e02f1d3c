"""What runs op by op on a GPU: fewer ops, the same logits, and the parameters that the model has at the call."""

import copy

import pytest
import torch

from kvrewrite.ir.fx import names_of_attributes
from kvrewrite.runtime.executor import Executor, fewer_launches
from tests.support.rewritten import rewritten

IDS = torch.randint(2, 60, (2, 21), generator=torch.Generator().manual_seed(3))


def logits(model, run=None):
    """Logits of a prompt and of two tokens after it."""
    model.executor = None if run is None else Executor(lambda given, _: run(*given.values()))
    cache = model.new_cache(2)
    with torch.no_grad():
        return torch.cat([model(ids, past_key_values=cache).logits for ids in IDS.split([19, 1, 1], 1)], 1)


@pytest.mark.parametrize("policy", ["h2o", "streaming_llm", "tova"])
def test_the_same_logits(policy):
    """With evictions, whole prompts and single tokens."""
    model = copy.deepcopy(rewritten("llama", policy, budget=8))
    assert torch.allclose(logits(model, fewer_launches(model.graph_module)), logits(model), atol=1e-5)


def test_fewer_calls():
    """Rotation is one op for queries and keys."""
    model = rewritten("llama", "h2o", budget=8)
    run = fewer_launches(model.graph_module)
    assert "turn_both" in run.__func__.__code__.co_names and run.__self__ is model.graph_module
    assert "turn_both" not in type(model.graph_module).forward.__code__.co_names


def test_parameters_that_are_replaced_are_read():
    """Another tensor under a parameter's name, as load_state_dict(assign=True) leaves it."""
    model = copy.deepcopy(rewritten("llama", "h2o", budget=8))
    run = fewer_launches(model.graph_module)
    before = logits(model, run)
    name = next(n for n in sorted(names_of_attributes(model.graph_module)) if n.endswith("embed_tokens.weight"))
    state = model.graph_module.state_dict()
    model.graph_module.load_state_dict({**state, name: state[name] * 1.5}, assign=True)
    after = logits(model, run)
    assert not torch.allclose(before, after, atol=1e-3) and torch.allclose(after, logits(model), atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_it_runs_the_fewer_ops():
    """Unless gradients are on."""
    model = copy.deepcopy(rewritten("llama", "h2o", budget=8)).cuda()
    with torch.no_grad():
        assert model._op_by_op() is not model.graph_module
        few = model(IDS.cuda(), past_key_values=model.new_cache(2)).logits
    assert model._op_by_op() is model.graph_module
    many = model(IDS.cuda(), past_key_values=model.new_cache(2)).logits
    assert torch.allclose(few, many, atol=1e-4)
