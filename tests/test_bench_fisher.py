"""The arms of bench/fisher.py compute what they are timed for."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCH = Path(__file__).parents[1] / "bench"
SAMPLES = 4
# Sums of a few hundred terms in float32 and in another order.
CLOSE = 1e-5


def load(name):
    """A benchmark by its path, as bench/ is no package; it finds its neighbours on the path."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


bench, arms, problems = load("fisher"), load("fisher_arms"), load("fisher_problems")
EXACT = [name for name, arm in arms.ARMS.items() if arm.is_exact]


def perceptron():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return problems.classifier(model, torch.randn(SAMPLES, 6), 3)


def convolutions():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False)
    )
    x = torch.randn(SAMPLES, 2, 6, 7)
    y = torch.randn(SAMPLES, 3, 3, 4)
    return problems.Problem(model.eval(), x, y, problems.functional, problems.functional)


def normalised():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 25, 3),
    )
    model[1].running_mean.normal_()
    return problems.classifier(
        model, torch.randn(SAMPLES, 2, 5, 5), 3, plain=problems.without_buffers
    )


PROBLEMS = {"perceptron": perceptron, "convolutions": convolutions, "normalised": normalised}


def problem(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return PROBLEMS[name]()


def choose(name, given):
    """The arm as the benchmark makes it; skips where its package is not installed."""
    try:
        return bench.chosen(arms.ARMS[name], given, given, bench.float64_loop(given))
    except problems.NotRun as reason:
        if "pip install" in str(reason):
            pytest.skip(str(reason))
        raise


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("model", ["perceptron", "convolutions"])
def test_an_exact_arm_gives_the_fisher_with_all_its_settings(name, model):
    given = problem(model)
    arm, _, (error, parameter) = choose(name, given)
    assert error < CLOSE, parameter
    truth = bench.float64_loop(given)
    first = dict(arm.settings)
    for setting, values in arm.choices().items():
        for value in values:
            arm.settings = {**first, setting: value}
            error, parameter = bench.worst_error(arm.squares(), truth)
            assert error < CLOSE, (setting, value, parameter)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in EXACT if n != "Opacus ExpandedWeights"])
def test_a_batch_norm_in_evaluation_mode_is_within_every_arm(name):
    _, _, (error, parameter) = choose(name, problem("normalised"))
    assert error < CLOSE, parameter


def test_what_a_library_cannot_run_is_given_as_the_reason():
    with pytest.raises(problems.NotRun, match="batch_norm"):
        choose("Opacus ExpandedWeights", problem("normalised"))


def test_a_missing_package_is_named(monkeypatch):
    def absent(package):
        raise arms.PackageNotFoundError(package)

    monkeypatch.setattr(arms, "version", absent)
    given = problem("perceptron")
    with pytest.raises(problems.NotRun, match="pip install opacus"):
        bench.chosen(arms.ARMS["Opacus hooks"], given, given, bench.float64_loop(given))


def test_the_square_of_the_batch_is_another_quantity_and_says_so():
    given = problem("perceptron")
    arm, _, (error, parameter) = choose("batch-mean² (inexact)", given)
    assert not arm.is_exact
    assert error > 0.1
    row = {"is_exact": arm.is_exact, "error": error, "worst_parameter": parameter}
    assert bench.error_of(row).startswith("inexact")


def test_an_arm_that_is_wrong_is_marked():
    row = {"is_exact": True, "error": 0.5, "worst_parameter": "0.weight"}
    assert "wrong" in bench.error_of(row)
    assert "wrong" not in bench.error_of({**row, "error": 1e-6})


def test_a_fisher_that_is_not_a_number_has_an_infinite_error():
    truth = {"weight": torch.ones(2, dtype=torch.float64)}
    error, _ = bench.worst_error({"weight": torch.tensor([1.0, float("nan")])}, truth)
    assert error == float("inf")


@pytest.mark.parametrize("model", ["vit", "gpt2"])
def test_plain_modules_compute_what_the_model_does(model):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    if model == "vit":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        images = {"intermediate_size": 12, "image_size": 8, "patch_size": 4, "num_labels": 3}
        network = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **images))
        given = problems.classifier(
            network, torch.rand(SAMPLES, 3, 8, 8), 3, plain=problems.PlainViT
        )
    else:
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 7, "n_positions": 9}
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        ends = {"bos_token_id": None, "eos_token_id": None}
        network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **none, **ends))
        x, y = torch.randint(7, (2, SAMPLES, 5))
        loss = (problems.cross_entropy, "cross_entropy")
        given = problems.Problem(network.eval(), x, y, *loss, plain=problems.PlainGPT2)
    arm, _, (error, parameter) = choose("bmm + square-sum", given)
    assert arm.form == arms.PLAIN
    assert error < CLOSE, parameter


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_the_memory_measure_sees_what_is_held_and_what_was_freed_again():
    cpu = torch.device("cpu")
    size = 100_000_000

    def held_for_a_moment():
        torch.ones(size, dtype=torch.uint8)

    # The kernel counts roughly, and the interpreter allocates meanwhile.
    assert bench.peak_bytes(held_for_a_moment, cpu) == pytest.approx(size, rel=0.05)
    assert bench.peak_bytes(lambda: None, cpu) < 0.05 * size


def test_the_table_has_a_line_for_what_did_not_run():
    where = {"device": "one", "threads": 1, "instruction_set": "avx2", "load_average": 0.0}
    where |= {"commit": "0", "date": "today", "versions": dict.fromkeys(("torch", *bench.RIVALS))}
    row = {"case": "mlp", "arm": "BackPACK", "ratio": None, "reason": "no rule for LayerNorm"}
    assert "| mlp | BackPACK | not run: no rule for LayerNorm |" in bench.table([row], where)
