"""lm-eval: our model class beside its own for transformers, and `bitllm eval` as people run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from bitllm import ChatTemplateError, ConfigError, ContextOverflowError, load
from bitllm.cli.app import app
from bitllm.integrations.evaluation import TaskSettings, as_values, find_tasks, run_tasks
from bitllm.integrations.lm_eval import BitllmLM
from cli_model import write_model
from transformers_model import CONTEXT, write_transformers_model

# Those of other people's code.
pytestmark = pytest.mark.filterwarnings("ignore::Warning")

PAIRS = [
    ("The quick brown fox", " jumps over the lazy dog"),
    ("The quick brown fox", " sleeps"),
    ("The quick brown fox ", "jumps"),  # the space belongs to the answer
    ("", "The dog sleeps."),
    ("<s>Größe:", " 12"),
    ("the dog and the fox " * 40, "sleep"),  # cut on the left
    ("x", " " + "lazy dog " * 5),
]
TEXTS = ["The quick brown fox.", "the dog sleeps and the fox jumps " * 20, "é"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models") / "written by transformers"


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    model = write_transformers_model(directory)
    model.config._name_or_path = str(directory)
    return HFLM(pretrained=model, tokenizer=str(directory), device="cpu", batch_size=2)


@pytest.fixture(scope="module", params=["cpu", "reference"])
def ours(request: pytest.FixtureRequest, directory: Path, theirs: Any) -> Iterator[BitllmLM]:
    with load(directory, device=request.param, kv_dtype="fp32", kv_tokens=4 * CONTEXT) as llm:
        yield BitllmLM(llm, progress=False)


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_loglikelihoods_and_greedy_flags_are_those_of_transformers(
    ours: BitllmLM, theirs: Any
) -> None:
    greedy = [("The quick", theirs_writes(theirs, "The quick"))]
    found = ours.loglikelihood(requests(*PAIRS, *greedy))
    expected = theirs.loglikelihood(requests(*PAIRS, *greedy), disable_tqdm=True)
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert found[-1][1]
    # Float32 on both sides; a rounding of the activations may fall to the other side in a text.
    errors = [abs(a - b) / abs(b) for (a, _), (b, _) in zip(found, expected, strict=True)]
    assert sorted(errors)[len(errors) // 2] < 1e-5
    assert max(errors) < 1e-2


def theirs_writes(theirs: Any, prompt: str) -> str:
    """Three tokens that transformers writes."""
    options = {"until": [], "max_gen_toks": 3, "do_sample": False}
    (text,) = theirs.generate_until(requests((prompt, options)), disable_tqdm=True)
    return str(text)


def test_the_same_tokens_are_scored(ours: BitllmLM, theirs: Any) -> None:
    for context, continuation in PAIRS:
        if context:
            assert ours._encode_pair(context, continuation) == theirs._encode_pair(
                context, continuation
            )
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.max_length == theirs.max_length == CONTEXT


def test_whole_texts_are_scored_as_by_transformers(ours: BitllmLM, theirs: Any) -> None:
    asked = requests(*((text,) for text in TEXTS))
    assert len(ours.tok_encode(TEXTS[1])) > CONTEXT
    found = ours.loglikelihood_rolling(asked)
    assert found == pytest.approx(theirs.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-3)


def test_greedy_texts_end_at_their_stop_strings(ours: BitllmLM, theirs: Any) -> None:
    free = {"until": [], "max_gen_toks": 12}
    (whole,) = ours.generate_until(requests(("The quick", free)))
    assert whole == ours.llm.generate("The quick", max_tokens=12, temperature=0).text
    stop = whole[4:6]
    stopped = {"until": [stop, ""], "max_gen_toks": 12}
    asked = requests(("The quick", stopped), ("The quick", free), ("fox", free))
    found = ours.generate_until(asked)
    assert found[:2] == [whole.split(stop)[0], whole]
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert found == expected


def test_a_long_prompt_is_cut_on_the_left_to_leave_room(ours: BitllmLM, theirs: Any) -> None:
    asked = requests(("the dog and the fox " * 40, {"until": ["\n"], "max_gen_toks": 8}))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_samples_of_one_prompt_differ_and_come_again(ours: BitllmLM) -> None:
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    asked = requests(*[("The", options)] * 3)
    first = ours.generate_until(asked)
    assert len(set(first)) == 3
    assert ours.generate_until(asked) == first


def test_the_chat_template_is_that_of_transformers(ours: BitllmLM, theirs: Any) -> None:
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Thus "}]
    assert ours.apply_chat_template(turns[:1]) == theirs.apply_chat_template(turns[:1])
    mine, other = (lm.apply_chat_template(turns, False) for lm in (ours, theirs))
    assert mine == other
    assert mine.endswith("Thus ")
    assert ours.chat_template(True) == theirs.chat_template(True)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num_beams": 4}, ConfigError, "no sampling option 'num_beams'"),
        ({"max_gen_toks": CONTEXT}, ContextOverflowError, "a task asks for 128 tokens"),
        ({"do_sample": True, "temperature": -1.0}, ConfigError, "temperature"),
    ],
)
def test_what_a_task_cannot_ask_for(
    ours: BitllmLM, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        ours.generate_until(requests(("x", {"until": [], **options})))


def test_an_answer_longer_than_the_context_is_refused(ours: BitllmLM) -> None:
    with pytest.raises(ContextOverflowError, match="an answer of a task has"):
        ours.loglikelihood(requests(("x", "the dog " * 200)))


def test_a_template_that_hides_the_message_to_be_continued(
    ours: BitllmLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(ours.tokenizer), "apply_chat_template", lambda *_, **__: "fixed")
    with pytest.raises(ChatTemplateError, match="does not show the message"):
        ours.apply_chat_template([{"role": "assistant", "content": "Thus"}], False)


def test_a_loaded_model_takes_no_options(ours: BitllmLM) -> None:
    with pytest.raises(ConfigError, match="threads: the model is loaded already"):
        BitllmLM(ours.llm, threads=1)


def test_arguments_of_the_command_line_load_a_model(directory: Path, theirs: Any) -> None:
    from lm_eval.api.registry import get_model

    model = get_model("bitllm").create_from_arg_string(
        f"pretrained={directory},context=64,device=reference", {"batch_size": 1, "device": None}
    )
    assert model.max_length == 64
    assert model.llm.info.backend == "reference"
    model.llm.close()


# Tasks of one's own

PAGE = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over files: a choice, a text to write, and a text to foresee."""
    directory = tmp_path_factory.mktemp("tasks")
    answers = [" dog", " fox", " the"]
    rows = [{"q": f"The quick brown {i}", "answers": answers, "label": i % 3} for i in range(6)]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = (
        "dataset_path: json\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: '{directory / 'rows.jsonl'}'\n"
        "metadata:\n  version: 3\n"
    )
    (directory / "choice.yaml").write_text(
        f"task: tiny_choice\n{shared}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{answers}}'\ndoc_to_target: label\nmetric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    (directory / "write.yaml").write_text(
        f"task: tiny_write\n{shared}output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_target: '{{answers[label]}}'\ngeneration_kwargs:\n  until: ['.']\n"
        "  max_gen_toks: 4\nmetric_list:\n"
        "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    (directory / "foresee.yaml").write_text(
        f"task: tiny_foresee\n{shared}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{q}}'\nmetric_list:\n  - metric: bits_per_byte\n"
    )
    return directory


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network, and a cache of data sets that goes away."""
    import datasets.config

    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("BITLLM_DEVICE", "reference")


def evaluate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["eval", *arguments], prog_name="bitllm")


def test_results_are_those_of_transformers(ours: BitllmLM, theirs: Any, tasks: Path) -> None:
    from lm_eval.evaluator import simple_evaluate

    settings = TaskSettings(
        tasks=["tiny_choice", "tiny_write", "tiny_foresee"], include_paths=[tasks]
    )
    found = find_tasks(settings)
    mine = as_values(run_tasks(ours.llm, settings, found, progress=False))["tasks"]
    other = as_values(
        simple_evaluate(model=theirs, tasks=list(found.names), task_manager=found.manager)
    )["tasks"]
    assert mine["tiny_choice"] == other["tiny_choice"]
    assert mine["tiny_write"] == other["tiny_write"]
    (ours_bits,), (their_bits,) = mine["tiny_foresee"]["metrics"], other["tiny_foresee"]["metrics"]
    assert ours_bits["name"] == "bits_per_byte"
    assert ours_bits["value"] == pytest.approx(their_bits["value"], rel=1e-4)


def test_the_command_prints_a_table_or_json_and_writes_everything(
    directory: Path, theirs: Any, tasks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    arguments = [str(directory), "--include-path", str(tasks), "--tasks", "tiny_choice"]
    command = [sys.executable, "-m", "bitllm", "eval", *arguments, "--limit", "4"]
    command += ["--num-fewshot", "0", "--json", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (metric,) = document["tasks"]["tiny_choice"].pop("metrics")
    assert document["tasks"] == {"tiny_choice": {"version": 3, "samples": 4, "num_fewshot": 0}}
    assert document["model"] == directory.name
    assert document["groups"] == {}
    assert (metric["name"], metric["filter"], metric["higher_is_better"]) == ("acc", "none", True)
    assert done.stderr.endswith(f"eval: results in {output}\n")
    assert "%|" not in done.stderr  # no bars without a terminal
    whole = json.loads(output.read_text())
    assert len(whole["samples"]["tiny_choice"]) == 4
    assert whole["results"]["tiny_choice"]["acc,none"] == metric["value"]
    assert list(tmp_path.iterdir()) == [output]
    table = evaluate(*arguments, "--limit", "4")
    assert re.search(rf"\|acc *\|↑ *\| *{metric['value']:.4g}\|", table.stdout)


def test_a_chat_template_is_used_where_asked(
    directory: Path, theirs: Any, tasks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    arguments = [str(directory), "--include-path", str(tasks), "--tasks", "tiny_write"]
    done = evaluate(*arguments, "--limit", "1", "--system", "Be brief.", "-o", str(output))
    assert done.exit_code == 0, done.stderr
    (sample,) = json.loads(output.read_text())["samples"]["tiny_write"]
    assert sample["arguments"][0][0] == (
        "<|system|>Be brief.\n<|user|>The quick brown 0\n<|assistant|>"
    )


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (["--tasks", "tiny_choise"], "lm-eval has no task 'tiny_choise'", "mean tiny_choice"),
        (
            ["--tasks", "tiny_choice", "--include-path", "no/where"],
            "no/where: there is no such",
            "",
        ),
        (["--tasks", "tiny_choice", "-o", "no/where/x.json"], "there is no directory no/where", ""),
        (["--tasks", "broken"], "lm-eval could not run broken", "--verbose shows where"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, tasks: Path, arguments: list[str], says: str, hint: str
) -> None:
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: '{tmp_path / 'nothing.jsonl'}'}}}}\n"
    )
    model = str(write_model(tmp_path / "model"))
    paths = ["--include-path", str(tasks), "--include-path", str(tmp_path)]
    done = evaluate(model, *paths, *arguments)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert says in done.stderr
    assert hint in done.stderr
    assert "this is a bug" not in done.stderr


def test_a_model_without_a_template_is_refused(tmp_path: Path, tasks: Path) -> None:
    model = str(write_model(tmp_path / "model", chat=False))
    done = evaluate(model, "--include-path", str(tasks), "--tasks", "tiny_write", "--chat")
    assert done.exit_code == 1
    assert "has no chat template" in done.stderr


def test_without_tasks_or_without_lm_eval(tmp_path: Path) -> None:
    assert evaluate(str(tmp_path)).exit_code == 2
    assert "no task is named" in evaluate(str(tmp_path), "--tasks", " , ").stderr
    script = (
        "import sys; sys.modules['lm_eval'] = None; from bitllm.cli import main;"
        "sys.argv = ['bitllm', 'eval', '--tasks', 'x']; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: evaluation by tasks needs lm-eval" in done.stderr
    assert "hint: install it with `pip install 'bitllm[eval]'`" in done.stderr


def test_lm_evals_own_command_knows_us(directory: Path, theirs: Any, tasks: Path) -> None:
    command = [sys.executable, "-m", "bitllm.integrations.lm_eval", "run", "--model", "bitllm"]
    command += ["--model_args", f"pretrained={directory},device=reference", "--tasks"]
    command += ["tiny_choice", "--include_path", str(tasks), "--limit", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny_choice" in done.stdout
    assert "bitllm" in done.stdout


def test_the_task_of_the_page_runs(directory: Path, theirs: Any, tmp_path: Path) -> None:
    (task,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (row,) = re.findall(r'`(\{"country".*?\})`', PAGE)
    (tmp_path / "capitals.jsonl").write_text(row)
    (tmp_path / "capitals.yaml").write_text(task.replace("/path/to", str(tmp_path)))
    done = evaluate(str(directory), "--include-path", str(tmp_path), "--tasks", "capitals")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"\|capitals *\|Yaml *\|none", done.stdout)


def test_the_python_of_the_page_runs(capfd: pytest.CaptureFixture[str]) -> None:
    first, last = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(first, "docs/evaluation.md", "exec"), {})
    assert len(capfd.readouterr().out.split()) == 3
    compile(last, "docs/evaluation.md", "exec")
