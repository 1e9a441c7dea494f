"""Chat templates as programs: what honest ones write, and what hostile ones may not do."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.text.sandbox import TemplateTooLong, render

MESSAGES = [
    {"role": "system", "content": " Be <b>brief</b>. "},
    {"role": "user", "content": "What is é?\n"},
    {"role": "assistant", "content": "<think>hm</think>\n\nA letter."},
]

HONEST = [
    "{% for m in messages %}{{ loop.index0 }}{{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ m.role }}{% else %}none{% endfor %}",
    "{% for m in messages[::-1] %}{{ loop.revindex }}/{{ loop.length }}{{ loop.last }}{% endfor %}",
    "{% for m in messages %}{% if not loop.first %}{{ loop.previtem.role }}{% endif %}"
    "{% if not loop.last %}{{ loop.nextitem.role }}{% endif %}"
    "{% if loop.changed(m.role) %}{{ loop.cycle('a', 'b') }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}"
    "{% endfor %}",
    "{%- set ns = namespace(n=0, last='') %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content | length %}{% set ns.last = m.role ~ ns.n %}{% endfor %}"
    "{{ ns.last }}",
    "{% macro show(m, open=true) %}<{{ m.role }}>{{ m.content if open else '' }}{{ caller() if "
    "caller }}{% endmacro %}{{ show(messages[0]) }}{{ show(m=messages[1], open=false) }}"
    "{% call show(messages[2]) %}end{% endcall %}",
    "{{ messages[2].content.split('</think>')[-1].lstrip('\n') }}{{ 'a' in messages[2].content }}",
    "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | rejectattr('role', 'in', ['user']) | list | first }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ 'a' * 3 }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ -7 % 3 }}{{ 1 / 4 }}",
    "{{ '%s is %05.1f' | format('x', 2) }}{{ '{} {:>4}'.format(1, 'b') }}{{ '%d%%' % 5 }}",
    "{{ messages is sequence }}{{ nothing is defined }}{{ nothing or 'x' }}{{ 3 is odd }}",
    "{% set text %}a{{ 1 }}b{% endset %}{{ text | upper | replace('A', 'c') }}"
    "{% filter lower %}X{{ 'Y' }}{% endfilter %}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
    "{{ range(3) | list }}",
    "{% for n in [[1, [2]], [3]] recursive %}{{ loop(n) if n is iterable else n }}{% endfor %}",
    "{{ [1, 2] + [3] }}{{ messages[0:2] | length }}{{ 'abc'[1:] }}{{ (1, 2) == (1, 2) }}",
    "{{ 1 < 2 < 3 }}",
    "a\n  {% if true %}  \nb {{- ' c' -}} \n{% endif %}\n",
]


@pytest.mark.parametrize("template", HONEST)
def test_honest_templates_write_what_jinja_writes(template: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    plain.policies["json.dumps_function"] = lambda value, **o: to_json(value, o)
    expected = plain.from_string(template).render(messages=MESSAGES)
    if "tojson" in template:  # Jinja's own also escapes for HTML
        expected = expected.replace("\\u003c", "<").replace("\\u003e", ">")
    assert render(template, messages=MESSAGES) == expected


def to_json(value: object, options: dict) -> str:
    return json.dumps(value, **{**options, "ensure_ascii": False, "sort_keys": False})


@given(st.lists(st.text(max_size=30), max_size=5))
@settings(max_examples=50, deadline=None)
def test_contents_come_through_unchanged(contents: list[str]) -> None:
    assert render("{% for c in cs %}[{{ c }}]{% endfor %}", cs=contents) == "".join(
        f"[{content}]" for content in contents
    )


def test_a_long_chat_is_far_from_the_limit() -> None:
    """A thousand turns of 300 characters, more than any FastVLM has positions for."""
    asked = "{% if loop.index0 == messages | length - 1 and messages is sequence %}!{% endif %}"
    turns = [{"role": "user", "content": "word " * 60}] * 1000
    template = (
        "{% for m in messages %}{% if m.role == 'user' and '</think>' in m.content %}x{% endif %}"
        "<|im_start|>{{ m.role + '\n' + m.content.split('</think>')[-1].strip() }}"
        "{{ m.content | trim | replace('a', 'b') }}<|im_end|>" + asked + "{% endfor %}"
    )
    assert len(render(template, messages=turns)) > 300_000


DOUBLE = "{% set x = 'aaaaaaaaaa' %}" + "{% set x = EXPRESSION %}" * 60 + "{{ x | length }}"
NEST = "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60
ROUND = "{% for i in range(99999) %}"
HOSTILE = {
    "nested loops": ROUND * 3 + "{% endfor %}" * 3,
    "output of loops": ROUND * 2 + "aaaa" * 1000 + "{% endfor %}" * 2,
    "output in a macro": "{% macro m() %}"
    + ROUND
    + "a" * 10_000
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "output in a block": "{% set x %}" + ROUND + "a" * 10_000 + "{% endfor %}{% endset %}{{ x }}",
    "a text many times": "{{ 'a' * 10 ** 10 }}",
    "a list many times": "{{ ([1] * 10 ** 9) | length }}",
    "doubled by ~": DOUBLE.replace("EXPRESSION", "x ~ x"),
    "doubled by +": DOUBLE.replace("EXPRESSION", "x + x"),
    "doubled by join": DOUBLE.replace("EXPRESSION", "[x, x] | join"),
    "doubled by a method": DOUBLE.replace("EXPRESSION", "''.join([x, x])"),
    "doubled by format": DOUBLE.replace("EXPRESSION", "'{0}{0}'.format(x)"),
    "doubled by percent": DOUBLE.replace("EXPRESSION", "'%s%s' % (x, x)"),
    "doubled by a block": DOUBLE.replace(
        "{% set x = EXPRESSION %}", "{% set x %}{{ x }}{{ x }}{% endset %}"
    ),
    "replaced by itself": DOUBLE.replace("EXPRESSION", "x | replace('a', x)"),
    "replaced by a method": DOUBLE.replace("EXPRESSION", "x.replace('a', x)"),
    "number squared": DOUBLE.replace("'aaaaaaaaaa'", "10").replace("EXPRESSION", "x * x"),
    "power": "{{ 10 ** 10 ** 9 }}",
    "wide filter": "{{ 'a' | center(10 ** 9) }}",
    "wide method": "{{ 'a'.ljust(10 ** 9) }}",
    "wide named argument": "{{ 'a\nb' | indent(width=10 ** 9) }}",
    "wide format": "{{ '{:1000000000}'.format(1) }}",
    "wide format by argument": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "wide format by a list": "{{ '{0[0]:{0[1]}}'.format([1, 10 ** 9]) }}",
    "wide percent": "{{ '%1000000000d' % 1 }}",
    "wide percent by argument": "{{ '%*d' % (10 ** 9, 1) }}",
    "wide filter format": "{{ '%1000000000d' | format(1) }}",
    "many bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "many digits": "{{ 5 | round(10 ** 9, 'floor') }}",
    "many slices": "{{ range(9) | slice(10 ** 9) | list }}",
    "macros that call themselves": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "loops in themselves": "{% set r = range(99999) %}{% for i in r recursive %}{{ loop(r) if "
    "loop.depth < 5 }}{% endfor %}",
    "what holds the same twice, shown": NEST + "{{ x }}",
    "what holds the same twice, written": NEST + "{{ x | string }}",
    "what holds the same twice, as JSON": NEST + "{{ x | tojson }}",
    "what holds the same twice, compared": NEST + "{% set y = x %}" + NEST + "{{ x == y }}",
    "long comparisons": "{% set x = 'a' * 9999999 %}{% set y = 'a' * 9999999 %}"
    + ROUND
    + "{% if x == y %}{% endif %}{% endfor %}",
    "long slices": "{% set x = 'a' * 9999999 %}" + ROUND + "{% set y = x[1:] %}{% endfor %}",
    "long tests": "{% set x = 'a' * 9999999 %}" + ROUND + "{{ x is lower }}{% endfor %}",
    "a loop over filters": ROUND + "{% set x = range(99999) | map('string') | list %}{% endfor %}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_end_soon(case: str) -> None:
    start = time.process_time()
    with pytest.raises(TemplateTooLong, match=r"more steps or memory|not written in the form"):
        render(HOSTILE[case], messages=MESSAGES)
    assert time.process_time() - start < 20  # seconds of this process; otherwise it would be hours


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's way to tell sizes")
def test_hostile_templates_take_little_memory() -> None:
    """In a process that may have 500 MB of addresses more than it begins with."""
    wide = {
        case: t for case, t in HOSTILE.items() if not case.startswith(("loop", "what", "macro"))
    }
    script = (
        "import json, resource, sys\n"
        "from fastvlm_mlx.text.sandbox import TemplateTooLong, render\n"
        "render('{{ 1 }}')\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "most = pages * resource.getpagesize() + 500_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "for case, template in json.load(sys.stdin).items():\n"
        "    try:\n        render(template)\n"
        "    except TemplateTooLong:\n        pass\n"
        "    except BaseException as error:\n        print(case, repr(error)[:100])\n"
        "    else:\n        print(case)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(wide), capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


def test_the_budget_is_that_of_one_rendering() -> None:
    template = "{% for i in range(99999) %}{% endfor %}{{ n }}"
    for n in range(5):  # together they would take more than one has
        assert render(template, n=n) == str(n)
