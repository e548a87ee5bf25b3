"""GGUF files with the scaling inside: read back by llama.cpp's rules, and run in llama.cpp itself."""

import os

import numpy as np
import pytest
import torch
from conftest import apply, logits, make_model, rotary, strong, token_ids

import rope_scaling
from cases import METHOD_CASES
from references import gguf_files
from rope_scaling import RopeScalingError
from rope_scaling.cli.main import main
from rope_scaling.exporters.gguf import rewrite_gguf
from rope_scaling.hf.loading import load_model


gguf = pytest.importorskip("gguf")


@pytest.fixture
def base(tmp_path):
    """A GGUF file of the tiny Llama model."""
    return gguf_files.write_llama(make_model("llama"), tmp_path / "base.gguf")


@pytest.mark.parametrize("case", METHOD_CASES)
def test_every_static_method_goes_into_the_file(case, base, tmp_path):
    model = apply(make_model("llama"), case)
    inv_freq, attention_factor, length = gguf_files.read(rewrite_gguf(model, base, tmp_path / "new.gguf"))
    wanted = rotary(model).inv_freq.double().numpy()
    assert np.allclose(inv_freq, wanted, rtol=1e-6, atol=1e-29)
    assert attention_factor == pytest.approx(rotary(model).attention_scaling, rel=1e-6)
    assert length == model.config.max_position_embeddings


@pytest.mark.parametrize("method", ["as loaded", "linear", "ntk", "yarn"])
def test_a_model_that_arrives_with_a_share_of_its_pairs_goes_into_the_file(method, base, tmp_path):
    rope = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e4}
    model = make_model("llama", rope_parameters=rope)
    if method != "as loaded":
        rope_scaling.patch(model, method, factor=4)
    inv_freq, attention_factor, _ = gguf_files.read(rewrite_gguf(model, base, tmp_path / "new.gguf"))
    assert np.allclose(inv_freq, rotary(model).inv_freq.double().numpy(), rtol=1e-6, atol=1e-29)
    assert attention_factor == pytest.approx(rotary(model).attention_scaling, rel=1e-6)


def test_weights_are_copied_byte_for_byte_and_old_scaling_goes(base, tmp_path):
    first = rewrite_gguf(apply(make_model("llama"), "mrrope_pro"), base, tmp_path / "first.gguf")
    second = rewrite_gguf(rope_scaling.patch(make_model("llama"), "ntk", factor=4), first, tmp_path / "second.gguf")
    before, after = (gguf.GGUFReader(path) for path in (base, second))
    old, new = ({t.name: t.data.tobytes() for t in reader.tensors} for reader in (before, after))
    assert old == new
    same = before.fields.keys() & after.fields.keys()
    changed = {name for name in same if before.fields[name].contents() != after.fields[name].contents()}
    assert changed - {n for n in same if n.startswith("GGUF.")} == {"llama.context_length", "llama.rope.freq_base"}
    assert "rope_freqs.weight" in {t.name for t in gguf.GGUFReader(first).tensors}


def test_refusals_leave_nothing(base, tmp_path):
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    out = tmp_path / "new.gguf"
    (tmp_path / "text.gguf").write_text("no GGUF")
    (tmp_path / "there.gguf").write_text("")
    other = rope_scaling.patch(make_model("llama", hidden_size=32, head_dim=8), "yarn", factor=4)
    spans = rope_scaling.patch(make_model("llama"), "self_extend", group_size=4)
    for patched, source, target, message in (
        (model, tmp_path / "text.gguf", out, "not a readable GGUF file"),
        (model, tmp_path / "none.gguf", out, "not a readable GGUF file"),
        (model, base, tmp_path / "there.gguf", "exists. Give a new file"),
        (other, base, out, "is of another model: `embedding_length` there 64, here 32"),
        (spans, base, out, "changes attention, and llama.cpp knows frequencies only"),
    ):
        with pytest.raises(RopeScalingError, match=message):
            rewrite_gguf(patched, source, target)
        assert not out.exists() and not list(tmp_path.glob(".*"))


def test_architectures_that_read_no_factors(tmp_path, monkeypatch):
    monkeypatch.setattr("rope_scaling.exporters.gguf._READ_FACTORS", set())
    path = gguf_files.write_llama(make_model("llama"), tmp_path / "base.gguf")
    rewrite_gguf(rope_scaling.patch(make_model("llama"), "yarn", factor=4), path, tmp_path / "yarn.gguf")
    with pytest.raises(RopeScalingError, match="does not read for 'llama' models"):
        rewrite_gguf(apply(make_model("llama"), "mrrope_pro"), path, tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_command(tmp_path, capsys):
    base = gguf_files.write_llama(load_model("demo", device="cpu"), tmp_path / "base.gguf")
    new = tmp_path / "new.gguf"
    line = ["export", "demo", "--target", "llama.cpp", "--method", "mrrope_pro", "--factor", "8"]
    with pytest.raises(SystemExit) as stopped:
        main([*line, "--gguf", str(base), "--out", str(new)])
    assert stopped.value.code == 0 and f"llama-server -m {new} -c 2048" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([*line, "--gguf", str(base)])
    assert stopped.value.code == 2 and "a new file as `--out`" in capsys.readouterr().err


def llama_cpp_logits(path, ids):
    """Logits that llama.cpp computes in one pass of chunks, `[T, V]`."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make llama-cpp")
    model = llama_cpp.Llama(
        str(path), n_ctx=len(ids), n_batch=512, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0
    )
    model.eval(ids)
    return torch.from_numpy(model.scores[: len(ids)].copy()).float()


def perplexity(scores, ids):
    """Of every token after the first."""
    return torch.nn.functional.cross_entropy(scores[:-1], torch.tensor(ids[1:])).exp().item()


@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", ["linear", "ntk", "yarn", "mrrope_pro", "p_rope", "llama3", "ntk_by_parts"])
def test_llama_cpp_computes_the_logits_of_the_live_model(case, tmp_path):
    model = apply(strong("llama"), case)
    base = gguf_files.write_llama(strong("llama"), tmp_path / "base.gguf")
    ids = token_ids(150)[0].tolist()
    found = llama_cpp_logits(rewrite_gguf(model, base, tmp_path / "new.gguf"), ids)
    wanted = logits(model, token_ids(150))[0]
    off, without = ((one - wanted).abs().max() / wanted.abs().max() for one in (found, llama_cpp_logits(base, ids)))
    assert off < 2e-3 and without > 20 * off, (off, without)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("method", ["yarn", "ntk", "linear", "mrrope_pro"])
@pytest.mark.parametrize("name", ["demo", pytest.param("real", marks=pytest.mark.real_model)])
def test_perplexity_in_llama_cpp_is_that_of_the_live_model(name, method, length, tmp_path):
    from rope_scaling.hf.loading import load_tokenizer
    from rope_scaling.texts import read_texts

    if name == "real":
        name = os.environ.get("ROPE_SCALING_REAL_MODEL") or pytest.skip("needs ROPE_SCALING_REAL_MODEL")
    model = load_model(name, dtype="float32", device="cpu")
    ids = load_tokenizer(name)("\n".join(text for _, text in read_texts("python-reference"))[: 8 * length]).input_ids[
        :length
    ]
    assert len(ids) == length
    base = gguf_files.write_llama(model, tmp_path / "base.gguf")
    rope_scaling.patch(model, method, factor=16 if name == "demo" else 4)
    with torch.no_grad():
        wanted = perplexity(model(torch.tensor([ids])).logits[0], ids)
    found = perplexity(llama_cpp_logits(rewrite_gguf(model, base, tmp_path / "new.gguf"), ids), ids)
    print(f"{name} {method} {length}: llama.cpp {found:.4f}, live {wanted:.4f}")
    assert found == pytest.approx(wanted, rel=0.01)
