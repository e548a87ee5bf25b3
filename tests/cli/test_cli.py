"""The command as a user runs it: its output and its exit status."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

import rope_scaling
from rope_scaling import METHODS, RopeScalingError
from rope_scaling.cli.evaluate import _factor
from rope_scaling.cli.main import main
from rope_scaling.hf.loading import load_tokenizer


def run(*arguments, cwd=None):
    environment = os.environ | {"COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "rope_scaling.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with the embedded model's tokenizer, as a folder."""
    path = tmp_path_factory.mktemp("model")
    make_model("llama", vocab_size=4096).save_pretrained(path)
    load_tokenizer("demo").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("def f(x):\n    return x + 1\n" * 100)
    return path


def test_evaluate_writes_everything_and_shows_a_table(folder, text, tmp_path, command):
    done = command(
        "evaluate",
        "--model",
        folder,
        "--method",
        "yarn",
        "--method",
        "linear",
        "--data",
        text,
        "--output",
        tmp_path / "out",
        "--lengths",
        "1x,128,4x",
    )
    assert done.returncode == 0, done.stderr
    progress = [line for line in done.stderr.splitlines() if "minutes left" in line]  # a log, not a terminal
    assert [line.split()[1].strip(",") for line in progress] == ["unpatched", "cropping", "yarn", "linear"]
    assert re.match(r" *\d+%  unpatched, about \d+\.\d minutes left$", progress[0])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "settings.json",
        "rows.jsonl",
        "perplexity",
        "costs.jsonl",
        "table.md",
        "curves.png",
    }
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["method"] for row in rows)) == ["unpatched", "cropping", "yarn", "linear"]
    assert rows[0]["lengths"] == [64, 128, 256] and rows[0]["factor"] == 4.0
    for word in ("unpatched", "cropping", "yarn", "linear", "(2x,4x]", "trained length 64"):
        assert word in done.stdout


def test_what_a_task_prepares_is_found_again_without_an_output_folder(folder, text, tmp_path, command, monkeypatch):
    from rope_scaling.eval.tasks.key_tokens import KeyTokens

    settings = '{"gain": -100.0, "loss": 100.0, "short_context": 16, "evaluator_method": "unpatched"}'
    arguments = ["--model", folder, "--data", text, "--lengths", "2x", "--task", f"key_tokens:{settings}"]
    first = command("evaluate", *arguments, "--method", "yarn", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (masks,) = (tmp_path / "runs" / "prepared").glob("key_tokens/masks-*.npz")
    monkeypatch.setattr(KeyTokens, "_mask", None)
    again = command("evaluate", *arguments, "--method", "linear", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "prepared")
    assert run.name.startswith("evaluate-") and masks.exists()


def test_a_model_that_was_saved_patched_is_measured_against_the_one_it_was_made_from(folder, text, tmp_path, command):
    model = rope_scaling.patch(make_model("llama", vocab_size=4096), "resonance", wrapped="yarn", factor=2)
    model.save_pretrained(tmp_path / "saved")
    load_tokenizer("demo").save_pretrained(tmp_path / "saved")
    rows = {}
    for name, method in ((folder, ["--method", "yarn:factor=2"]), (tmp_path / "saved", [])):
        out = tmp_path / "out" / Path(name).name
        done = command("evaluate", "--model", name, *method, "--data", text, "--output", out, "--lengths", "1x,2x")
        assert done.returncode == 0, done.stderr
        rows[name] = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    plain, saved = rows.values()
    assert list(dict.fromkeys(row["method"] for row in saved)) == [
        "unpatched",
        "cropping",
        "yarn",
        saved[-1]["method"],
    ]
    assert saved[-1]["method"] == "saved resonance:wrapped=(yarn:factor=2)"
    assert saved[-1]["in_effect"] == "resonance:wrapped=(yarn:factor=2)"
    assert saved[-1]["target_length"] == 128
    for one, other in zip(plain[:5], saved[:5], strict=True):
        assert one["measure"] == other["measure"]
        assert one["nll"] == pytest.approx(other["nll"], abs=1e-6)
        assert one["frequencies_sha256"] == other["frequencies_sha256"]


def test_methods_fit_one_screen(command):
    lines = command("methods").stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in METHODS)


def test_describe_reads_a_config_and_shows_what_a_method_would_do(folder, command):
    plain = command("describe", folder)
    assert plain.returncode == 0 and "model.rotary_emb: not patched" in plain.stdout
    would = command("describe", folder, "--method", "yarn:beta_fast=16", "--factor", "4", "--pairs")
    assert "yarn:factor=4,beta_fast=16" in would.stdout and "rotations in trained / target length" in would.stdout


def test_export_writes_a_folder_or_prints_the_keys(folder, tmp_path, command):
    printed = command("export", folder, "--target", "vllm", "--method", "ntk", "--factor", "4")
    keys = json.loads(printed.stdout)
    assert keys["max_position_embeddings"] == 256 and keys["rope_theta"] > 10000
    done = command(
        "export", folder, "--target", "sglang", "--method", "yarn", "--factor", "4", "--out", tmp_path / "out"
    )
    assert done.returncode == 0 and "its README.md says how to serve it" in done.stdout
    saved = tmp_path / "saved"
    rope_scaling.patch(make_model("llama", vocab_size=4096), "yarn", factor=4).save_pretrained(saved)
    again = command("export", saved, "--target", "sglang")
    assert json.loads(again.stdout)["rope_parameters"]["factor"] == 4
    refused = command("export", folder, "--target", "vllm", "--method", "rerope", "--out", tmp_path / "no")
    assert refused.returncode == 2 and "'rerope' changes attention" in refused.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("out", "saved")] == []


ORIGINAL = ("--original-max-position-embeddings", 64)


@pytest.fixture(scope="module")
def overstated(tmp_path_factory):
    """A folder whose config states 80 tokens of a model that was trained at 64, as Qwen3's does."""
    path = tmp_path_factory.mktemp("overstated")
    make_model("llama", vocab_size=4096, max_position_embeddings=80).save_pretrained(path)
    load_tokenizer("demo").save_pretrained(path)
    return path


@pytest.mark.parametrize("given", [["yarn", *ORIGINAL], ["yarn:original_max_position_embeddings=64"]])
def test_a_trained_length_that_the_config_does_not_know(given, overstated, command):
    method = ["--method", *given, "--factor", 4]
    described = command("describe", overstated, *method)
    assert "64 trained, 64 as loaded, 256 now" in described.stdout
    keys = json.loads(command("export", overstated, "--target", "vllm", *method).stdout)
    assert keys["max_position_embeddings"] == 256
    assert keys["rope_parameters"]["original_max_position_embeddings"] == 64


def test_the_doctor_takes_a_trained_length_that_the_config_does_not_know(overstated, tmp_path, command):
    assert "64 trained, 64 as loaded" in command("doctor", overstated, *ORIGINAL).stdout
    config = json.loads((overstated / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    config["max_position_embeddings"] = 256
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "RS102" in command("doctor", tmp_path).stdout
    told = command("doctor", tmp_path, *ORIGINAL)
    assert "64 trained, 256 as loaded" in told.stdout and "RS10" not in told.stdout and not told.stderr
    rope_scaling.patch(make_model("llama"), "yarn", factor=2).save_pretrained(tmp_path / "patched")
    assert "records the trained length" in command("doctor", tmp_path / "patched", *ORIGINAL).stderr


def test_evaluate_counts_in_the_trained_length_that_it_is_told(overstated, folder, text, tmp_path, command):
    found = {}
    for model, arguments in ((overstated, ORIGINAL), (folder, ())):
        out = tmp_path / model.name
        lengths = ["--lengths", "1x,2x", "--max-documents", 1, "--method", "self_extend"]
        done = command("evaluate", "--model", model, "--data", text, *lengths, *arguments, "--output", out)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
        found[model] = [(row["method"], row["to"], row["nll"]) for row in rows if "nll" in row]
        assert rows[0]["trained_length"] == 64
    assert found[overstated] == found[folder]


@pytest.mark.parametrize("name", ["describe", "evaluate", "harness", "export", "doctor"])
def test_help_names_the_trained_length(name, command):
    assert ORIGINAL[0][:20] in command(name, "--help").stdout


@pytest.mark.parametrize("module", ["rope_scaling", "rope_scaling.cli.main"])
def test_the_version(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"rope-scaling {rope_scaling.__version__}\n" and not done.stderr


def test_names_of_methods_in_any_case(folder, command):
    lines = command("describe", folder, "--method", "YaRN:beta_fast=16 + Log-N", "--factor", 4).stdout
    assert "yarn:factor=4,beta_fast=16 + log_n" in lines


def test_a_length_is_tokens_or_a_multiple(folder, command):
    method = ["--method", "yarn"]
    wanted = command("describe", folder, *method, "--target-length", 2048).stdout
    assert "64 trained, 64 as loaded, 2048 now" in wanted
    for written in ("2k", "2K", "32x"):
        assert command("describe", folder, *method, "--target-length", written).stdout == wanted
    assert "yarn:factor=32" in command("describe", folder, "--method", "yarn:target_length=2k").stdout
    original = command("describe", folder, *method, "--factor", 2, ORIGINAL[0], "1k")
    assert "1024 trained" in original.stdout
    keys = [
        json.loads(command("export", folder, "--target", "vllm", *method, "--target-length", written).stdout)
        for written in ("256", "4x", "0.25k")
    ]
    assert keys[0] == keys[1] == keys[2]
    found = [command("doctor", "demo", "--target-length", written).stdout for written in ("512", "2x", "0.5k")]
    assert found[0] == found[1] == found[2] and "RS" in found[0]


def test_help_names_the_commands():
    assert all(name in run("--help").stdout for name in ("evaluate", "methods", "describe"))


def case(message, *arguments):
    return pytest.param(arguments, message, id=" ".join(arguments)[:60])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        case("Unknown method 'yran'. Did you mean 'yarn'?", "evaluate", "--method", "yran"),
        case(
            "Unknown argument of 'yarn': 'bta_fast'. Did you mean 'beta_fast'?",
            "evaluate",
            "--model",
            "MODEL",
            "--data",
            "TEXT",
            "--method",
            "yarn:bta_fast=3",
        ),
        case(
            "`factor` must be a finite number, at least 1; got 0.5", "evaluate", "--model", "MODEL", "--factor", "0.5"
        ),
        case(
            "`factor` must be a finite number, at least 1; got nan", "evaluate", "--model", "MODEL", "--factor", "nan"
        ),
        case("Invalid value for '--factor'", "evaluate", "--factor", "four"),
        case("not both", "evaluate", "--model", "MODEL", "--factor", "4", "--target-length", "256"),
        case(
            "`--target-length` is 32, but the context length as loaded is 64",
            "evaluate",
            "--model",
            "MODEL",
            "--target-length",
            "32",
        ),
        case(
            "self_extend supports 288 tokens on this model with these settings, and 512 are wanted",
            *("evaluate", "--model", "MODEL", "--method", "self_extend", "--factor", "8"),
        ),
        case(
            "The factor is 4, but 'yarn:factor=2' brings its own",
            *("evaluate", "--model", "MODEL", "--method", "yarn:factor=2", "--target-length", "256"),
        ),
        case(
            "`factor` is 4, but the method has 2",
            *("evaluate", "--model", "MODEL", "--method", "yarn:factor=2+log_n", "--factor", "4"),
        ),
        case("`lengths` must be ascending", "evaluate", "--model", "MODEL", "--lengths", "4x,2x"),
        case("got 'infx'", "evaluate", "--model", "MODEL", "--lengths", "infx"),
        case("got 'nan'", "evaluate", "--model", "MODEL", "--lengths", "1x,nan"),
        case("Unknown argument of 'yarn': 'method'", "evaluate", "--method", "yarn:method=ntk"),
        case("got 'long'", "evaluate", "--model", "MODEL", "--lengths", "1x,long"),
        case("There is no model folder './nowhere'", "evaluate", "--model", "./nowhere"),
        case("Cannot load 'no-such-org/no-such-model'", "evaluate", "--model", "no-such-org/no-such-model"),
        case("There is no file or folder './nothing.txt'", "evaluate", "--model", "MODEL", "--data", "./nothing.txt"),
        case(
            "No document has 1048576 tokens", "evaluate", "--model", "MODEL", "--data", "TEXT", "--lengths", "1048576"
        ),
        case("Cannot read", "evaluate", "--model", "MODEL", "--data", "BINARY"),
        case(
            "`dtype` must be one of auto, float32, bfloat16, float16; got 'int8'",
            "evaluate",
            "--model",
            "MODEL",
            "--dtype",
            "int8",
        ),
        case("`device` 'toaster' cannot be used here", "evaluate", "--model", "MODEL", "--device", "toaster"),
        case(
            "exists and holds other files",
            "evaluate",
            "--model",
            "MODEL",
            "--data",
            "TEXT",
            "--method",
            "yarn",
            "--output",
            "OCCUPIED",
        ),
        case("'yarn' requires a length: give `factor` or `target_length`", "describe", "MODEL", "--method", "yarn"),
        case("`--factor` can only be given with `--method`", "describe", "MODEL", "--factor", "4"),
        case(
            "`--original-max-position-embeddings` can only be given with `--method`",
            "describe",
            "MODEL",
            "--original-max-position-embeddings",
            "32",
        ),
        case("has no model: there is no `config.json`", "describe", "OCCUPIED"),
        case("has no rotary position embedding", "describe", "GPT2"),
        case("must be even", "describe", "ODD"),
        case("Cannot load", "describe", "LENGTHLESS"),
        case(
            "`long_factor` has 2 numbers; this model rotates 8 pairs",
            "describe",
            "MODEL",
            "--factor",
            "2",
            "--method",
            'longrope:{"long_factor": [1, 2]}',
        ),
        case("the longest of 1 has 1 tokens", "evaluate", "--model", "MODEL", "--data", "EMPTY"),
        case(
            "`target_length` takes tokens such as 32768 or 32k, or a multiple such as 8x; got '8y'",
            "describe",
            "MODEL",
            "--method",
            "yarn",
            "--target-length",
            "8y",
        ),
        case("must be a whole number of tokens, at least 1; got '8x'", "describe", "MODEL", ORIGINAL[0], "8x"),
        case("`--target-length` can only be given with `--method`", "describe", "MODEL", "--target-length", "8x"),
        case("is a multiple of the length that", "doctor", "LENGTHLESS", "--target-length", "8x"),
        case("Unknown argument of 'yarn': 'bta_fast'", "describe", "MODEL", "--method", "yarn:bta_fast=16"),
        case("unexpected extra argument(s) (vllm)", "export", "MODEL", "vllm"),
        case("Missing option '--target'", "export", "MODEL"),
        case("No such option: --modle", "export", "--modle", "demo"),
        case("No such command 'evalute'", "evalute"),
        case("No such option: --metod", "evaluate", "--metod", "yarn"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, folder, text, tmp_path, capsys, monkeypatch):
    from transformers import GPT2Config

    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("precious")
    GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=16).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "empty.txt").write_text("")
    make_model("phi", partial_rotary_factor=1.0, hidden_size=12).save_pretrained(tmp_path / "odd")
    (tmp_path / "lengthless").mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": None}
    (tmp_path / "lengthless" / "config.json").write_text(json.dumps(config))
    places = {name.upper(): tmp_path / name for name in ("odd", "lengthless", "occupied", "gpt2")}
    places |= {"MODEL": folder, "TEXT": text, "BINARY": tmp_path / "binary.txt", "EMPTY": tmp_path / "empty.txt"}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([str(places.get(argument, argument)) for argument in arguments])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("rope-scaling: error: ") and message in last, printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "runs").exists(), "nothing half-written is left behind"
    assert [file.name for file in (tmp_path / "occupied").iterdir()] == ["thesis.tex"]


def test_the_exit_status_reaches_the_shell():
    done = run("evaluate", "--method", "yran")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_warning_is_one_line(folder, text, tmp_path, capsys):
    arguments = ["--model", folder, "--method", "self_extend:group_size=2", "--data", text, "--lengths", "4x"]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *map(str, arguments), "--output", str(tmp_path / "out")])
    assert stopped.value.code == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(
        line.startswith("rope-scaling: warning: A text of 255 tokens exceeds the context length of") for line in lines
    )
    assert not any("UserWarning" in line for line in lines)


def hub_error(name, text):
    """What Transformers makes of the hub's error of that class."""
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None, status_code=401)
    try:
        raise OSError(text) from getattr(errors, name)("401 Client Error", response=response)
    except OSError as error:
        return error


WHILE_LOADING = {
    "network": (ConnectionError("Connection broken: IncompleteRead(3 bytes read)"), "finished downloads are kept"),
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "give another `dtype` or `dev"),
    "memory of the processor": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 2 GB"), "Free memory"),
    "package": (ImportError("Using `bitsandbytes` requires `pip install bitsandbytes`"), "Install what is missing"),
    "disk": (OSError(28, "No space left on device"), "Make room on the disk"),
    "gated": (hub_error("GatedRepoError", "You are trying to access a gated repo."), "`hf auth login`"),
    "no such name": (
        hub_error("RepositoryNotFoundError", "not a valid model identifier"),
        "a hub id such as 'org/name'",
    ),
    "no such revision": (hub_error("RevisionNotFoundError", "x is not a valid git identifier"), "Give a branch, tag"),
    "no such file": (OSError("org/name does not appear to have a file named x"), "a hub id that has the file"),
    "another": (ValueError("Unrecognized model in org/name"), "Give a folder, a hub id"),
}


@pytest.mark.parametrize("kind", WHILE_LOADING)
def test_what_keeps_a_model_from_loading_is_named_as_what_it_is(kind, monkeypatch, capsys):
    import transformers

    error, remedy = WHILE_LOADING[kind]

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", broken)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--model", "demo", "--dtype", "float32"])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert str(error) in printed and remedy in printed and printed.count("\n") == 1
    assert ("download" in printed) == (kind == "network")


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_damaged_file_is_called_damaged(folder, tmp_path, size, capsys):
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", str(tmp_path / "cut")])
    assert "damaged or incomplete" in capsys.readouterr().err.splitlines()[-1]
    weights.unlink()
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", str(tmp_path / "cut")])
    assert "no file named model.safetensors" in capsys.readouterr().err.splitlines()[-1]


def test_interrupting_says_how_to_go_on(folder, text, tmp_path, monkeypatch, capsys):
    from rope_scaling.eval.tasks import Perplexity

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Perplexity, "score", stop)
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "evaluate",
                "--model",
                str(folder),
                "--data",
                str(text),
                "--method",
                "yarn",
                "--output",
                str(tmp_path / "out"),
            ]
        )
    assert stopped.value.code == 130
    assert "The same command resumes where it stopped" in capsys.readouterr().err
    assert not (Path(tmp_path) / "out" / "rows.jsonl").exists()


@pytest.mark.parametrize(("given", "factor"), [("8x", 8.0), (4096, 4.0), ("2x", 2.0), (None, 3.0)])
def test_target_lengths_of_an_evaluation(given, factor):
    assert _factor(None, given, longest=3072, trained=1024) == factor


def test_a_target_length_of_an_evaluation_below_what_the_model_reads():
    with pytest.raises(RopeScalingError, match="`--target-length` is 512, but the context length as loaded is 1024"):
        _factor(None, "0.5x", longest=3072, trained=1024)
