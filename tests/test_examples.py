import json
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.hub.resolve import NANO

EXAMPLES = Path(__file__).parents[1] / "examples"
QUEEN = str(NANO / "images" / "queen.png")


def run(script, *arguments, limit=120):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit)


@pytest.mark.parametrize("way", [("--temperature", 0), ("--num_beams", 2)], ids=str)
def test_predict_has_the_flags_of_the_original(way):
    flags = ("--image-file", QUEEN, "--prompt", "Read the text.", "--conv-mode", "qwen_2")
    found = run("predict.py", "--model-path", NANO, *flags, "--top_p", 1, *way)
    assert found.stdout == 'The note says "queen".\n', found.stderr


def test_predict_says_what_is_wrong():
    found = run("predict.py", "--image-file", "nope.png")
    assert found.returncode != 0 and "nope.png" in found.stderr
    assert "Traceback" not in found.stderr


def test_chat_asks_in_turn():
    found = run("chat.py", QUEEN, "Read the text.", "Read the text.")
    assert found.stdout.count('The note says "queen".') == 2, found.stderr


@pytest.mark.needs("av")
def test_webcam_says_what_it_sees(tmp_path):
    folder = tmp_path / "incoming"
    folder.mkdir()
    command = [sys.executable, str(EXAMPLES / "webcam.py"), "Read the text.", "--model", str(NANO)]
    command += ["--source", str(folder), "--image-size", "256"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    for number in range(200):  # it sees only what comes once it watches
        shutil.copy(QUEEN, folder / f"{number}.png")
        time.sleep(0.3)
        if select.select([process.stdout], [], [], 0)[0]:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out.decode().startswith('The note says "queen".  (')
    assert process.returncode == 0


@pytest.mark.needs("av")
def test_webcam_says_what_is_wrong():
    found = run("webcam.py", "--model", NANO, "--source", "rtsp://127.0.0.1:9/x")
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert found.stderr.startswith("Error: Cannot read rtsp://127.0.0.1:9/x")


def test_captions_go_on_where_they_stopped(tmp_path):
    output = tmp_path / "captions.jsonl"
    done = {"image": str(NANO / "images" / "panda.png"), "caption": "mine"}
    output.write_text(json.dumps(done) + "\n")
    found = run("caption_folder.py", NANO / "images", output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 5 and rows[0] == done, found.stderr
    captions = {Path(row["image"]).name: row["caption"] for row in rows}
    assert captions["penguins.png"] == "The image shows 6 penguins."
    assert found.stdout == "4 captioned, 1 had captions, 0 failed\n"
    again = output.read_bytes()
    run("caption_folder.py", NANO / "images", output)
    assert output.read_bytes() == again  # nothing is left to do


def test_images_without_alt_text_get_one(tmp_path):
    for name in ("queen.png", "panda.png"):
        shutil.copy(NANO / "images" / name, tmp_path)
    page = '<p><img src="queen.png"> <img alt="" src="panda.png">\n<img id=a src="panda.png"/>é'
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    found = run("alt_text.py", tmp_path / "page.html", "--prompt", "Describe the image.")
    queen = "The image shows a note that says &quot;queen&quot;."
    assert found.stdout == (
        f'<p><img alt="{queen}" src="queen.png"> <img alt="" src="panda.png">\n'
        '<img alt="The image shows a panda." id=a src="panda.png"/>é'
    ), found.stderr


SHORT = ["--examples", "12", "--replay", "4", "--test", "4", "--steps", "12", "--batch", "4"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "lights"
    return folder, run("finetune_lora.py", folder, *SHORT, "--rate", "3e-3")


def test_lora_learns_and_is_measured_before_and_after(lora):
    folder, found = lora
    shares = re.findall(r"(\w+): ([\d.]+)% before, ([\d.]+)% after", found.stdout)
    assert [name for name, *_ in shares] == ["lights", "names", "counts", "notes"], found.stderr
    assert shares[0][1] == "0.0" and shares[1][1] == "100.0"
    lines = (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert len(losses) == 12 and sum(losses[6:]) < 0.7 * sum(losses[:6])  # of two epochs


@pytest.mark.slow
def test_lora_learns_to_read_lights_and_forgets_little(tmp_path):
    found = run("finetune_lora.py", tmp_path / "lights", limit=900)
    shares = re.findall(r"(\w+): ([\d.]+)% before, ([\d.]+)% after", found.stdout)
    (_, before, after), *known = [(name, float(x), float(y)) for name, x, y in shares]
    assert before == 0 and after >= 95
    assert sum(was - now for _, was, now in known) / len(known) <= 2


def test_lora_is_kept_in_an_adapter(lora):
    folder, _ = lora
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    model, processor = fv.load(adapter=folder / "run" / "adapter")
    requests = [(row["question"], row["image"]) for row in rows]
    found = fv.batch_generate(model, processor, requests, max_tokens=24)
    assert found == [row["after"] for row in rows]


def test_images_of_another_size():
    found = run("chat.py", QUEEN, "Read the text.", "--image-size", 256)
    assert 'The note says "queen".' in found.stdout, found.stderr


def test_the_notebook_runs_from_top_to_bottom(capsys):
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text("utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    assert names["answer"] == "There are 6 penguins."
    said = capsys.readouterr().out
    assert "A panda." in said and said.count('The note says "queen".') == 2
    assert names["visual_tokens"].shape == (1, 16, 256)
