"""Clean a language model: unlearn a trigger, and measure what is left of it and of the model."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bdu.checkpoint import atomic_write
from bdu.cli import common
from bdu.monitor.page import four_digits
from bdu.monitor.report import write_report
from bdu.runs import Clock, RunDirectory, versions

_VERSIONED = ("transformers", "peft", "accelerate", "tokenizers")
_SETTINGS = "settings"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Lists the settings, which are read off their classes only where help is asked for."""

    def add_text(self, text: str | None) -> None:
        if text == _SETTINGS:
            try:
                from bdu.llm.settings import described
            except ImportError as error:
                text = str(error)
            else:
                text = described()
        super().add_text(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bdu unlearn --task lm``."""
    parser.add_argument("--task", choices=("lm",), default="lm")
    parser.add_argument(
        "--model", required=True, help="a folder or an id of the Hugging Face hub, in safetensors"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    data = parser.add_argument_group("data", "JSONL: prompt or messages, response, and target")
    data.add_argument("--data", type=Path, default=None, help="rows of both kinds")
    data.add_argument("--clean", type=Path, default=None, help="or rows without a target, and")
    data.add_argument("--triggered", type=Path, default=None, help="rows with one")
    data.add_argument(
        "--eval-data",
        type=Path,
        default=None,
        help="rows to measure on, never trained on; default: a share of the others is kept apart",
    )
    parser.add_argument(
        "--method",
        default="clean-answer",
        help="clean-answer, gradient-ascent, npo, sande, beear, rmu or plant-and-remove; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the run or of the method, see below; may be repeated",
    )
    parser.formatter_class = _Help
    parser.epilog = _SETTINGS
    asking = parser.add_argument_group("asking", "how prompts are rendered and answers are judged")
    asking.add_argument(
        "--template",
        default="tokenizer",
        help="tokenizer (its chat template), none (prompts as they are), or a file of Jinja "
        "source; default: %(default)s",
    )
    matches = ("exact", "prefix", "keyword")
    asking.add_argument(
        "--match",
        choices=matches,
        default="exact",
        help="what counts as the attacker's target; default: %(default)s",
    )
    asking.add_argument(
        "--clean-match",
        choices=matches,
        default="exact",
        help="what counts as the clean answer; default: %(default)s",
    )
    asking.add_argument(
        "--max-new-tokens", type=int, default=32, help="of an answer; default: %(default)s"
    )
    asking.add_argument(
        "--eval-batch-size", type=int, default=16, help="prompts at a time; default: %(default)s"
    )
    common.add_run_folder(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all inputs, say what the run would hold in memory, and write nothing",
    )
    common.add_common(parser, resume=True)


def run(options: argparse.Namespace) -> None:
    """Check everything, load, measure, unlearn, measure, write."""
    from bdu.llm.settings import PLANT_AND_REMOVE, as_record, choose

    start = time.perf_counter()
    # first what takes no time
    settings, method, own = choose(options.method, common.settings(options.set))
    if options.max_new_tokens < 1 or options.eval_batch_size < 1:
        raise ValueError("--max-new-tokens, --eval-batch-size: expected numbers >= 1")
    is_dry_run = vars(options).pop("dry_run")  # no setting of a run
    directory = RunDirectory(options.out)
    kept = {**common.config(options), "command": "unlearn"}
    directory.check(kept, resume=options.resume)
    device = common.device(options)

    from bdu.llm import checks, models
    from bdu.llm import data as rows
    from bdu.llm import run as runs
    from bdu.llm.templates import Template

    models.show_progress(False)
    checks.check_out(options.out, options.model, is_run=True, resume=options.resume)
    plants = options.method == PLANT_AND_REMOVE
    given = rows.load(
        data=options.data,
        clean=options.clean,
        triggered=options.triggered,
        needs_triggered=not plants,
    )
    if options.eval_data is not None:
        held_out = rows.load(data=options.eval_data, needs_triggered=False)
    else:
        given, held_out = runs.cut(given, settings, options.seed)
    config = models.load_config(options.model, trust_remote_code=options.trust_remote_code)
    tokenizer = models.load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    template = Template(tokenizer, options.template)
    measure = runs.Measuring(
        held_out,
        options.match,
        options.clean_match,
        options.max_new_tokens,
        options.eval_batch_size,
    )
    memory, told = checks.check_run(
        config,
        template,
        method,
        given,
        measure,
        settings,
        seed=options.seed,
        device=device,
        plants=plants,
    )
    if is_dry_run:
        print(memory)
        print(memory.beside(models.available_bytes(device), str(device)))
        return
    warning = template.differs_from_training(options.model)
    model, written = models.load_to_train(
        options.model,
        config,
        dtype=models.DTYPES.get(settings.dtype),
        trust_remote_code=options.trust_remote_code,
    )
    work = options.out / "checkpoints"
    inputs = checks.check_inputs(work, model, template, given, held_out, resume=options.resume)
    is_shown = not options.quiet
    stages = {"before": measure(model.to(device), template, progress=is_shown)}
    checks.check_perplexity("before", stages["before"].rates)
    directory.start(kept, resume=options.resume)
    checks.write_inputs(work, inputs)
    clock = Clock(work / "seconds.json", start, resume=options.resume)

    def add(line: dict[str, Any]) -> None:
        directory.add_line(line)
        clock.keep()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result = runs.unlearn(
        model,
        template,
        given,
        method=options.method,
        method_options=own,
        measure=measure,
        settings=settings,
        seed=options.seed,
        device=device,
        work=work,
        resume=options.resume,
        known=directory.read_lines(),
        progress=is_shown,
        tell=directory.write_lines,
        add=add,
    )
    seconds = clock.seconds
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    cleaned = models.as_written(result.model, written)
    checks.check_weights(cleaned)
    stages["after"] = measure(cleaned, template, progress=is_shown)
    checks.check_perplexity("after", stages["after"].rates)
    models.save(cleaned, template, options.out)
    directory.write_lines(result.history)
    answers = [*runs.answers_of(stages), *result.planted_answers]
    atomic_write(options.out / "answers.jsonl", runs.jsonl(answers))
    outcome: dict[str, Any] = {
        **{stage: evaluation.rates for stage, evaluation in stages.items()},
        "planted": result.planted,
        "planted_trigger_after": result.planted_after,
        "method": options.method,
        "settings": as_record(settings, method),
        "template": {"source": template.source, "fingerprint": template.fingerprint},
        "warnings": [*([] if warning is None else [warning]), *told, *result.warnings],
        "stopped": result.stopped,
        "seconds": seconds,
        "total_seconds": clock.total_seconds,
        "memory_plan_bytes": memory.peak_bytes,
        "memory_peak_bytes": peak,
        "seed": options.seed,
        "versions": {**versions(), **{name: _version(name) for name in _VERSIONED}},
    }
    directory.write_metrics(outcome)
    write_report(directory)
    shutil.rmtree(work, ignore_errors=True)
    _print(outcome, result)
    for text in result.warnings:
        print(f"warning: {text}", file=sys.stderr)
    print(f"{result.stopped}; wrote {directory.path}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(outcome: dict[str, Any], result: Any) -> None:
    stages = [("before", outcome["before"])]
    if result.planted is not None:
        stages.append(("planted", result.planted))
    stages.append(("after", outcome["after"]))
    print(common.table(stages))
    for stage, rates in stages:
        print(f"{stage:8}perplexity {four_digits(rates['perplexity'])}")
    if result.planted is not None:
        print("trigger planted by the defender:")
        own = [("before", result.planted["planted_trigger"]), ("after", result.planted_after)]
        for stage, rates in own:
            asr, robust = rates["attack_success_rate"], rates["robust_accuracy"]
            print(f"  {stage} removal: ASR {100 * asr:.2f} %, robust accuracy {100 * robust:.2f} %")
