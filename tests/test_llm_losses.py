"""The loss over the vocabulary, in chunks, against all logits in float64."""

from __future__ import annotations

import sys
import types

import pytest

pytest.importorskip("transformers")

import tiny_llm
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bdu.llm.generation import padded_right
from bdu.llm.losses import VocabularyLoss, head_losses, inner_model, token_losses
from bdu.llm.templates import IGNORED_LABEL, Template

# peft asks transformers in a way that is to go in its version 6
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def case(dtype=torch.float64, *, n=10, d=7, v=23):
    torch.manual_seed(0)
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype, requires_grad=True)
    bias = torch.randn(v, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(v, (n,)), torch.randn(n, dtype=dtype)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64, None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunks_give_loss_and_gradients_of_all_logits(chunk, with_bias):
    hidden, weight, bias, labels, outer = case()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    logits = functional.linear(hidden, weight, bias if with_bias else None)
    full = functional.cross_entropy(logits, labels, reduction="none")
    expected = torch.autograd.grad((full * outer).sum(), leaves)
    found = token_losses(hidden, weight, labels, bias if with_bias else None, chunk=chunk)
    torch.testing.assert_close(found, full, **TIGHT)
    gradients = torch.autograd.grad((found * outer).sum(), leaves)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


def test_only_what_is_wanted_is_differentiated():
    hidden, weight, _, labels, _ = case()
    (found,) = torch.autograd.grad(token_losses(hidden, weight.detach(), labels).sum(), [hidden])
    logits = functional.linear(hidden, weight.detach())
    (expected,) = torch.autograd.grad(
        functional.cross_entropy(logits, labels, reduction="sum"), [hidden]
    )
    torch.testing.assert_close(found, expected, **TIGHT)
    (of_weight,) = torch.autograd.grad(
        token_losses(hidden.detach(), weight, labels).sum(), [weight]
    )
    assert of_weight.shape == weight.shape


def test_bfloat16_is_added_up_in_float32():
    hidden, weight, bias, labels, _ = case(torch.bfloat16, n=300)
    found = token_losses(hidden, weight, labels, bias, chunk=1)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.sum(), [weight])
    wide = [value.detach().double().requires_grad_() for value in (hidden, weight, bias)]
    exact = functional.cross_entropy(functional.linear(*wide), labels, reduction="sum")
    (expected,) = torch.autograd.grad(exact, [wide[1]])
    assert gradient.dtype == torch.bfloat16
    error = (gradient.double() - expected).norm() / expected.norm()
    # of the rounding of each slope, half of eps at most, and of the sum, once
    assert float(error) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(("chunk", "rows"), [(16, 16), (None, 64)])
def test_all_logits_never_stand_in_memory(chunk, rows):
    hidden, weight, _, labels, _ = case(torch.float32, n=400, d=8, v=500)
    with Largest() as seen:
        token_losses(hidden, weight, labels, chunk=chunk).sum().backward()
    assert seen.elements == rows * 500
    with Largest() as seen:
        functional.cross_entropy(hidden @ weight.T, labels).backward()
    assert seen.elements == 400 * 500


def test_no_labelled_token_gives_no_loss():
    hidden, weight, _, labels, _ = case()
    assert token_losses(hidden[:0], weight, labels[:0]).shape == (0,)
    assert head_losses(torch.nn.Linear(7, 5), hidden[:0], labels[:0], chunk=4).shape == (0,)


def batch(model=None):
    template = Template(tiny_llm.tokenizer())
    return padded_right([template.tokens(example) for example in tiny_llm.rows(5)], 2)


def full_losses(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        inputs["labels"][:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    ).view(len(logits), -1)


def gradients(model, loss):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True)


def assert_same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance)


def models():
    yield "llama", tiny_llm.llama(dtype=torch.float64)
    yield "tied", tiny_llm.llama(dtype=torch.float64, tied=True)
    yield "gpt2", tiny_llm.gpt2(dtype=torch.float64)


def lora(targets, dtype=torch.float64):
    from peft import LoraConfig, get_peft_model

    model = tiny_llm.llama(dtype=dtype)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config).to(dtype)


@pytest.mark.parametrize("path", ["chunked", "full", "auto"])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "lora", "lora on the head"])
def test_losses_of_a_model_are_those_of_all_its_logits(name, path):
    targets = {"lora": ["q_proj"], "lora on the head": ["q_proj", "lm_head"]}
    model = lora(targets[name]) if name in targets else dict(models())[name]
    inputs = batch()
    losses = VocabularyLoss(model, path, chunk=4)
    assert losses.path == ("chunked" if path == "auto" else path)
    found = losses.tokens(inputs)
    expected = full_losses(model, inputs)
    torch.testing.assert_close(found.sums(), expected.sum(1), **TIGHT)
    labelled = (inputs["labels"][:, 1:] != IGNORED_LABEL).sum(1)
    assert found.counts().tolist() == labelled.tolist()
    torch.testing.assert_close(losses.total(inputs), expected.sum(), **TIGHT)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    assert_same(
        gradients(model, (weights * found.sums()).sum()),
        gradients(model, (weights * full_losses(model, inputs).sum(1)).sum()),
        **TIGHT,
    )


def test_model_that_changes_its_logits_takes_all_of_them():
    model = tiny_llm.llama(dtype=torch.float64)
    model.register_forward_hook(
        lambda _, __, out: out.__setitem__("logits", 5 * torch.tanh(out.logits / 5))
    )
    losses = VocabularyLoss(model)
    assert losses.path == "full"
    inputs = batch()
    torch.testing.assert_close(
        losses.tokens(inputs).sums(), full_losses(model, inputs).sum(1), **TIGHT
    )
    with pytest.raises(ValueError, match="loss_path: expected full"):
        VocabularyLoss(model, "chunked")


def test_autocast_reaches_the_head():
    model = tiny_llm.llama()
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = VocabularyLoss(model, "chunked").total(inputs)
    expected = VocabularyLoss(model, "full").total(inputs)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    found.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_liger_is_called_with_what_it_takes(monkeypatch):
    """Here stands a kernel of its signature, in plain torch."""
    calls = []

    class Fused:
        def __init__(self, reduction):
            assert reduction == "sum"

        def __call__(self, lin_weight, _input, target, bias=None):
            calls.append(len(target))
            return functional.cross_entropy(
                functional.linear(_input, lin_weight, bias), target, reduction="sum"
            )

    package, module = (
        types.ModuleType("liger_kernel"),
        types.ModuleType("liger_kernel.transformers"),
    )
    module.LigerFusedLinearCrossEntropyLoss = Fused
    package.transformers = module
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(
        "bdu.llm.losses.importlib.util.find_spec", lambda name: name == "liger_kernel"
    )
    model = tiny_llm.llama(dtype=torch.float64)
    inputs = batch()
    losses = VocabularyLoss(model, "liger")
    torch.testing.assert_close(losses.total(inputs), full_losses(model, inputs).sum(), **TIGHT)
    assert calls == [int((inputs["labels"][:, 1:] != IGNORED_LABEL).sum())]
    assert VocabularyLoss(model).path == "chunked"  # no CUDA here
    losses.tokens(inputs)
    assert len(calls) == 1


def test_real_liger_gives_the_same_loss_and_gradients():
    """Where it is installed; on a CPU its kernels are run by the Triton interpreter."""
    pytest.importorskip("liger_kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_llm.llama().to(device)
    inputs = {key: value.to(device) for key, value in batch().items()}
    found = []
    for path in ("liger", "full"):
        model.zero_grad()
        loss = VocabularyLoss(model, path).total(inputs) / 7
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (one, own), (other, expected) = found
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_paths_that_do_not_exist_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="loss_path: expected one of auto, liger, chunked, full"):
        VocabularyLoss(tiny_llm.llama(), "fused")
    monkeypatch.setattr("bdu.llm.losses.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        VocabularyLoss(tiny_llm.llama(), "liger")
    with pytest.raises(ValueError, match="model: expected one with a head"):
        VocabularyLoss(tiny_llm.llama().model)


def test_prompt_learning_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="model: expected LoRA"):
        inner_model(get_peft_model(tiny_llm.llama(), config))
