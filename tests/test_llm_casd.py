"""Shifts of hidden states, their distances, and transfer."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("transformers")

import tiny_llm
import torch

from bdu.llm.casd import (
    casd,
    casd_matrix,
    last_token_states,
    off_diagonal,
    spearman,
    transfer_matrix,
    transfer_record,
)
from bdu.llm.templates import Template


def prompts():
    template = Template(tiny_llm.tokenizer())
    return [template.prompt(example) for example in tiny_llm.rows(5)]


@pytest.mark.parametrize("make", [tiny_llm.llama, tiny_llm.gpt2])
def test_states_are_those_of_single_prompts_and_all_layers(make):
    model = make(1)
    found = last_token_states(model, prompts(), batch_size=3)
    assert not any(layer._forward_hooks for layer in model.modules())
    assert found.shape == (2, 5, 32)
    for row, prompt in enumerate(prompts()):
        with torch.no_grad():
            states = model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(found[0, row], states[1][0, -1], rtol=1e-4, atol=1e-4)


def shifts(seed):
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_alike_changes_have_no_distance_and_opposite_ones_the_largest():
    one = shifts(0)
    assert casd(one, one) == pytest.approx(0)
    assert casd(one, 7 * one) == pytest.approx(0)
    assert casd(one, -one) == pytest.approx(2)
    assert casd(one, one, distance="l2") == 0
    assert casd(one, 3 * one, distance="l2") == pytest.approx(0.5)
    assert casd(one, -one, distance="l2") == pytest.approx(1)


def test_distance_is_the_mean_over_layers_and_prompts():
    one, other = shifts(0), shifts(1)
    total = 0.0
    for layer in range(2):
        for row in range(3):
            a, b = one[layer, row].double(), other[layer, row].double()
            total += 1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    assert casd(one, other) == pytest.approx(total / 6)


def test_places_without_a_change_are_left_out():
    one, other = shifts(0), shifts(1)
    expected = casd(one[:, 1:], other[:, 1:])
    one[:, 0] = 0
    assert casd(one, other) == pytest.approx(expected)
    assert math.isnan(casd(torch.zeros(2, 3, 4), other))


def test_matrix_is_symmetric():
    matrix = casd_matrix([shifts(i) for i in range(3)])
    assert torch.equal(matrix, matrix.T)
    assert float(matrix[0, 2]) == pytest.approx(casd(shifts(0), shifts(2)))
    assert matrix.diagonal().tolist() == pytest.approx([0, 0, 0])
    assert len(off_diagonal(matrix)) == 6


def test_transfer_is_what_the_control_leaves_and_the_removal_does_not():
    rates = torch.tensor([[0.0, 0.3], [0.9, 0.1]])
    found = transfer_matrix(rates, torch.tensor([1.0, 0.8]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5], [0.1, 0.7]]))
    with pytest.raises(ValueError, match="control: expected"):
        transfer_matrix(rates, torch.zeros(3))


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 6, (20,), generator=generator).double()
    y = x + torch.randint(0, 6, (20,), generator=generator)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert spearman(x, -x) == pytest.approx(-1)
    assert math.isnan(spearman(x, torch.ones(20)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="distance: expected cosine or l2"):
        casd(shifts(0), shifts(1), distance="dot")
    with pytest.raises(ValueError, match="second: expected shifts"):
        casd(shifts(0), shifts(1)[:1])
    with pytest.raises(ValueError, match="y: expected"):
        spearman(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        last_token_states(tiny_llm.llama(), [])


def test_record_of_a_study_holds_all_matrices_as_plain_values():
    generator = torch.Generator().manual_seed(0)
    shifts = [torch.randn(2, 3, 4, generator=generator) for _ in range(3)]
    rates = [[0.0, 0.5, 1.0], [0.2, 0.0, 0.9], [0.9, 0.1, 0.0]]
    given = {"before": [1.0, 1.0, 1.0], "control": [1.0, 0.9, 1.0], "rates": rates}
    record = transfer_record(["a", "b", "c"], **given, shifts=shifts)
    assert json.loads(json.dumps(record)) == record
    assert record["transfer"][0] == pytest.approx([1.0, 0.4, 0.0])
    for distance in ("cosine", "l2"):
        matrix = casd_matrix(shifts, distance=distance)
        assert record["casd"][distance] == matrix.tolist()
        transfer = torch.tensor(record["transfer"])
        expected = spearman(off_diagonal(matrix), off_diagonal(transfer).double())
        assert record["spearman"][distance] == pytest.approx(expected)
    same = transfer_record(["a", "b", "c"], **given, shifts=[shifts[0]] * 3)
    assert same["spearman"]["cosine"] is None
    with pytest.raises(ValueError, match="control: expected 3 values, one for each name, got 2"):
        transfer_record(["a", "b", "c"], **{**given, "control": [1.0, 1.0]}, shifts=shifts)
    with pytest.raises(ValueError, match="shifts: expected 3, one for each name, got 1"):
        transfer_record(["a", "b", "c"], **given, shifts=shifts[:1])
