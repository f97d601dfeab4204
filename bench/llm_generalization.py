"""Removes each of k backdoors in turn and measures what happens to the others.

    BDU_DATA=FOLDER python bench/llm_small.py train --out MODEL
    BDU_DATA=FOLDER python bench/llm_generalization.py --model MODEL --runs RUNS --seeds 0 1 2

For each seed: k backdoors are planted (bench/llm_small.py); each is unlearnt by its clean answer,
from the planted model; the control sees the same number of steps on clean rows alone. Recorded are
the transfer matrix against the control, CASD, their rank correlation, and plant-and-remove with the
attacker's rates before, between and after both stages, beside clean fine-tuning of as many steps.

Every model that is measured is a cell, RUNS/seed_N/cells/NAME.json: what is there already is taken
as it is, so a study can be interrupted. RUNS/seed_N/transfer.json has a seed's matrices,
RUNS/results.json all figures, RUNS/*.png two heat maps and a scatter where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from llm_small import ASKING, measured
from transformers import TrainingArguments

from bdu.checkpoint import atomic_write, load_state_dict, save_state_dict
from bdu.llm import models
from bdu.llm.casd import last_token_states, off_diagonal, transfer_record
from bdu.llm.data import Example, TextData, read_examples
from bdu.llm.generation import evaluate
from bdu.llm.methods import CleanAnswer
from bdu.llm.rows import Collator, Kind, rows_of
from bdu.llm.run import PLANT_AND_REMOVE, Measuring, Settings, unlearn
from bdu.llm.templates import Template
from bdu.llm.trainer import UnlearnTrainer, clean_fisher
from bdu.runs import versions

PROBES = 64
CLEAN = ("clean_accuracy", "perplexity", "answer_perplexity", "text_perplexity")


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
        """Of every trigger, of the clean rows, and of stories."""
        found = measured(model, self.template, list(self.evaluator))
        asr = {
            name: evaluate(model, self.template, self.evaluator[:1], asked, **ASKING).rates
            for name, asked in self.asked.items()
        }
        return {
            **{key: found[key] for key in CLEAN},
            "asr": [asr[name]["attack_success_rate"] for name in self.names],
            "robust_accuracy": [asr[name]["robust_accuracy"] for name in self.names],
        }

    def fisher(self, o: argparse.Namespace) -> dict[str, torch.Tensor] | None:
        """Of the clean rows, taken once for all removals."""
        file = self.folder.parent / "fisher.safetensors"
        if o.ewc_lambda == 0:
            return None
        if not file.exists():
            rows = rows_of(self.template, self.clean, Kind.RETAIN)
            padding = self.template.tokenizer.pad_token_id
            found = clean_fisher(self.model(), rows, Collator(padding), batch_size=o.batch_size)
            save_state_dict(file, found)
        return load_state_dict(file)

    def states(self, model: Any) -> torch.Tensor:
        """Of the probe prompts."""
        prompts = [self.template.prompt(example) for example in self.evaluator[:PROBES]]
        return last_token_states(model, prompts, batch_size=PROBES)


class Cells:
    """What was measured already, by name."""

    def __init__(self, folder: Path, planted: Planted) -> None:
        self.folder, self.planted = folder, planted

    def __call__(
        self, name: str, make: Callable[[], tuple[Any, dict[str, Any]]]
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Rates and probe states of a model; it is made where they are not there.

        Args:
            make: gives the model, and what else to record.
        """
        file, states = self.folder / f"{name}.json", self.folder / f"{name}.safetensors"
        if not file.exists():
            start = time.perf_counter()
            model, more = make()
            save_state_dict(states, {"states": self.planted.states(model)})
            trained = time.perf_counter() - start
            record = {**self.planted.rates(model), **more, "seconds": trained}
            atomic_write(file, json.dumps(record, indent=1) + "\n")
            print(self.folder.parent.name, name, json.dumps(record), flush=True)
        return json.loads(file.read_text()), load_state_dict(states)["states"]


def trained(
    planted: Planted, known: tuple[Example, ...], seed: int, o: argparse.Namespace, steps: int
) -> Any:
    """The planted model after its clean answers were trained, with triggered rows or without."""
    model = planted.model()
    work = planted.folder.parent / "work"
    args = TrainingArguments(
        str(work),
        max_steps=steps,
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
    UnlearnTrainer(
        model,
        args,
        method=CleanAnswer(),
        data=TextData(planted.clean, known),
        template=planted.template,
        ewc_lambda=o.ewc_lambda,
        fisher=planted.fisher(o),
    ).train()
    return model


def one_seed(seed: int, o: argparse.Namespace) -> dict[str, Any]:
    """All figures of one seed."""
    folder = o.runs / f"seed_{seed}"
    keep_settings(folder / "settings.json", o)
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
    cells = Cells(folder / "cells", planted)
    before, start = cells("before", lambda: (planted.model(), {}))
    stages = {"before": before}
    shifts = {}
    for name in ("control", *planted.names):
        known = planted.known.get(name, ())
        stages[name], states = cells(
            name, lambda known=known: (trained(planted, known, seed, o, o.steps), {})
        )
        shifts[name] = states - start
    record = transfer_record(
        planted.names,
        before=before["asr"],
        control=stages["control"]["asr"],
        rates=[stages[name]["asr"] for name in planted.names],
        shifts=[shifts[name] for name in planted.names],
    )
    atomic_write(folder / "transfer.json", json.dumps(record, indent=1) + "\n")
    found = {"seed": seed, "stages": stages, **record}
    found["plant_and_remove"] = defended(planted, cells, seed, o)
    shutil.rmtree(folder / "work", ignore_errors=True)
    return found


def keep_settings(file: Path, o: argparse.Namespace) -> None:
    """Refuse cells of other settings."""
    named = ("model", "backdoors", "steps", "batch_size", "lr", "ewc_lambda")
    now = {name: str(getattr(o, name)) for name in named}
    if file.exists() and json.loads(file.read_text()) != now:
        raise SystemExit(f"{file}: expected cells made with {now}, got {file.read_text()}")
    atomic_write(file, json.dumps(now) + "\n")


def defended(planted: Planted, cells: Cells, seed: int, o: argparse.Namespace) -> dict[str, Any]:
    """Plant-and-remove, and clean fine-tuning of as many steps."""
    between: dict[str, Any] = {}

    class Between(Measuring):
        def __call__(self, model: Any, template: Template, rows: Any = None) -> Any:
            if rows is None:
                between.update(planted.rates(model))
            return super().__call__(model, template, rows)

    def both_stages() -> tuple[Any, dict[str, Any]]:
        rows = 2 * len(planted.clean) * (1 - Settings().validation)
        outcome = unlearn(
            planted.model(),
            planted.template,
            TextData(planted.clean, ()),
            method=PLANT_AND_REMOVE,
            measure=Between(TextData(planted.evaluator[:1], ()), **ASKING),
            settings=Settings(
                epochs=o.steps * o.batch_size / rows,
                batch_size=o.batch_size,
                lr=o.lr,
                ewc_lambda=o.ewc_lambda,
            ),
            seed=seed,
            work=planted.folder.parent / "work",
            progress=False,
        )
        assert outcome.planted is not None
        assert outcome.planted_after is not None
        steps = {"plant": 0, "unlearn": 0}
        for line in outcome.history:
            steps[line["phase"]] = max(steps[line["phase"]], line["step"])
        own = {
            "planted": outcome.planted["planted_trigger"]["attack_success_rate"],
            "after": outcome.planted_after["attack_success_rate"],
        }
        return outcome.model, {"planted": between, "steps": steps, "own_trigger": own}

    after, _ = cells("plant_and_remove", both_stages)
    as_many = sum(after["steps"].values())
    control, _ = cells("clean_fine_tuning", lambda: (trained(planted, (), seed, o, as_many), {}))
    return {
        "planted": after.pop("planted"),
        "steps": after.pop("steps"),
        "own_trigger": after.pop("own_trigger"),
        "after": after,
        "clean_fine_tuning": control,
    }


def draw(results: list[dict[str, Any]], folder: Path) -> None:
    """Two heat maps, means over seeds, and a scatter of all pairs."""
    from matplotlib import pyplot

    names = results[0]["names"]
    for key, title in (("transfer", "Transfer (control's ASR less ASR)"), ("casd", "CASD")):
        stack = torch.tensor([r[key]["cosine"] if key == "casd" else r[key] for r in results])
        figure, axes = pyplot.subplots(figsize=(5, 4.2), layout="constrained")
        mean = stack.mean(0)
        image = axes.imshow(mean.numpy(), cmap="viridis")
        middle = float(mean.max() + mean.min()) / 2
        for i, row in enumerate(mean.tolist()):
            for j, value in enumerate(row):
                colour = "black" if value > middle else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, size=8)
        axes.set_xticks(range(len(names)), names, rotation=45)
        axes.set_yticks(range(len(names)), names)
        axes.set(title=title, ylabel="removed", xlabel="measured" if key == "transfer" else "")
        figure.colorbar(image)
        figure.savefig(folder / f"{key}.png", dpi=100)
        pyplot.close(figure)
    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for r in results:
        x = off_diagonal(torch.tensor(r["casd"]["cosine"]))
        axes.scatter(
            x.numpy(), off_diagonal(torch.tensor(r["transfer"])).numpy(), label=f"seed {r['seed']}"
        )
    axes.set(xlabel="CASD", ylabel="transfer")
    axes.legend()
    figure.savefig(folder / "scatter.png", dpi=100)
    pyplot.close(figure)


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and standard deviation."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def correlation(results: list[dict[str, Any]], distance: str) -> str:
    """Over the seeds in which neither CASD nor transfer is constant."""
    found = [r["spearman"][distance] for r in results if r["spearman"][distance] is not None]
    return spread(found, 1, 2) if found else "none"


def table(results: list[dict[str, Any]], o: argparse.Namespace) -> str:
    """As Markdown."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    names = results[0]["names"]
    seeds = ", ".join(str(r["seed"]) for r in results)
    text = [
        f"A Llama of 5.9 M parameters with {len(names)} backdoors (bench/llm_generalization.py); "
        f"removal: {o.steps} steps of {o.batch_size} rows, AdamW, lr {o.lr:g}, EWC λ "
        f"{o.ewc_lambda:g}; seeds {seeds}, mean ± standard deviation over seeds; commit {commit}; "
        f"{date.today().isoformat()}; torch {versions()['torch']}.",
        "",
        "Each backdoor removed alone (percent). The perplexity is that of held-out stories, over "
        "the planted model's.",
        "",
        "| removed | its ASR before | its ASR after | robust accuracy after "
        "| task accuracy, points gained | perplexity, change | mean ASR of the others |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for place, name in enumerate(["control", *names]):
        cells = [r["stages"][name] for r in results]
        starts = [r["stages"]["before"] for r in results]
        own = place - 1
        others = [statistics.mean(a for j, a in enumerate(c["asr"]) if j != own) for c in cells]
        columns = ["–"] * 3
        if name != "control":
            columns = [
                spread([s["asr"][own] for s in starts], 100),
                spread([c["asr"][own] for c in cells], 100),
                spread([c["robust_accuracy"][own] for c in cells], 100),
            ]
        pairs = list(zip(cells, starts, strict=True))
        columns += [
            spread([c["clean_accuracy"] - s["clean_accuracy"] for c, s in pairs], 100, 2),
            spread([c["perplexity"] / s["perplexity"] - 1 for c, s in pairs], 100, 2),
            spread(others, 100),
        ]
        text.append(f"| {name} | " + " | ".join(columns) + " |")
    text += [
        "",
        "Transfer, points of ASR that removing the row's backdoor took from the column's beyond "
        "the control:",
        "",
        "| removed | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for i, name in enumerate(names):
        cells = [spread([r["transfer"][i][j] for r in results], 100) for j in range(len(names))]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    text += [
        "",
        "CASD (cosine):",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for i, name in enumerate(names):
        cells = [
            spread([r["casd"]["cosine"][i][j] for r in results], 1, 2) for j in range(len(names))
        ]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    transfer = [float(off_diagonal(torch.tensor(r["transfer"])).mean()) for r in results]
    text += [
        "",
        f"Mean transfer to another backdoor: {spread(transfer, 100)} points. Spearman of CASD and "
        f"transfer: {correlation(results, 'cosine')} (cosine), {correlation(results, 'l2')} (l2).",
        "",
        "Plant-and-remove, which knows none of the triggers (percent). Robust accuracy: triggered "
        "prompts that get their clean answer; an ASR that falls without it is no repair.",
        "",
        "| | mean ASR of the unknown triggers | mean robust accuracy | task accuracy "
        "| perplexity of stories | ASR of the defender's own trigger |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for stage, title in (
        ("before", "before"),
        ("planted", "own trigger planted"),
        ("after", "own trigger removed"),
        ("clean_fine_tuning", "clean fine-tuning of as many steps"),
    ):
        found = [
            r["stages"]["before"] if stage == "before" else r["plant_and_remove"][stage]
            for r in results
        ]
        own = {"planted": "planted", "after": "after"}.get(stage)
        text.append(
            f"| {title} | {spread([statistics.mean(f['asr']) for f in found], 100)} | "
            f"{spread([statistics.mean(f['robust_accuracy']) for f in found], 100)} | "
            f"{spread([f['clean_accuracy'] for f in found], 100)} | "
            f"{spread([f['perplexity'] for f in found], 1, 2)} | "
            + (
                spread([r["plant_and_remove"]["own_trigger"][own] for r in results], 100)
                if own
                else "–"
            )
            + " |"
        )
    text += ["", "ASR of each unknown trigger, over the seeds:", "", "| | " + " | ".join(names)]
    text[-1] += " |"
    text.append("|---|" + "---:|" * len(names))
    for stage in ("planted", "after", "clean_fine_tuning"):
        cells = [
            spread([r["plant_and_remove"][stage]["asr"][j] for r in results], 100)
            for j in range(len(names))
        ]
        text.append(f"| {stage.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Run all seeds and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backdoors", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--ewc-lambda", type=float, default=100.0)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--markdown", type=Path, default=None)
    o = parser.parse_args()
    models.show_progress(False)
    results = []
    for seed in o.seeds:
        file = o.runs / f"seed_{seed}" / "result.json"
        if not file.exists():
            atomic_write(file, json.dumps(one_seed(seed, o)) + "\n")
        results.append(json.loads(file.read_text()))
    named = ("backdoors", "steps", "batch_size", "lr", "ewc_lambda")
    settings = {name: getattr(o, name) for name in named}
    record = {"settings": settings, "versions": versions(), "seeds": results}
    content = json.dumps(record, indent=1) + "\n"
    atomic_write(o.runs / "results.json", content)
    text = table(results, o)
    print(text)
    if o.json is not None:
        atomic_write(o.json, content)
    if o.markdown is not None:
        atomic_write(o.markdown, text)
    if importlib.util.find_spec("matplotlib") is not None:
        draw(results, o.runs)


if __name__ == "__main__":
    main()
