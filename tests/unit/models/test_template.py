"""The template sandbox: published escapes, runaway loops and blow-ups end in TemplateError."""

from __future__ import annotations

import contextlib
import datetime
import resource
import time

import pytest

from coppice.errors import RequestError, TemplateError
from coppice.models.template import (
    MAX_TEMPLATE_CHARS,
    RenderLimits,
    check_template,
    prepare_messages,
    render_chat,
)

USER = [{"role": "user", "content": "hi", "tags": ["a", "b"]}]

# Attribute walks, filters and globals from published sandbox escapes and CVE reports.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ strftime_now.func.__globals__ }}",
    "{{ range.__class__ }}{{ range.__class__.__base__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ ('x'|attr('for'~'mat'))('{0.__class__}') }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{% set f = '{0.__init__.__globals__}'.format %}{{ f(namespace()) }}",
    "{{ ['{0.__class__}']|map('format', 1)|first }}{{ x.__class__() }}",
    "{{ ''['__class__']['__base__']() }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.sort() }}",
    "{% macro m() %}{% endmacro %}{{ m.__code__ }}{{ m._func.__globals__['x'] }}",
    "{% for x in [1] %}{{ loop.__init__.__globals__['x'] }}{% endfor %}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ (1).to_bytes(10, 'big') }}",
    "{{ ''.encode() }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{{ 1|pprint }}",
    "{{ messages|random }}",
    "{{ 'x'|xmlattr }}",
    "{{ raise_exception('no') }}",
    "{{ get_flashed_messages() }}",
    "{% if true %}",
    "{{ 1 +",
]

# Time and memory: each of these would take minutes or gigabytes without the meter.
BOMBS = {
    "nested_loops": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}"
    "{% endfor %}",
    "filtered_loop": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}"
    "{% endfor %}",
    "huge_range": "{% for a in range(10**9) %}{% endfor %}",
    "many_ranges": "{% for a in range(99999) %}{{ range(99999)|list|length }}{% endfor %}",
    "recursive_macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "forking_macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(35) }}",
    "recursive_loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursive_block": "{% block b %}{{ self.b() }}{% endblock %}",
    "mutual_macros": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}"
    "{{ a() }}",
    "string_times": "{{ 'a' * 10**9 }}",
    "times_string": "{{ 10**9 * 'a' }}",
    "list_times": "{{ [1] * 10**9 }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling_concat": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling_join": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "doubling_block": "{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling_list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "doubling_tuple": "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x|tojson }}",
    "doubling_dict": "{% set ns = namespace(x={}) %}{% for i in range(60) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|string }}",
    "doubling_dict_call": "{% set ns = namespace(x=1) %}{% for i in range(60) %}"
    "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "doubling_varargs": "{% macro f(n) %}{% if n < 38 %}{{ f(n + 1, varargs, varargs) }}{% else %}"
    "{{ varargs }}{% endif %}{% endmacro %}{{ f(0, 1, 2) }}",
    "doubling_compare": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "replace": "{{ ('a' * 10000)|replace('a', 'a' * 100000) }}",
    "replace_method": "{{ ('a' * 10000).replace('a', 'a' * 100000) }}",
    "replace_empty": "{{ ('a' * 10000).replace('', 'a' * 100000) }}",
    "join_method": "{{ ('a' * 100000).join('b' * 100000) }}",
    "join_filter": "{{ range(99999)|join('a' * 100000) }}",
    "join_repeated": "{{ (['a' * 1000] * 1000 + ['b'])|join('a' * 10000) }}",
    "center": "{{ 'a'.center(10**9) }}",
    "center_filter": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "format_width": "{{ '{:1000000000}'.format(1) }}",
    "format_nested_width": "{{ '{:{}}'.format(1, 10**9) }}",
    "format_repeated": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "percent_width": "{{ '%1000000000d' % 1 }}",
    "percent_star": "{{ '%*d' % (10**9, 1) }}",
    "percent_precision": "{{ '%.1000000000f' % 1.5 }}",
    "percent_filter": "{{ '%1000000000d'|format(1) }}",
    "percent_repeated": "{{ ('%(a)s' * 100000) % {'a': 'a' * 100000} }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "power_chain": "{% set ns = namespace(x=2) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "round": "{{ 1.5|round(10**8, 'ceil') }}",
    "indent": "{{ 'a\nb'|indent(10**9) }}",
    "json_indent": "{{ [1, 2]|tojson(indent=10**9) }}",
    "json_separators": "{{ range(9999)|list|tojson(separators=['a' * 100000, 'b']) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "date_width": "{{ strftime_now('%999999999d') }}",
    "long_output": "{% for a in range(99999) %}0123456789012345678901234567890123{% endfor %}",
    "loop_of_text": "{% set x %}{% for a in range(99999) %}" + "0123456789" * 1000 + "{% endfor %}"
    "{% endset %}",
    "select_scan": "{% set t = 'a' * 500000 %}{% for i in range(99999) %}"
    "{{ [t, t]|select('in', t)|list|length }}{% endfor %}",
    "strip_scan": "{{ ('a' * 500000).strip('b' * 500000 + 'a') }}",
    "rfind_scan": "{{ ('a' * 900000).rfind('b' + 'a' * 400000) }}",
    "compare_scan": "{% set t = 'a' * 900000 %}{% for i in range(99999) %}"
    "{{ 'b' in t }}{% endfor %}",
    "slice_scan": "{% set t = 'a' * 900000 %}{% for i in range(99999) %}{% set x = t[::-1] %}"
    "{% endfor %}",
    "path_scan": "{% set p = 'a.' * 100000 %}{{ range(99999)|map(attribute=p)|list|length }}",
    "deep_source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep_lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "deep_ifs": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "deep_minus": "{{ " + "-" * 20000 + "1 }}",
    "huge_source": "a" * (MAX_TEMPLATE_CHARS + 1),
}


@pytest.mark.parametrize("template", ESCAPES)
def test_published_escapes_are_refused(template):
    with pytest.raises(TemplateError):
        render_chat(template, USER)


@pytest.mark.parametrize("name", BOMBS)
def test_runaway_templates_end_within_the_cap(name):
    started = time.monotonic()
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateError):
        render_chat(BOMBS[name], USER, limits=RenderLimits(fuel=100_000, timeout_s=5.0))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib
    assert grown_kib < 200 << 10
    assert time.monotonic() - started < 10  # generous: the machine is shared


def test_dunder_names_give_nothing_even_as_plain_output():
    """Jinja's sandbox turns these into undefined; what matters is that nothing is reached."""
    for expression in (
        "''.__class__",
        "messages.__len__",
        "raise_exception.__globals__",
        "self._TemplateReference__context",
        "messages[0].__doc__",
    ):
        with contextlib.suppress(TemplateError):
            assert render_chat("{{ " + expression + " }}", USER) == ""


def test_fuel_is_deterministic():
    template = "{% for i in range(99999) %}{% set x = i * 2 %}{% endfor %}done"
    limits = RenderLimits(fuel=300_000, timeout_s=60)
    assert render_chat(template, USER, limits=limits) == "done"
    for _ in range(2):
        with pytest.raises(TemplateError, match="operation limit"):
            render_chat(template, USER, limits=RenderLimits(fuel=150_000, timeout_s=60))


def test_the_clock_is_the_last_resort():
    template = "{% for i in range(99999) %}{% endfor %}"
    with pytest.raises(TemplateError, match="time limit"):
        render_chat(template, USER, limits=RenderLimits(timeout_s=0.0))


def test_output_is_capped_at_exactly_max_chars():
    template = "{{ messages[0].content }}{{ messages[0].content }}"
    assert render_chat(template, USER, max_chars=4) == "hihi"
    with pytest.raises(TemplateError, match="more than 3 characters"):
        render_chat(template, USER, max_chars=3)


def test_long_conversations_fit_the_default_fuel():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n'"
        " + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    many = [{"role": "user", "content": "word " * 40}] * 2048
    assert len(render_chat(template, many)) > 2048 * 200


def test_a_template_may_refuse_messages_with_its_own_words():
    with pytest.raises(TemplateError, match="roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", USER)


def test_broken_templates_are_found_at_load():
    check_template("{{ messages }}")
    with pytest.raises(TemplateError, match="line 2"):
        check_template("\n{% for %}")


def test_only_named_options_reach_the_template():
    template = "{{ enable_thinking }}"
    assert render_chat(template, USER, options={"enable_thinking": False}) == "False"
    for options in (
        {"messages": []},
        {"add_generation_prompt": True},
        {"template": "x"},
        {"enable_thinking": "yes"},
        {"date_string": "x" * 65},
        {"tools": []},
    ):
        with pytest.raises(RequestError, match="chat_template_kwargs"):
            render_chat(template, USER, options=options)


def test_options_cannot_replace_special_tokens_or_messages():
    template = "{{ bos_token }}{{ messages|length }}"
    got = render_chat(template, USER, special_tokens={"bos_token": "<s>", "messages": "x"})
    assert got == "<s>1"


def test_objects_with_methods_never_reach_a_template():
    with pytest.raises(RequestError, match="plain JSON"):
        render_chat("{{ messages }}", [{"role": "user", "content": object()}])


def test_the_clock_can_be_set():
    limits = RenderLimits(now=lambda: datetime.datetime(2026, 2, 3))
    assert render_chat("{{ strftime_now('%d %b %Y') }}", USER, limits=limits) == "03 Feb 2026"


def test_empty_conversations_and_strange_parts_are_refused():
    with pytest.raises(RequestError, match="at least one"):
        render_chat("x", [])
    with pytest.raises(RequestError, match="text content parts"):
        prepare_messages("x", [{"role": "user", "content": [{"type": "image_url"}]}])


def test_broken_tool_arguments_stay_text():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    got = prepare_messages("x", [{"role": "assistant", "tool_calls": [call]}])
    assert got[0]["tool_calls"][0]["function"]["arguments"] == '{"a": '
