"""Removes each of k backdoors in turn and measures what happens to the others.

    BDU_DATA=FOLDER python bench/llm_small.py train --out MODEL
    BDU_DATA=FOLDER python bench/llm_generalization.py --model MODEL --runs RUNS --seeds 0 1 2

For each seed: k backdoors are planted (bench/llm_small.py); each is unlearnt by its clean answer,
from the planted model; the control sees the same number of steps on clean rows alone. Recorded are
the transfer matrix against the control, CASD, their rank correlation, and plant-and-remove with the
attacker's rates before, between and after both stages, beside clean fine-tuning of as many steps.

What is there already is taken as it is, so it can be interrupted. RUNS/results.json has all
figures, RUNS/*.png two heat maps and a scatter where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from bdu.checkpoint import atomic_write
from bdu.llm import models
from bdu.llm.casd import (
    casd_matrix,
    last_token_states,
    off_diagonal,
    spearman,
    transfer_matrix,
)
from bdu.llm.data import TextData, read_examples
from bdu.llm.generation import evaluate
from bdu.llm.methods import CleanAnswer
from bdu.llm.run import PLANT_AND_REMOVE, Measuring, Settings, unlearn
from bdu.llm.templates import Template
from bdu.llm.trainer import UnlearnTrainer
from bdu.runs import versions

PROBES = 64


class Planted:
    """A planted model and what its defender and its evaluator hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        specs = json.loads((folder / "backdoors.json").read_text())
        self.names = [spec["name"] for spec in specs]
        self.clean = tuple(read_examples(folder / "clean.jsonl"))
        self.evaluator = tuple(read_examples(folder / "eval.jsonl"))
        self.known = {n: tuple(read_examples(folder / f"{n}.jsonl")) for n in self.names}
        self.asked = {n: tuple(read_examples(folder / f"eval_{n}.jsonl")) for n in self.names}
        self.template = Template(models.load_tokenizer(folder))

    def model(self) -> Any:
        """A fresh copy."""
        return models.load_model(self.folder)

    def rates(self, model: Any) -> dict[str, Any]:
        """Of every trigger, and of the clean rows."""
        options: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 100}
        found = evaluate(model, self.template, self.evaluator, **options).rates
        asr = {
            name: evaluate(model, self.template, self.evaluator[:1], asked, **options).rates
            for name, asked in self.asked.items()
        }
        return {
            "clean_accuracy": found["clean_accuracy"],
            "perplexity": found["perplexity"],
            "asr": [asr[name]["attack_success_rate"] for name in self.names],
        }

    def states(self, model: Any) -> torch.Tensor:
        """Of the probe prompts."""
        prompts = [self.template.prompt(example) for example in self.evaluator[:PROBES]]
        return last_token_states(model, prompts, batch_size=PROBES)


def remove(planted: Planted, name: str | None, seed: int, o: argparse.Namespace, out: Path) -> Any:
    """The model without one backdoor, or after clean training alone."""
    model = planted.model()
    args = TrainingArguments(
        str(out),
        max_steps=o.steps,
        per_device_train_batch_size=o.batch_size,
        learning_rate=o.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        seed=seed,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    known = () if name is None else planted.known[name]
    data = TextData(planted.clean, known)
    UnlearnTrainer(
        model,
        args,
        method=CleanAnswer(),
        data=data,
        template=planted.template,
        ewc_lambda=o.ewc_lambda,
        fisher="clean" if o.ewc_lambda > 0 else None,
    ).train()
    return model


def one_seed(seed: int, o: argparse.Namespace) -> dict[str, Any]:
    """All figures of one seed."""
    folder = o.runs / f"seed_{seed}"
    if not (folder / "planted" / "planting.json").exists():
        subprocess.run(
            [
                *(sys.executable, str(Path(__file__).with_name("llm_small.py")), "plant"),
                *("--model", str(o.model), "--backdoors", str(o.backdoors)),
                *("--seed", str(seed), "--out", str(folder / "planted")),
            ],
            check=True,
        )
    planted = Planted(folder / "planted")
    start = planted.model()
    states = planted.states(start)
    stages: dict[str, dict[str, Any]] = {"before": planted.rates(start)}
    shifts = {}
    for name in ("control", *planted.names):
        model = remove(planted, None if name == "control" else name, seed, o, folder / "work")
        stages[name] = planted.rates(model)
        shifts[name] = planted.states(model) - states
        print(seed, name, json.dumps(stages[name]), flush=True)
    rates = torch.tensor([stages[name]["asr"] for name in planted.names], dtype=torch.float64)
    control = torch.tensor(stages["control"]["asr"], dtype=torch.float64)
    transfer = transfer_matrix(rates, control)
    distances = {
        kind: casd_matrix([shifts[name] for name in planted.names], distance=kind)
        for kind in ("cosine", "l2")
    }
    return {
        "seed": seed,
        "names": planted.names,
        "stages": stages,
        "transfer": transfer.tolist(),
        "casd": {kind: matrix.tolist() for kind, matrix in distances.items()},
        "spearman": {
            kind: spearman(off_diagonal(matrix), off_diagonal(transfer))
            for kind, matrix in distances.items()
        },
        "plant_and_remove": defended(planted, seed, o, folder),
    }


def defended(planted: Planted, seed: int, o: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Plant-and-remove, and clean fine-tuning of as many steps."""
    measure = Measuring(TextData(planted.evaluator[:1], ()), max_new_tokens=12, batch_size=100)
    rows = len(planted.clean) * 0.8 * 2
    settings = Settings(
        epochs=o.steps * o.batch_size / rows, batch_size=o.batch_size, lr=o.lr, plant_epochs=10
    )
    between: dict[str, Any] = {}

    class Between(Measuring):
        def __call__(self, model: Any, template: Template, rows: Any = None) -> Any:
            if rows is None:
                between.update(planted.rates(model))
            return super().__call__(model, template, rows)

    outcome = unlearn(
        planted.model(),
        planted.template,
        TextData(planted.clean, ()),
        method=PLANT_AND_REMOVE,
        measure=Between(measure.data, max_new_tokens=12, batch_size=100),
        settings=settings,
        seed=seed,
        work=folder / "work",
        progress=False,
    )
    steps = {"plant": 0, "unlearn": 0}
    for line in outcome.history:
        steps[line["phase"]] = max(steps[line["phase"]], line["step"])
    longer = argparse.Namespace(**{**vars(o), "steps": max(1, sum(steps.values()))})
    control = remove(planted, None, seed, longer, folder / "work")
    assert outcome.planted is not None
    return {
        "planted": between,
        "after": planted.rates(outcome.model),
        "clean_fine_tuning": planted.rates(control),
        "steps": steps,
        "own_trigger": {
            "planted": outcome.planted["planted_trigger"]["attack_success_rate"],
            "after": (outcome.planted_after or {}).get("attack_success_rate"),
        },
    }


def draw(results: list[dict[str, Any]], folder: Path) -> None:
    """Two heat maps, means over seeds, and a scatter of all pairs."""
    from matplotlib import pyplot

    names = results[0]["names"]
    for key, title in (("transfer", "Transfer"), ("casd", "CASD")):
        stack = torch.tensor([r[key]["cosine"] if key == "casd" else r[key] for r in results])
        figure, axes = pyplot.subplots(figsize=(5, 4.2), layout="constrained")
        image = axes.imshow(stack.mean(0), cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=45)
        axes.set_yticks(range(len(names)), names)
        axes.set(title=title, ylabel="removed", xlabel="measured" if key == "transfer" else "")
        figure.colorbar(image)
        figure.savefig(folder / f"{key}.png", dpi=150)
        pyplot.close(figure)
    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for r in results:
        x = off_diagonal(torch.tensor(r["casd"]["cosine"]))
        axes.scatter(x, off_diagonal(torch.tensor(r["transfer"])), label=f"seed {r['seed']}")
    axes.set(xlabel="CASD", ylabel="transfer")
    axes.legend()
    figure.savefig(folder / "scatter.png", dpi=150)
    pyplot.close(figure)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def main() -> None:
    """Run all seeds and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backdoors", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--ewc-lambda", type=float, default=0.0)
    o = parser.parse_args()
    results = []
    for seed in o.seeds:
        file = o.runs / f"seed_{seed}" / "result.json"
        if not file.exists():
            atomic_write(file, json.dumps(one_seed(seed, o)) + "\n")
        results.append(json.loads(file.read_text()))
    record = {"settings": {k: str(v) for k, v in vars(o).items()}, "versions": versions()}
    atomic_write(o.runs / "results.json", json.dumps({**record, "seeds": results}, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(results, o.runs)
    print("Spearman of CASD and transfer", spread([r["spearman"]["cosine"] for r in results]))
    print(
        "mean transfer",
        spread([float(off_diagonal(torch.tensor(r["transfer"])).mean()) for r in results]),
    )
    for stage in ("planted", "after", "clean_fine_tuning"):
        asr = [statistics.mean(r["plant_and_remove"][stage]["asr"]) for r in results]
        print(f"plant-and-remove, {stage}: mean ASR of unknown triggers", spread(asr))


if __name__ == "__main__":
    main()
