"""The scorers beside lmms-eval's own, and FastVLM as a model of lmms-eval and VLMEvalKit."""

import ast
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_presets import ROWS

import fastvlm_mlx as fv
from fastvlm_mlx.evaluate.metrics import METRICS
from fastvlm_mlx.evaluate.metrics.choices import parse_choice
from fastvlm_mlx.evaluate.metrics.open_ended import open_ended
from fastvlm_mlx.evaluate.metrics.text import (
    anls,
    caseless,
    cer,
    contains,
    edit_distance,
    exact,
    formula,
    relaxed,
    yesno,
)
from fastvlm_mlx.evaluate.metrics.vqa import textvqa, vqa
from fastvlm_mlx.evaluate.presets import PRESETS
from fastvlm_mlx.hub.resolve import NANO

IMAGES = sorted((NANO / "images").glob("*.png"))[:2]
in_lmms = pytest.mark.needs("lmms_eval")
in_kit = pytest.mark.needs("vlmeval")
pytestmark = pytest.mark.interop

WORDS = """
a the an An two none ten dog Dog's isnt couldnt've somebody'd 1,000 1,,000 3.5 .5 5. U.S.A. $5
50% -3 red/blue e-mail (left) yes! what? naïve 日本 １２ it's its a,b x,y 'twas o'clock & #1 10:30
"quoted" A cat; [x] <b> im I'm don't “q” ½ 5kg 12/3 é ÉTÉ yes no Norway
""".split()  # noqa: SIM905
WORDS += ["red / blue", "x, y", "; cat", "hello\nworld", "tab\there", "- 5", "1 , 000"]


def texts(count, seed=0):
    """Answers with commas, articles, numbers, units, scripts, line breaks and lists."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(0, 4))) for _ in range(count)]


def near(text, chosen):
    """A reference like a text: the same, or changed a little."""
    changes = [text, text.upper(), f"{text}.", f"the {text}", text[1:], f"{text}s", text.title()]
    return chosen.choice(changes)


def cases(count=400, references=10):
    chosen = random.Random(1)
    others = texts(count * references, seed=2)
    for number, answer in enumerate(texts(count)):
        some = others[number * references : (number + 1) * references]
        yield answer, [near(answer, chosen) if chosen.random() < 0.6 else o for o in some]


@in_lmms
def test_vqa_equals_lmms_eval():
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    for answer, references in cases():
        rows = [{"answer": text, "answer_id": n} for n, text in enumerate(references)]
        theirs = vqav2_process_results({"answers": rows, "question_id": 1}, [answer])
        assert vqa(answer, references) == pytest.approx(theirs["exact_match"]), (answer, references)


@in_lmms
def test_textvqa_equals_lmms_eval():
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    for answer, references in cases():
        theirs = textvqa_process_results({"answers": list(references), "question_id": 1}, [answer])
        assert textvqa(answer, references) == pytest.approx(theirs["exact_match"])


@in_lmms
def test_contractions_are_those_of_lmms_eval():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    from fastvlm_mlx.evaluate.metrics.vqa import WITH_APOSTROPHE

    theirs = {k: v for k, v in EvalAIAnswerProcessor.CONTRACTIONS.items() if k == k.lower()}
    assert {k: v for k, v in theirs.items() if k != v} == WITH_APOSTROPHE


@in_lmms
def test_anls_equals_lmms_eval():
    from lmms_eval.api.metrics import anls as theirs

    # Spaces apart, by which lmms-eval's lengths grow, and letters that change their number in
    # another case; both are among the differences below.
    for answer, references in cases(references=3):
        answer, references = " ".join(answer.split()), [" ".join(r.split()) for r in references]
        assert anls(answer, references) == pytest.approx(theirs(references, [answer])["anls"])


@in_lmms
def test_edits_equal_lmms_eval():
    from lmms_eval.api.metrics import levenshtein_distance

    for one, other in zip(texts(300), texts(300, seed=3), strict=True):
        assert edit_distance(one, other) == levenshtein_distance(one, other)


@in_lmms
def test_character_errors_are_lmms_eval_s_edits_per_character():
    from lmms_eval.api.metrics import levenshtein_distance

    for answer, references in cases(references=2):
        texts = [(answer.strip(), reference.strip()) for reference in references]
        rates = [levenshtein_distance(*pair) / max(1, len(pair[1])) for pair in texts]
        assert cer(answer, references) == pytest.approx(min(rates)), (answer, references)


NUMBERS = """
0 5 5.2 4.75 5.25 5.26 -5 -5.25 5% 0.05 5.0% 1e3 1000 1,000 nan inf 2015 2010 yes Yes % 1950
2050.5 12/3 $5 −5 ½ 0.0 1_000 5% 5kg
""".split()  # noqa: SIM905


@in_lmms
def test_relaxed_equals_lmms_eval():
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    for answer, reference in itertools.product(NUMBERS, NUMBERS):
        assert relaxed(answer, [reference]) == relaxed_correctness(answer, reference)


@in_lmms
def test_exact_equals_lmms_eval():
    from lmms_eval.api.metrics import exact_match_hf_evaluate as theirs

    for answer, (reference,) in cases(references=1):
        answer, reference = " ".join(answer.split()), " ".join(reference.split())
        found = theirs([answer], [reference])["exact_match"]
        assert exact(answer, [reference]) == found
        loose = {"ignore_case": True, "ignore_punctuation": True}
        if " " not in answer + reference:  # of which lmms-eval keeps those that marks leave behind
            found = theirs([answer], [reference], **loose)["exact_match"]
            assert caseless(answer, [reference]) == found, (answer, reference)


@in_lmms
def test_contains_equals_lmms_eval():
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

    for answer, references in cases(references=2):
        for kind, metric in {"IIIT5K": contains, "HME100k": formula}.items():
            row = {"answer": references, "dataset": kind, "question_type": "x"}
            theirs = ocrbench_process_results(row, [answer])["ocrbench_accuracy"]["score"]
            assert metric(answer.strip(), references) == theirs, (answer, references)


SAID = """it is 5|The answer is 3.14159|so x = 2\ntherefore y is 4|= 12,345||5|a|A|is a|1e5|
final answer: Paris.|could be red or could be blue|Paris|3.14|result is -2.5|1,234 and 2|so so is|
is|the value is 24/7|. |:|is :|日本|it is 日本""".split("|")  # noqa: SIM905
WANTED = """
5 3.14 4 12345 a A 100000 paris Paris red -2.5 1,234 24/7 2 x 3.142 日本
""".split()  # noqa: SIM905


@in_lmms
def test_open_questions_equal_lmms_eval():
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    for answer, reference in itertools.product(SAID, WANTED):
        theirs = eval_open(reference, parse_open_response(answer))
        assert open_ended(answer, [reference]) == theirs, (answer, reference)


# Where lmms-eval's `extract_mcq_answer` and our parser part, and why ours does so.
DIFFERENT_CHOICES = {
    "b": "lower case",
    "c)": "lower case",
    "(d) because": "lower case",
    "option b": "lower case",
    "（Ｂ）": "full-width letters",
    "A cat sits": "an article, beside a choice's text",
    "The answer is a cat": "a choice's text",
    "It is dark red": "a choice's text",
    "dog": "a choice's text",
    "It could be A or B": "several are none",
    "Both A and C": "several are none",
    "The answer is A because B is wrong": "what follows 'answer is' comes before what ends",
    "The best option is C, not B": "what is denied is not chosen",
}
FORMS = "{0}|({0})|{0}.|{0})|{0}:|**{0}**|'{0}'|The answer is {0}|The answer is {0}."
FORMS += "|The answer is ({0})"
FORMS += "|Answer: {0}|answer is: {0}|The correct answer is {0}. Indeed|I choose {0}|option {0}"
FORMS += (
    "|choice {0}|{0}. Note that it is so|{0}\nbecause of it|So it must be {0}.|Let me think. {0}"
)
FORMS += "|({0}) since it is|The best option is ({0})|{0}. dog|My choice is {0}|it is clearly ({0})"
CHOICES = ["dog", "cat", "red", "dark red"]


@in_lmms
def test_choices_equal_lmms_eval_but_where_said():
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

    letters = "ABCD"
    found = [form.format(letter) for form in FORMS.split("|") for letter in letters]
    assert len(found) >= 100
    for text in found:
        theirs = extract_mcq_answer(text, list(letters))
        assert parse_choice(text, CHOICES) == theirs, text
    for text in DIFFERENT_CHOICES:
        theirs = extract_mcq_answer(text, list(letters)) or None
        assert parse_choice(text, CHOICES) != theirs, text


# Where metrics part from lmms-eval's on purpose: (ours, lmms-eval's, answer, reference).
DIFFERENT = {
    "lengths are those of the compared texts": ("anls", "ab   cd", "ab cx", 0.8),
    "one reference is enough": ("vqa", "a cat", "cat", 1.0),
    "yes is a word": ("yesno", "Yes, there is.", "yes", 1.0),
    "what marks leave behind is one space": ("caseless", "red - blue", "red blue", 1.0),
}


@in_lmms
@pytest.mark.parametrize("why", DIFFERENT)
def test_differences_are_on_purpose(why):
    from lmms_eval.api.metrics import anls as their_anls
    from lmms_eval.api.metrics import exact_match_hf_evaluate
    from lmms_eval.tasks.pope.utils import pope_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    name, answer, reference, expected = DIFFERENT[why]
    theirs = {
        "anls": lambda: their_anls([reference], [answer])["anls"],
        "vqa": lambda: vqav2_process_results(
            {"answers": [{"answer": reference}], "question_id": 1}, [answer]
        )["exact_match"],
        "yesno": lambda: pope_process_results({"answer": reference, "question_id": 1}, [answer])[
            "pope_accuracy"
        ]["score"],
        "caseless": lambda: exact_match_hf_evaluate(
            [answer], [reference], ignore_case=True, ignore_punctuation=True
        )["exact_match"],
    }[name]()
    (score,) = METRICS[name].score([answer], [[reference]], [()])
    assert score.value == pytest.approx(expected) and theirs != pytest.approx(expected)


@in_lmms
def test_yes_and_no_equal_lmms_eval():
    from lmms_eval.tasks.pope.utils import pope_process_results

    forms = ["{}", " {}", "{}\n", "\t{} ", "{} \n\n"]
    words = ["yes", "Yes", "YES", "no", "No", "NO", "nope", "eyes", "Norway", "y", ""]
    for form, word, right in itertools.product(forms, words, ("yes", "no")):
        answer = form.format(word)
        theirs = pope_process_results({"answer": right, "question_id": 1}, [answer])
        assert yesno(answer, [right]) == theirs["pope_accuracy"]["score"], answer


@pytest.mark.needs("pycocoevalcap")
def test_cider_equals_the_original():
    from pycocoevalcap.cider.cider import Cider

    plain = "a red cat sits on the mat blue dog runs two birds fly over sea"
    chosen = random.Random(4)
    captions = [" ".join(chosen.choices(plain.split(), k=chosen.randint(0, 9))) for _ in range(600)]
    answers = captions[:150]
    references = [captions[150 + 3 * n : 153 + 3 * n] for n in range(150)]
    theirs = Cider().compute_score(
        dict(enumerate(references)), {n: [text] for n, text in enumerate(answers)}
    )[1]
    ours = METRICS["cider"].score(answers, references, [()] * len(answers))
    assert [score.value for score in ours] == pytest.approx(list(theirs), abs=1e-12)


@in_lmms
@pytest.mark.needs("sacrebleu")
def test_bleu_equals_lmms_eval():
    from lmms_eval.api.metrics import bleu

    from fastvlm_mlx.evaluate.metrics import figures

    answers, references = (
        texts(150),
        [[a, b] for a, b in zip(*[iter(texts(300, 5))] * 2, strict=True)],
    )
    references[:40] = [[answer, "x"] for answer in answers[:40]]
    scores = METRICS["bleu"].score(answers, references, [()] * 150)
    theirs = bleu(list(zip(references, answers, strict=True)))
    assert figures("bleu", scores)["bleu"] == pytest.approx(theirs, rel=1e-9)


# Prompts


def theirs_of(name):
    """lmms-eval's function from a row to its prompt, with the settings of the task's own file."""
    from importlib import import_module

    word = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}
    letter = "Answer with the option's letter from the given choices directly."
    choices = {"pre_prompt": "", "post_prompt": f"\n{letter}"}
    tasks = {
        "ai2d": ("ai2d", "ai2d_doc_to_text", choices | {"prompt_format": "mcq"}),
        "scienceqa": ("scienceqa", "sqa_doc_to_text", choices | {"format": "default"}),
        "mmmu": (
            "mmmu",
            "mmmu_doc_to_text",
            {
                "prompt_type": "format",
                "multiple_choice_prompt": letter,
                "open_ended_prompt": word["post_prompt"].strip(),
            },
        ),
        "vqav2": ("vqav2", "vqav2_doc_to_text", word),
        "chartqa": (
            "chartqa",
            "chartqa_doc_to_text",
            {"pre_prompt": "", "post_prompt": "\nAnswer the question with a single word."},
        ),
        "textvqa": ("textvqa", "textvqa_doc_to_text", word),
        "infovqa": ("infovqa", "infovqa_doc_to_text", word),
        "docvqa": ("docvqa", "docvqa_doc_to_text", word),
        "ocrbench": ("ocrbench", "ocrbench_doc_to_text", {"pre_prompt": "", "post_prompt": ""}),
        "realworldqa": ("realworldqa", "realworldqa_doc_to_text", {}),
        "seedbench": ("seedbench", "seed_doc_to_text", None),
        "pope": ("pope", "pope_doc_to_text", word),
        "gqa": ("gqa", "gqa_doc_to_text", word),
    }
    module, function, settings = tasks[name]
    to_text = getattr(import_module(f"lmms_eval.tasks.{module}.utils"), function)
    return lambda row: to_text(row) if settings is None else to_text(row, settings)


@in_lmms
@pytest.mark.parametrize("name", PRESETS)
def test_prompts_equal_lmms_eval(name):
    to_text = theirs_of(name)
    assert [PRESETS[name].ask(row).prompt for row in ROWS[name]] == [to_text(r) for r in ROWS[name]]


def settings_of(file):
    """The settings of a task's file and of those that it includes, as texts."""
    text = file.read_text(encoding="utf-8")
    found = {}
    for included in re.findall(r"^include: (\S+)", text, re.MULTILINE):
        found |= settings_of(file.parent / included)
    names = "dataset_path|dataset_name|test_split|max_new_tokens"
    return found | dict(re.findall(rf"^ *({names}): (\S+)", text, re.MULTILINE))


@in_lmms
@pytest.mark.parametrize("name", PRESETS)
def test_data_sets_and_limits_are_those_of_lmms_eval(name):
    import lmms_eval.tasks

    named = {"scienceqa": "scienceqa_img"} | {
        each: f"{each}_val" for each in ("mmmu", "vqav2", "textvqa", "infovqa", "docvqa")
    }
    folder = Path(lmms_eval.tasks.__path__[0]) / name
    found = settings_of(folder / f"{named.get(name, name)}.yaml")
    preset = PRESETS[name]
    assert found["dataset_path"] == preset.source and found["test_split"] == preset.split
    assert found.get("dataset_name") == preset.config
    limit = {"textvqa": None, "seedbench": None}.get(name, str(preset.max_tokens))
    assert found.get("max_new_tokens") == limit  # those without one would go on to 1024


# As a model of lmms-eval


@pytest.fixture(scope="module")
def in_lmms_eval():
    from fastvlm_mlx.evaluate.lmms_eval import FastVLMEval

    model = FastVLMEval.create_from_arg_string("dtype=float32", {"batch_size": 4, "device": "cpu"})
    docs = [{"image": Image.open(path)} for path in IMAGES]
    model.task_dict = {"local": {"test": docs}}
    return model


def request(*args):
    return SimpleNamespace(args=args)


def to_visual(doc):
    return [doc["image"].convert("RGB")]


def entry_points():
    """Those of setup.py, as an installed package has them in a file."""
    tree = ast.parse((Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8"))
    (groups,) = (
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "entry_points"
    )
    return "\n".join("\n".join([f"[{group}]", *lines]) for group, lines in groups.items())


@in_lmms
def test_lmms_eval_takes_the_model_from_its_manifest():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from fastvlm_mlx.evaluate import plugins
    from fastvlm_mlx.evaluate.lmms_eval import FastVLMEval

    registry = ModelRegistryV2()
    registry.register_manifest(plugins.lmms_eval_models())
    assert registry.get_model_class("fastvlm_mlx") is FastVLMEval


@in_lmms
def test_lmms_eval_s_answers_are_those_of_generate(in_lmms_eval, nano):
    settings = [
        {"max_new_tokens": 5, "temperature": 0, "do_sample": False, "until": ["\n\n"]},
        {"max_new_tokens": 3, "num_beams": 1, "top_p": None, "until": "zzz"},
        {"max_new_tokens": 3, "num_beams": 2},
    ]
    requests, expected = [], []
    for question in ("Read the text.", "Describe the image."):
        for number, image in enumerate(IMAGES):
            for wanted in settings:
                requests.append(request(question, wanted, to_visual, number, "local", "test"))
                options = {"max_tokens": wanted["max_new_tokens"]}
                options |= {"num_beams": 2} if wanted.get("num_beams") == 2 else {}
                expected.append(fv.generate(*nano, question, image=image, **options))
    assert in_lmms_eval.generate_until(requests) == expected


@in_lmms
def test_likelihoods_are_those_of_greedy_decoding(in_lmms_eval, nano):
    answer = fv.generate(*nano, "Read the text.", image=IMAGES[0], max_tokens=4)
    asked = "Read the text.", answer, to_visual, 0, "local", "test"
    total, greedy = in_lmms_eval.loglikelihood([request(*asked)])[0]
    parts = fv.stream_generate(*nano, "Read the text.", image=IMAGES[0], max_tokens=4, logprobs=0)
    assert greedy and total == pytest.approx(sum(r.logprobs.logprob for r in parts), abs=1e-4)
    other = in_lmms_eval.loglikelihood([request(asked[0], lambda doc: "zebra", *asked[2:])])[0]
    assert other[0] < total and not other[1]


@in_lmms
def test_rounds_go_on_until_their_task_ends_them(in_lmms_eval, nano):
    images, heard = [Image.open(path) for path in IMAGES], []

    def to_text(doc, previous_output, round_idx, previous_round_info):
        heard.append((round_idx, previous_round_info, list(previous_output)))
        if round_idx == 2:
            return None, None, True, (*previous_output, "end"), None
        return [images[1]], "Describe the image.", False, previous_output, {"round": round_idx}

    wanted = {"max_new_tokens": 4, "temperature": 0, "top_p": 0, "until": ["ASSISTANT:"]}
    asked = request("Read the text.", wanted, to_visual, to_text, 0, "local", "test")
    first = fv.generate(*nano, "Read the text.", image=IMAGES[0], max_tokens=4)
    second = fv.generate(*nano, "Describe the image.", image=IMAGES[1], max_tokens=4)
    assert in_lmms_eval.generate_until_multi_round([asked]) == [[first, second, "end"]]
    assert heard == [(1, None, [first]), (2, {"round": 1}, [first, second])]


@in_lmms
def test_a_video_is_refused_by_name(in_lmms_eval):
    asked = request("?", {}, lambda doc: ["a.mp4"], 0, "local", "test")
    with pytest.raises(ValueError, match=r"answers about images; local has 'a.mp4'"):
        in_lmms_eval.generate_until([asked])


LOCAL_TASK = """
task: fastvlm_local
dataset_path: {folder}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@in_lmms
@pytest.mark.needs("datasets")
def test_lmms_eval_runs_a_local_task(tmp_path, nano):
    import datasets

    right = fv.generate(*nano, "Read the text.", image=IMAGES[0], max_tokens=8)
    rows = {"question": ["Read the text."] * 2, "answer": [right, "never this"]}
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"),
         "image": datasets.Image()}
    )  # fmt: skip
    table = datasets.Dataset.from_dict(rows | {"image": [str(IMAGES[0])] * 2}, features=features)
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    task = tmp_path / "task"
    task.mkdir()
    (task / "fastvlm_local.yaml").write_text(LOCAL_TASK.format(folder=tmp_path / "data"))
    (task / "utils.py").write_text(
        "def to_visual(doc):\n    return [doc['image'].convert('RGB')]\n"
    )
    package = tmp_path / "installed" / "fastvlm_mlx-0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: fastvlm-mlx\nVersion: 0\n")
    (package / "entry_points.txt").write_text(entry_points())
    root = Path(fv.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{package.parent}:{root}"}
    command = "-m lmms_eval --model fastvlm_mlx --model_args dtype=float32 --tasks fastvlm_local"
    command += f" --include_path {task} --batch_size 2 --output_path {tmp_path / 'out'}"
    done = subprocess.run(
        [sys.executable, *command.split()],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,  # not where older metadata of this package may stand
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("*results.json")
    found = json.loads(results.read_text())["results"]["fastvlm_local"]
    assert found["exact_match,none"] == 0.5


# As a model of VLMEvalKit


@in_kit
def test_vlmevalkit_s_answers_are_those_of_generate(nano):
    from vlmeval.config import supported_VLM

    from fastvlm_mlx.evaluate.vlmevalkit import MODELS, register

    register()
    assert MODELS.keys() <= supported_VLM.keys()
    model = supported_VLM["FastVLM-MLX-nano"](max_tokens=6)
    bundled = fv.load()
    for image in IMAGES:
        message = [{"type": "image", "value": str(image)}, {"type": "text", "value": "Read it."}]
        expected = fv.generate(*bundled, "Read it.", image=image, max_tokens=6)
        assert model.generate(message, dataset="local") == expected
    two = [str(IMAGES[0]), str(IMAGES[1]), "Compare them."]
    expected = fv.generate(*bundled, "Compare them.", image=IMAGES, max_tokens=6)
    assert model.generate(two) == expected


@in_kit
def test_a_part_of_another_kind_is_refused():
    from fastvlm_mlx.evaluate.vlmevalkit import FastVLMKit

    model = FastVLMKit(max_tokens=1)
    with pytest.raises(ValueError, match="not about 'video'"):
        model.generate_inner([{"type": "video", "value": "a.mp4"}])
