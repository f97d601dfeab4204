"""`fisher_diagonal` on models as people have them, against a batch-1 loop in float64."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bdu
from bdu import models
from bdu.fisher import FisherAccumulator, fisher_diagonal

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, CLASSES = 50, 7, 3


def log_loss(logits, y):
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=-100, reduction="sum")


def by_loop(model, x, y, loss=log_loss):
    model = copy.deepcopy(model).double()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(y)):
        one = {k: v[i : i + 1] for k, v in x.items()}
        one = {k: v.double() if v.is_floating_point() else v for k, v in one.items()}
        value = loss(model(**one).logits, y[i : i + 1])
        value.sum().backward()
        for name, p in parameters.items():
            if p.grad is not None:
                total[name] += p.grad.square() / len(y)
                p.grad = None
    return total


def assert_equal(found, expected, dtype=torch.float64):
    assert found.keys() == expected.keys()
    tolerance = 2**11 * torch.finfo(dtype).eps
    # a key's bias has no influence on a softmax: its gradient is rounding of its neighbours'
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        scale = max(float(value.max()), largest * 1e-6)
        torch.testing.assert_close(
            found[name].double(),
            value,
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def exact(model, x, y, *, batch_size=3, warns=()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fisher_diagonal(model, [(x, y)], batch_size=batch_size, progress=False)
    ours = [str(w.message) for w in caught if "fisher_diagonal" in str(w.message)]
    assert len(ours) == bool(warns), ours
    for name in warns:
        assert name in ours[0]
    assert_equal(found, by_loop(model, x, y))
    return found


def stirred(model):
    """Eval mode, float64, and no parameter at a special value such as 0 or 1."""
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return model.double().eval()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(11)


def text(count=5):
    """Token ids with padding at the end, at the start, and a sequence without."""
    ids = torch.randint(VOCABULARY, (count, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def next_tokens(x):
    y = torch.randint(VOCABULARY, x["input_ids"].shape)
    return y.masked_fill(x["attention_mask"] == 0, -100)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=12,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return stirred(transformers.GPT2LMHeadModel(config))


def llama(**changes):
    config = transformers.LlamaConfig(
        **{**SMALL, "num_key_value_heads": 2, "use_cache": False, **changes}
    )
    return stirred(transformers.LlamaForCausalLM(config))


def qwen2():
    config = transformers.Qwen2Config(
        **SMALL, num_key_value_heads=2, use_cache=False, tie_word_embeddings=True
    )
    return stirred(transformers.Qwen2ForCausalLM(config))


def qwen3():
    config = transformers.Qwen3Config(
        **SMALL, num_key_value_heads=2, head_dim=4, use_cache=False, tie_word_embeddings=True
    )
    return stirred(transformers.Qwen3ForCausalLM(config))


CAUSAL = {"gpt2": gpt2, "llama": llama, "qwen2, tied": qwen2, "qwen3, tied": qwen3}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_language_model(name, batch_size):
    x = text()
    exact(CAUSAL[name](), x, next_tokens(x), batch_size=batch_size)


@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
def test_encoder_with_a_head_on_its_first_token(kind):
    names = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20}
    small = SMALL if kind == "Bert" else {**names, "vocab_size": VOCABULARY, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**small, num_labels=CLASSES)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    exact(stirred(model), text(), torch.arange(5) % CLASSES)


def images(size):
    return {"pixel_values": torch.randn(5, 3, size, size).double()}, torch.arange(5) % CLASSES


def vision(kind, **settings):
    config = getattr(transformers, f"{kind}Config")(**settings, num_labels=CLASSES)
    return stirred(getattr(transformers, f"{kind}ForImageClassification")(config))


def test_vision_transformer():
    widths = {"hidden_size": 12, "intermediate_size": 24}
    depths = {"num_hidden_layers": 2, "num_attention_heads": 2}
    exact(vision("ViT", **widths, **depths, image_size=8, patch_size=4), *images(8))


def test_residual_network():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}
    exact(vision("ResNet", **sizes, layer_type="bottleneck"), *images(32))


def test_depthwise_convolutions_and_layer_scale():
    sizes = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
    exact(vision("ConvNext", **sizes), *images(32))


def test_windows_folded_into_the_batch_and_one_parameter_that_is_indexed():
    sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    model = vision("Swin", **sizes, image_size=16, patch_size=2)
    exact(model, *images(16), warns=["relative_position_bias_table"])


class Encoder(nn.Module):
    """As torchvision writes a vision transformer: class token, positions, torch's attention."""

    def __init__(self, width=12, patches=4):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))
        self.gamma = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixel_values):
        h = self.patch(pixel_values).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
        a = self.norm(h)
        h = h + self.gamma * self.attention(a, a, a, need_weights=False)[0]
        h = h + self.mlp(h)
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.head(h[:, 0]))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_vision_transformer_of_torchvisions_kind(batch_size):
    exact(stirred(Encoder()), *images(8), batch_size=batch_size)


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.model(pixel_values))


@pytest.mark.parametrize("name", ["resnet18-w4", "wrn16-1", "smallcnn"])
def test_our_own_networks(name):
    model = stirred(Wrapped(models.build(name, num_classes=CLASSES)))
    x, y = images(32)
    exact(model, x, y)


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config).double()
    for p in adapted.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    return adapted


# raised inside of peft for its use of transformers
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_alone_are_measured():
    model, x = lora(llama()), text()
    found = exact(model, x, next_tokens(x))
    assert all("lora" in name for name in found)
    assert len(found) == 8


def checkpoint(model, use_reentrant):
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("make", [llama, gpt2])
def test_checkpointed_activations_are_recomputed(make):
    model, x = make(), text()
    y = next_tokens(x)
    expected = by_loop(model, x, y)
    checkpoint(model, use_reentrant=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()  # checkpoints are for training
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = fisher_diagonal(model, [(x, y)], batch_size=3, progress=False)
    assert_equal(found, expected)


def test_checkpoints_of_the_old_kind_are_refused_by_name():
    model, x = llama(), text()
    checkpoint(model, use_reentrant=True)
    model.train()
    with pytest.raises(ValueError, match="use_reentrant=False, got True"):
        fisher_diagonal(model, [(x, next_tokens(x))], progress=False)


def test_autocast_gives_the_fisher_of_the_rounded_model():
    model, x = llama().float(), text()
    y = next_tokens(x)
    expected = by_loop(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = fisher_diagonal(model, [(x, y)], progress=False)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        error = float((found[name] - value).norm() / value.norm())
        assert error < 16 * torch.finfo(torch.bfloat16).eps, name


def test_several_losses():
    model, x = gpt2(), text()
    y = next_tokens(x)

    def sequence_margin(logits, y):
        return logits.gather(2, y.clamp_min(0).unsqueeze(2)).squeeze(2).tanh().sum(1)

    found = fisher_diagonal(model, [(x, y)], loss=sequence_margin, batch_size=2, progress=False)
    assert_equal(found, by_loop(model, x, y, sequence_margin))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_accumulator_gives_the_training_steps_gradient_too(make):
    model, x = make(), text()
    y = next_tokens(x)
    twin = copy.deepcopy(model)
    log_losses = [log_loss(twin(**{k: v[i : i + 1] for k, v in x.items()}).logits, y[i : i + 1])
                  for i in range(len(y))]  # fmt: skip
    (sum(log_losses) / len(y)).backward()
    accumulator = FisherAccumulator(model)
    losses = accumulator.backward(x, y)
    # Llama normalises in float32 whatever its dtype
    tolerance = 2**6 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(losses, torch.stack(log_losses).detach())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    accumulator.backward(x, y)  # gradients add up, as with autograd
    table, other = model.get_input_embeddings().weight, twin.get_input_embeddings().weight
    torch.testing.assert_close(table.grad, 2 * other.grad, rtol=tolerance, atol=tolerance)
    assert accumulator.samples == 10
    assert_equal(accumulator.diagonal(), by_loop(twin, x, y))


def test_fisher_kept_on_another_device_is_added_there():
    model, x = gpt2(), text()
    y = next_tokens(x)
    here = fisher_diagonal(model, [(x, y)], progress=False)
    there = fisher_diagonal(model, [(x, y)], fisher_device="cpu", progress=False)
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_gamma_of_zero_has_a_fisher():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, CLASSES)).double()
    with torch.no_grad():
        model[1].weight[:3] = 0
    x, y = torch.randn(5, 4).double(), torch.arange(5) % CLASSES
    found = fisher_diagonal(model, (x, y), progress=False)
    assert (found["1.weight"] > 0).all()


def test_mixed_samples_are_refused_with_the_reason():
    model = nn.Linear(4, CLASSES)
    x, y = torch.randn(5, 4), torch.arange(5) % CLASSES

    def centred(logits, y):
        values = F.cross_entropy(logits, y, reduction="none")
        return values * values.mean()

    with pytest.raises(ValueError, match=r"^loss: expected samples that do not depend"):
        fisher_diagonal(model, (x, y), loss=centred, progress=False)

    class BatchStatistics(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

        def forward(self, x):
            h = self.layer(x)
            return self.head(h - h.mean(0))

    with pytest.raises(ValueError, match=r"^model: expected samples .*through layer\.weight"):
        fisher_diagonal(BatchStatistics(), (x, y), progress=False)


def test_stopped_computation_goes_on_where_it_was(tmp_path, monkeypatch):
    model, x = gpt2(), text()
    y = next_tokens(x)
    file = tmp_path / "sums.pt"
    expected = fisher_diagonal(model, [(x, y)], batch_size=2, labels="model", progress=False)
    seen = []

    def batches(stop):
        for i in range(0, 5, 2):
            if i == stop:
                raise KeyboardInterrupt
            yield {k: v[i : i + 2] for k, v in x.items()}, y[i : i + 2]

    options = {"labels": "model", "progress": False, "resume": file}
    with pytest.raises(KeyboardInterrupt):
        fisher_diagonal(model, batches(4), **options)
    assert file.exists()
    with pytest.raises(ValueError, match=r"sums\.pt: expected .* another labels"):
        fisher_diagonal(model, batches(-1), progress=False, resume=file)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    with pytest.raises(ValueError, match=r"sums\.pt: expected .* another model"):
        fisher_diagonal(other, batches(-1), **options)

    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda *a, **k: seen.append(len(k["input_ids"])) or forward(*a, **k)
    )
    found = fisher_diagonal(model, batches(-1), **options)
    assert seen == [1, 1, 1] or seen[-1] == 1  # the trial runs, and the last batch alone
    assert not file.exists()
    assert_equal(found, expected)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_tokens_as_samples_are_squared_token_by_token(batch_size):
    model, x = gpt2(), text()
    y = next_tokens(x)
    total, tokens = None, 0
    for b in range(len(y)):
        for t in range(y.shape[1]):
            if y[b, t] == -100:
                continue
            alone = torch.full_like(y[b : b + 1], -100)
            alone[0, t] = y[b, t]
            one = by_loop(model, {k: v[b : b + 1] for k, v in x.items()}, alone)
            total = one if total is None else {n: total[n] + one[n] for n in one}
            tokens += 1
    expected = {name: value / tokens for name, value in total.items()}
    options = {"sample": "token", "batch_size": batch_size, "progress": False}
    assert_equal(fisher_diagonal(model, [(x, y)], **options), expected)
    with pytest.raises(ValueError, match='sample: expected "sequence" beside a callable'):
        fisher_diagonal(model, [(x, y)], sample="token", loss=log_loss)
    with pytest.raises(ValueError, match=r'loader: expected y \(B, T\) with sample="token"'):
        fisher_diagonal(nn.Linear(2, 3), (torch.ones(4, 2), torch.zeros(4).long()), sample="token")


def test_larger_batches_of_a_loader_are_cut():
    model, x = gpt2(), text()
    y = next_tokens(x)
    whole = fisher_diagonal(model, [(x, y)], progress=False)
    cut = fisher_diagonal(model, [(x, y)], batch_size=2, progress=False)
    assert_equal(cut, whole)
    assert math.isfinite(sum(float(value.sum()) for value in whole.values()))
    assert bdu.fisher_diagonal is fisher_diagonal
