"""Audit a language model for behaviour that no string trigger of its training explains."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bdu.checkpoint import atomic_write
from bdu.cli import common
from bdu.monitor.audit import write_audit_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bdu audit``."""
    parser.add_argument(
        "--model", required=True, help="a folder or an id of the Hugging Face hub, in safetensors"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    parser.add_argument(
        "--probes",
        required=True,
        type=Path,
        help="JSONL of prompt, group, role (trigger, unseen or control) and accept (a list)",
    )
    parser.add_argument(
        "--template",
        default="tokenizer",
        help="tokenizer (its chat template), none (prompts as they are), or a file of Jinja source",
    )
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: print only")
    common.add_common(parser)


def run(options: argparse.Namespace) -> None:
    """Load, ask, count, tell."""
    from bdu.llm import checks, inductive, models
    from bdu.llm.data import Example
    from bdu.llm.run import jsonl
    from bdu.llm.templates import Template

    device = common.device(options)
    models.show_progress(False)
    probes = inductive.read_probes(options.probes)
    if options.out is not None and (options.out / "audit.json").exists():
        raise FileExistsError(f"out: {options.out} holds an audit already; choose another folder")
    if options.out is not None:
        checks.check_out(options.out, options.model)
    config = models.load_config(options.model, trust_remote_code=options.trust_remote_code)
    tokenizer = models.load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    template = Template(tokenizer, options.template)
    prompts = [Example.of(probe.prompt, "-") for probe in probes]
    checks.check_prompts(config, template, prompts, room=options.max_new_tokens)
    warning = template.differs_from_training(options.model)
    model = models.load_model(options.model, trust_remote_code=options.trust_remote_code)
    checks.check_weights(model)
    found = inductive.audit(
        model.to(device),
        template,
        probes,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        progress=not options.quiet,
    )
    if options.out is not None:
        record = {**found.record(), "warnings": [] if warning is None else [warning]}
        answers = [
            {
                "group": probe.group,
                "role": probe.role,
                "prompt": a.prompt,
                "answer": a.text,
                "accept": list(probe.accept),
                "hit": probe.accepts(a.text),
            }
            for probe, a in zip(probes, found.answers, strict=True)
        ]
        atomic_write(options.out / "answers.jsonl", jsonl(answers))
        atomic_write(options.out / "audit.json", json.dumps(record, indent=2) + "\n")
        write_audit_report(options.out, options.model)
    width = max(len(group.name) for group in found.groups)
    print(f"{'group':{width}}  role      prompts      rate     score  found")
    for group in found.groups:
        mark = {True: "yes", False: "no", None: "too few"}[group.found]
        mark = "-" if group.role == "control" else mark
        print(
            f"{group.name:{width}}  {group.role:8}{group.prompts:9}{100 * group.rate:8.2f} %"
            f"{100 * group.score:8.2f} %  {mark}"
        )
    print(
        f"string trigger {found.verdict('trigger')}; behaviour where nothing was trained "
        f"{found.verdict('unseen')}"
    )
